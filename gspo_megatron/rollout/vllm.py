"""`Engine` over the HTTP server of vLLM. Token ids go in and come out; nothing becomes text.

The server has to draw as engine_draws.py says, and to serve `/inference/v1/generate` and vLLM's routes for RL:
engine_server.py starts it so. Responses are streamed: what an engine has sent before it dies is kept.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout.engine import Finish, PauseMode, Piece, Request, Span, Weights
from gspo_megatron.rollout.engine_draws import EngineDraw, Scored
from gspo_megatron.rollout.http import Address, call, events

GENERATE = "/inference/v1/generate"
FINISHES: Mapping[str | None, Finish] = {None: "", "stop": "stop", "length": "length", "abort": "abort"}
NO_VERSION = "default"
"""What vLLM calls the weights it was started with."""
MOST_STREAMS = 1024
"""Connections of one `generate`: files that a process may open are few."""
MOST_PROBES = 16
"""Requests of one `probe` at once."""

Arrived = queue.SimpleQueue[Piece | BaseException]


class VllmEngine:
    """See `Engine`. It has no `load` of its own: weight_sync.py gives new weights to all engines at once.

    Attributes:
        address: where the server listens; it changes when the server is started again.
        draw: how the server draws, which it must have been started for.
        temperature: of the log-probs of `probe`.
        timeout_s: how long the engine may send nothing while it samples, without pauses, and may take for anything
            else.
        stream_interval: tokens of an event. With 1, the version of every token is known when it arrives.
        most_streams: requests of one `generate` that the engine has at once.
    """

    def __init__(
        self,
        address: Address,
        *,
        draw: EngineDraw,
        temperature: float,
        timeout_s: float,
        stream_interval: int,
        most_streams: int = MOST_STREAMS,
    ) -> None:
        self.address, self.name = address, address.name
        self.draw, self.temperature, self.timeout_s = draw, temperature, timeout_s
        self.stream_interval, self.most_streams = stream_interval, min(most_streams, MOST_STREAMS)
        self._known = -1
        """The version, when it was last asked for."""
        self._going_since = 0.0
        """When it was last resumed, of time.monotonic(); inf while it is paused."""
        self._open: set[Arrived] = set()
        """Of every `generate` under way."""

    # ------------------------------------------------------------------------------------------------- sampling

    def generate(self, requests: Seq[Request]) -> Iterator[Piece]:
        """See `Engine.generate`. One event loop in a thread reads all streams; closing the iterator ends them."""
        arrived: Arrived = queue.SimpleQueue()
        self._open.add(arrived)
        loop = asyncio.new_event_loop()
        reading = threading.Thread(
            target=_run, args=(loop, self._streams(requests, arrived.put), arrived.put), daemon=True
        )
        reading.start()
        under_way = len(requests)
        try:
            while under_way:
                piece = self._next(arrived)
                if isinstance(piece, BaseException):
                    raise piece
                under_way -= bool(piece.finish)
                yield piece
        finally:
            self._open.discard(arrived)
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_cancel_all, loop)
            reading.join()

    def _next(self, arrived: Arrived) -> Piece | BaseException:
        """What comes next. While the engine is paused, as long as the trainer needs to send weights, no time counts."""
        began = time.monotonic()
        while (left := max(began, self._going_since) + self.timeout_s - time.monotonic()) > 0:
            with suppress(queue.Empty):
                return arrived.get(timeout=min(left, self.timeout_s))
        return self.address.error(f"sent no token for {self.timeout_s:g} s (engine.timeout_s)")

    def give_up(self) -> None:
        """See `Engine.give_up`."""
        self._going_since = time.monotonic()
        for arrived in list(self._open):
            arrived.put(self.address.error("is taken for dead, and what it sampled is not waited for"))

    async def _streams(self, requests: Seq[Request], put: Callable[[Piece], None]) -> None:
        room = asyncio.Semaphore(self.most_streams)
        await asyncio.gather(*(self._stream(request, put, room) for request in requests))

    async def _stream(self, request: Request, put: Callable[[Piece], None], room: asyncio.Semaphore) -> None:
        async with room:
            told: list[Span] = []
            last: Piece | None = None
            position = len(request.response)
            async for event in events(self.address, GENERATE, self._asked(request)):
                if last is not None:
                    raise self.address.error(f"went on with a response that had ended: {event}")
                piece = self._piece(request, event, position, told)
                if piece.finish:
                    last = piece
                    continue
                told += piece.versions
                position += len(piece.tokens)
                put(piece)
            if last is None:
                raise self.address.error("ended a stream in the middle of a response")
            put(last)

    def _asked(self, request: Request) -> dict[str, Any]:
        params = self.draw.parameters(request) | {"stream_interval": self.stream_interval}
        return {"token_ids": [*request.prompt, *request.response], "sampling_params": params, "stream": True}

    def _piece(self, request: Request, event: Any, position: int, told: Seq[Span]) -> Piece:
        """What an event says of the tokens from `position` of the response on. `told`: versions of those before."""
        if isinstance(event, dict) and "error" in event:
            raise self.address.error(f"failed while it sampled: {event['error']}")
        try:
            [choice] = event["choices"]
            tokens, finish = tuple(choice["token_ids"] or ()), FINISHES[choice["finish_reason"]]
            scored = (choice["logprobs"] or {}).get("content") or []
            named = tuple(entry["token_id"] for entry in scored)
            log_probs = tuple(float(entry["logprob"]) for entry in scored)
            begin = len(request.response)
            said = choice["weight_versions"] or ()
            spans = [Span(_version(span["version"]), begin + span["start"], begin + span["end"]) for span in said]
        except (KeyError, TypeError, ValueError) as error:
            raise self.address.error(f"streams an event that vLLM does not send ({error!r})") from error
        if tokens != named:
            raise self.address.error(f"sent tokens {tokens} with log-probs of {named}")
        if strange := [token for token in tokens if not (isinstance(token, int) and 0 <= token < self.draw.num_ids)]:
            raise self.address.error(
                f"sent token {strange[0]}, but the tokenizer has {self.draw.num_ids} ids",
                "the engine must have the model of this run, and draw as engine.draw says",
            )
        end = position + len(tokens)
        # vLLM tells versions at the end, of all tokens of the request, and may count tokens that it did not send.
        versions = _within(spans, position, end) if said else (Span(self._known, position, end),) if tokens else ()
        if said and _within(spans, begin, position) != _joined(told):
            raise self.address.error(f"sampled tokens of versions {spans}, which came when it had {list(told)}")
        return Piece(request.id, tokens, log_probs, versions, finish)

    # -------------------------------------------------------------------------------------------------- control

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that the engine answers to a call."""
        return call(self.address, method, path, body, timeout_s=self.timeout_s)

    def pause(self, mode: PauseMode) -> None:
        """See `Engine.pause`."""
        self.ask("POST", f"/pause?mode={mode}&clear_cache=true")
        # Not before: with `wait` it samples on until it answers.
        self._going_since = math.inf

    def resume(self) -> None:
        """See `Engine.resume`."""
        try:
            self.version()
            self.ask("POST", "/resume")
        finally:
            self._going_since = time.monotonic()

    def load(self, weights: Weights) -> None:
        """Not offered."""
        raise self.address.error("cannot take weights by itself", "send them with rollout.weight_sync.send_weights")

    def version(self) -> int:
        """See `Engine.version`."""
        try:
            self._known = _version(self.ask("GET", "/weight_info")["weight_version"])
        except (KeyError, TypeError, ValueError) as error:
            raise self.address.error(f"does not tell the version of its weights ({error!r})") from error
        return self._known

    def probe(self, tokens: Seq[int], prompt_length: int) -> list[float]:
        """See `Engine.probe`."""
        asked = self.draw.probes(tokens, prompt_length, self.temperature)
        with ThreadPoolExecutor(min(len(asked), MOST_PROBES)) as threads:
            return [log_prob for scored in threads.map(self._scores, asked) for log_prob in scored]

    def _scores(self, asked: Scored) -> list[float]:
        """The log-probs of `asked.ids`."""
        body = {"token_ids": list(asked.tokens), "sampling_params": asked.params, "stream": False}
        answer = self.ask("POST", GENERATE, body)
        try:
            rows = [_log_probs_in(entry) for entry in answer["choices"][0]["logprobs"]["content"]]
        except (LookupError, TypeError, ValueError) as error:
            raise self.address.error(f"answers a probe as vLLM does not ({error!r})") from error
        if len(rows) != len(asked.ids) or any(token not in row for token, row in zip(asked.ids, rows, strict=True)):
            raise self.address.error(f"scored {[list(row) for row in rows]} where it was asked for {asked.ids}")
        return [row[token] for token, row in zip(asked.ids, rows, strict=True)]

    def alive(self) -> bool:
        """See `Engine.alive`."""
        try:
            return call(self.address, "GET", "/health", timeout_s=min(5.0, self.timeout_s)) in (None, {})
        except EngineError:
            return False


def _log_probs_in(entry: Mapping[str, Any]) -> dict[int, float]:
    """By id, of the sampled token and of others that were asked for."""
    return {each["token_id"]: float(each["logprob"]) for each in (*(entry.get("top_logprobs") or ()), entry)}


def _version(text: str | None) -> int:
    return -1 if text in (None, NO_VERSION) else int(text)


def _within(spans: Seq[Span], begin: int, end: int) -> tuple[Span, ...]:
    """What they say of the tokens [begin, end)."""
    cut = (Span(s.version, max(s.begin, begin), min(s.end, end)) for s in spans)
    return tuple(span for span in cut if span.begin < span.end)


def _joined(spans: Seq[Span]) -> tuple[Span, ...]:
    """Neighbours of one version as one."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].version == span.version:
            joined[-1] = joined[-1]._replace(end=span.end)
        else:
            joined.append(span)
    return tuple(joined)


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
