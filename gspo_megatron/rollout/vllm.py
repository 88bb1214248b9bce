"""`Engine` over the HTTP server of vLLM. Token ids go in and come out; nothing becomes text.

The server has to draw as vllm_draw.py does, and to serve `/inference/v1/generate` and vLLM's routes for RL:
engine_server.py starts it so. Responses are streamed: what an engine has sent before it dies is kept.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Any

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout.engine import Finish, PauseMode, Piece, Request, Span, Weights
from gspo_megatron.rollout.http import Address, call, events

KEY = "gspo_megatron"
"""In `SamplingParams.extra_args`, what vllm_draw.py reads."""
GENERATE = "/inference/v1/generate"
STREAM_INTERVAL = 16
"""Tokens of an event. An event for every token takes a server of small models more time than the tokens."""
FINISHES: Mapping[str | None, Finish] = {None: "", "stop": "stop", "length": "length", "abort": "abort"}
NO_VERSION = "default"
"""What vLLM calls the weights it was started with."""
MOST_STREAMS = 1024
"""Connections of one `generate`: files that a process may open are few."""

Load = Callable[["VllmEngine", Weights], None]
"""Brings weights into the engine. Sets their version there."""


class VllmEngine:
    """See `Engine`. `num_ids`: the tokenizer's ids; those beyond them are never sampled. `timeout_s`: how long
    the engine may send nothing while it samples, and may take for anything else."""

    def __init__(self, address: Address, *, num_ids: int, load: Load, timeout_s: float) -> None:
        self.address, self.name = address, address.name
        self._num_ids, self._load, self._timeout_s = num_ids, load, timeout_s

    # ------------------------------------------------------------------------------------------------- sampling

    def generate(self, requests: Seq[Request]) -> Iterator[Piece]:
        """See `Engine.generate`. One event loop in a thread reads all streams; closing the iterator ends them."""
        arrived: queue.Queue[Piece | BaseException] = queue.Queue()
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=(loop, self._streams(requests, arrived.put), arrived.put), daemon=True)
        thread.start()
        try:
            for _ in range(len(requests)):
                finish: Finish = ""
                while not finish:
                    piece = arrived.get(timeout=self._timeout_s)
                    if isinstance(piece, BaseException):
                        raise piece
                    yield piece
                    finish = piece.finish
        except queue.Empty:
            raise self.address.error(f"sent no token for {self._timeout_s:g} s (engine.timeout_s)") from None
        finally:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_cancel_all, loop)
            thread.join()

    async def _streams(self, requests: Seq[Request], put: Callable[[Piece], None]) -> None:
        room = asyncio.Semaphore(MOST_STREAMS)
        await asyncio.gather(*(self._stream(request, put, room) for request in requests))

    async def _stream(self, request: Request, put: Callable[[Piece], None], room: asyncio.Semaphore) -> None:
        async with room:
            position, finish = len(request.response), ""
            async for event in events(self.address, GENERATE, self._asked(request)):
                piece = self._piece(request, event, position)
                position += len(piece.tokens)
                finish = piece.finish
                put(piece)
            if not finish:
                raise self.address.error("ended a stream in the middle of a response")

    def _asked(self, request: Request, forced: Seq[int] = ()) -> dict[str, Any]:
        how = {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
        drawn = {"seed": request.seed, "id": request.id, "begin": len(request.response), **how, "num_ids": self._num_ids}
        if forced:
            drawn["forced"] = list(forced)
        params = {
            "temperature": 0,
            "max_tokens": request.max_new_tokens - len(request.response),
            "stop_token_ids": list(request.stop_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
            "stream_interval": STREAM_INTERVAL,
            "extra_args": {KEY: drawn},
        }
        return {"token_ids": [*request.prompt, *request.response], "sampling_params": params, "stream": True}

    def _piece(self, request: Request, event: Any, position: int) -> Piece:
        """What an event says of the tokens from `position` of the response on."""
        if isinstance(event, dict) and "error" in event:
            raise self.address.error(f"failed while it sampled: {event['error']}")
        try:
            [choice] = event["choices"]
            content = (choice["logprobs"] or {}).get("content") or []
            tokens, finish = tuple(choice["token_ids"] or ()), FINISHES[choice["finish_reason"]]
            log_probs = tuple(float(entry["logprob"]) for entry in content)
            named = [entry["token_id"] for entry in content]
            spans = [(_version(s["version"]), s["start"], s["end"]) for s in choice["weight_versions"] or ()]
        except (KeyError, TypeError, ValueError) as error:
            raise self.address.error(f"streams an event that vLLM does not send ({error!r})") from error
        self._check(request, tokens, named, log_probs, position)
        # vLLM tells versions with the last event, of all tokens of this request.
        begin = len(request.response)
        versions = tuple(Span(version, begin + start, begin + end) for version, start, end in spans)
        return Piece(request.id, tokens, log_probs, versions, finish)

    def _check(
        self, request: Request, tokens: tuple[int, ...], named: list[int], log_probs: tuple[float, ...], position: int
    ) -> None:
        if tokens != tuple(named):
            raise self.address.error(f"sent tokens {tokens} with log-probs of {named}")
        if any(not 0 <= token < self._num_ids for token in tokens):
            raise self.address.error(
                f"sent tokens {tokens}, but the tokenizer has {self._num_ids} ids",
                "the engine must have the model of this run, and draw as gspo_megatron.rollout.vllm_draw does",
            )
        if not all(math.isfinite(x) and x <= 1e-6 for x in log_probs):
            raise self.address.error(f"sent numbers that are not log-probs: {log_probs}")
        if position + len(tokens) > request.max_new_tokens:
            raise self.address.error(f"sent more than {request.max_new_tokens} tokens of a response")

    # -------------------------------------------------------------------------------------------------- control

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that the engine answers to a call."""
        return call(self.address, method, path, body, timeout_s=self._timeout_s)

    def pause(self, mode: PauseMode) -> None:
        """See `Engine.pause`."""
        self.ask("POST", f"/pause?mode={mode}&clear_cache=true")

    def resume(self) -> None:
        """See `Engine.resume`."""
        self.ask("POST", "/resume")

    def load(self, weights: Weights) -> None:
        """See `Engine.load`."""
        self._load(self, weights)
        if (found := self.version()) != weights.version:
            raise self.address.error(f"has weights of version {found} after it was given {weights.version}")

    def version(self) -> int:
        """See `Engine.version`."""
        try:
            return _version(self.ask("GET", "/weight_info")["weight_version"])
        except (KeyError, TypeError, ValueError) as error:
            raise self.address.error(f"does not tell the version of its weights ({error!r})") from error

    def probe(self, tokens: Seq[int], prompt_length: int) -> list[float]:
        """See `Engine.probe`. The engine takes these tokens as if it had drawn them, through its cache."""
        prompt, forced = tuple(tokens[:prompt_length]), tuple(tokens[prompt_length:])
        request = Request(0, prompt, (), 0, 1.0, 1.0, 0, len(forced), ())
        answer = self.ask("POST", GENERATE, {**self._asked(request, forced), "stream": False})
        piece = self._piece(request, answer, 0)
        if piece.tokens != forced:
            raise self.address.error(f"scored {piece.tokens} where it was asked for {forced}")
        return list(piece.log_probs)

    def alive(self) -> bool:
        """See `Engine.alive`."""
        try:
            return call(self.address, "GET", "/health", timeout_s=min(5.0, self._timeout_s)) in (None, {})
        except EngineError:
            return False


def _version(text: str | None) -> int:
    return -1 if text in (None, NO_VERSION) else int(text)


def _run(loop: asyncio.AbstractEventLoop, work: Any, put: Callable[[BaseException], None]) -> None:
    try:
        loop.run_until_complete(work)
    except asyncio.CancelledError:
        pass
    except BaseException as error:
        put(error)
    finally:
        _cancel_all(loop)
        with suppress(Exception):
            loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True))
        loop.close()


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
