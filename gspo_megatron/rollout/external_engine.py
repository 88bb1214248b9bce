"""An engine that something else starts and ends: the run waits for its address, and sees whether it can use it.

`python -m gspo_megatron.serve` starts such an engine. One that is another program, or that was started otherwise, would
fail in the middle of a run, or sample what the run does not ask for; so each is asked before anything is trained.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from gspo_megatron.base.errors import EngineError, UnfitEngine
from gspo_megatron.rollout.engine_draws import DRAWS
from gspo_megatron.rollout.http import Address, exchange, said
from gspo_megatron.rollout.lease import Lease

OLDEST, TESTED = (0, 32), "0.32"
"""Versions of vLLM: the first that has all of ROUTES, and the one that tests run with."""
UNNUMBERED = "0.1.dev"
"""Builds from a source without tags."""
GENERATE, RPC = "/inference/v1/generate", "/collective_rpc"
ROUTES = (
    *(GENERATE, RPC, "/v1/models", "/pause", "/resume", "/is_paused", "/weight_info", "/get_world_size"),
    *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"),
)
POLL_S, ANSWER_S = 0.5, 30.0
"""Seconds between two looks, and that a question may take: none of them waits for a GPU."""
TELL_S = 3.0
"""Wait before telling the user that another run has the engine: the connection may be this run's own, just closed."""
ALIKE = ("dtype", "torch_dtype", "max_position_embeddings", "transformers_version", "use_cache")
"""Entries of config.json in which an engine may differ; and the ids of special tokens, which no engine needs."""
MOST_SHOWN = 3
COMMAND = "`python -m gspo_megatron.serve` with the settings of this run"


@dataclass
class ExternalEngine:
    """The counterpart of `EngineServer`.

    Attributes:
        max_length: tokens of the run's longest sequence.
        vocab_size: rows of the model's embedding.
        model: config.json of the run's model.
        draw: engine.draw of the run.
        same_device: the type of the run's device, where weights come by a collective of both; empty: any.
        start_timeout_s: how long it may take to answer.
        run: what another run reads that asks for the engine meanwhile.
        say: called with a line for the user.
    """

    address: Address
    max_length: int
    vocab_size: int
    model: Mapping[str, Any] = field(default_factory=dict)
    draw: str = "counter"
    same_device: str = ""
    start_timeout_s: float = 600.0
    run: str = "a run"
    say: Callable[[str], None] = lambda line: None
    _lease: Lease | None = field(default=None, init=False)

    def start(self) -> None:
        """Nothing: whoever started it starts it again."""

    def end(self) -> None:
        """Lets other runs have it."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.end()

    def wait(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Returns once it answers and the run can use it, or when `stop` says so.

        Raises:
            UnfitEngine: see `check`.
            EngineError: it does not answer in time.
        """
        began, told = time.monotonic(), False
        self.end()
        while not stop():
            if not (why := self._silence()):
                try:
                    self.check(stop)
                except EngineError:
                    self.end()
                    raise
                return
            if time.monotonic() - began > self.start_timeout_s:
                raise EngineError(
                    f"waited {self.start_timeout_s:g} s for {self.address.name} (engine.start_timeout_s): {why}; "
                    f"start it with {COMMAND}, or correct engine.addresses"
                )
            if not told and time.monotonic() - began > ANSWER_S:
                told = True
                self.say(f"waiting for {self.address.name}: {why}")
            time.sleep(POLL_S)

    def _silence(self) -> str:
        """Why it is not to be asked yet; empty once it can be."""
        try:
            status, _ = exchange(self.address, "GET", "/health", timeout_s=ANSWER_S)
        except EngineError as error:
            cause = error.__cause__
            if isinstance(cause, http.client.HTTPException) and not isinstance(cause, OSError):
                raise self._unfit("is not vLLM: it does not speak HTTP", "correct engine.addresses") from error
            return str(cause or error)
        # vLLM answers 503 while it ends, and so does what stands before a server that is not up.
        return f"it answers /health with status {status}" if status in (502, 503, 504) else ""

    def check(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Asks it for all that the run needs, or returns when `stop` says so. It is this run's then, until `end`.

        Raises:
            UnfitEngine: what is missing, and what to do.
            EngineError: it no longer answers.
        """
        version = self._checked_version()
        self._take(stop)
        if stop():
            return
        missing = [route for route in ROUTES if self._ask("GET", route)[0] == 404]
        if missing:
            raise self._unfit(
                f"is vLLM {version} without {', '.join(missing)}",
                f"start it with {COMMAND}, which switches these routes on, and vLLM {TESTED}",
            )
        self._check_length()
        self._check_draw()
        self._check_worker()
        if not version.startswith(f"{TESTED}."):
            self.say(f"{self.address.name} is vLLM {version}; {TESTED} is what was tested")

    def _take(self, stop: Callable[[], bool]) -> None:
        """Waits a while for a run that has it: a killed one's connections end soon."""
        began, told = time.monotonic(), False
        while not stop():
            lease = Lease(self.address, self.run, min(ANSWER_S, self.start_timeout_s))
            if not lease.held_by:
                self._lease = lease
                return
            if time.monotonic() - began > min(ANSWER_S, self.start_timeout_s):
                raise self._unfit(
                    f"is used by another run, {lease.held_by}",
                    "end that run, or name another engine: one serves one run",
                )
            if not told and time.monotonic() - began > TELL_S:
                told = True
                self.say(f"waiting for {self.address.name}, which another run uses: {lease.held_by}")
            time.sleep(POLL_S)

    def _checked_version(self) -> str:
        status, content = self._ask("GET", "/version")
        if status == 401:
            raise self._unfit(
                "refuses the token of this run", "set GSPO_ENGINE_TOKEN to the same text for the engine and for the run"
            )
        version = _field(content, "version")
        if status != 200 or not isinstance(version, str):
            raise self._unfit(
                f"is not vLLM: it answers /version with status {status}, {said(content)}", "correct engine.addresses"
            )
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers < OLDEST and not version.startswith(UNNUMBERED):
            raise self._unfit(f"is vLLM {version}, older than {TESTED}", f"install {TESTED}")
        return version

    def _check_length(self) -> None:
        status, content = self._ask("GET", "/v1/models")
        longest = [model.get("max_model_len") for model in _field(content, "data") or () if isinstance(model, dict)]
        if status != 200 or not longest or not isinstance(longest[0], int):
            raise self._unfit(f"answers /v1/models with status {status}, {said(content)}", f"start it with {COMMAND}")
        if longest[0] < self.max_length:
            raise self._unfit(
                f"takes sequences of {longest[0]} tokens (--max-model-len), fewer than "
                f"model.max_sequence_length={self.max_length}",
                f"start it with {COMMAND}",
            )

    def _check_draw(self) -> None:
        draw = DRAWS[self.draw]
        asked = {"token_ids": [0], "sampling_params": dict(draw.trial), "stream": False}
        status, content = self._ask("POST", GENERATE, asked)
        if status == 403:
            raise self._unfit("does not serve token ids (--enable-scale-out)", f"start it with {COMMAND}")
        answer: str | float = content.decode(errors="replace")
        with suppress(LookupError, TypeError, ValueError):
            answer = float(_field(content, "choices")[0]["logprobs"]["content"][0]["logprob"])
        if wrong := draw.misfit(answer):
            raise self._unfit(wrong, f"start it with {COMMAND}, or with {' '.join(draw.arguments)}")

    def _check_worker(self) -> None:
        status, content = self._ask("POST", RPC, {"method": "gspo_about"})
        about = _field(content, "results")
        if status != 200 or not about or not isinstance(about[0], dict):
            raise self._unfit(
                "has no worker that takes the run's weights",
                f"start it with {COMMAND} and the same version of gspo_megatron, or with --worker-extension-cls "
                'gspo_megatron.rollout.vllm_worker.Extension --weight-transfer-config \'{"backend": "gspo"}\'',
            )
        ids, kind = about[0].get("vocab_size"), about[0].get("device")
        if ids != self.vocab_size:
            raise self._unfit(
                f"has a model of {ids} ids, and the run's has {self.vocab_size} (model.vocab_size)",
                f"start it with {COMMAND}",
            )
        if other := differing(self.model, about[0].get("model") or {}):
            raise self._unfit(
                f"has another model than the run: {', '.join(other[:MOST_SHOWN])}", f"start it with {COMMAND}"
            )
        if self.same_device not in ("", kind):
            raise self._unfit(
                f"computes on {kind} and the run on {self.same_device}, which no broadcast joins",
                "set engine.channel=disk, or start it on the other kind of device",
            )
        # A trainer that was killed may have left it within an update, and paused: the next update pauses it again.
        self._ask("POST", RPC, {"method": "gspo_forget_update"})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        return exchange(self.address, method, path, body, timeout_s=min(ANSWER_S, self.start_timeout_s))

    def _unfit(self, what: str, advice: str) -> UnfitEngine:
        return UnfitEngine(str(self.address.error(what, advice)))


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Entries of two config.json that are not the same, as `hidden_size is 128, and the run's 64`. Not those that
    leave every weight where it is, and not those that only one of them has: vLLM adds its own."""
    both = [key for key in ours if key in theirs and isinstance(ours[key], (int, float, str))]
    both = [key for key in both if key not in ALIKE and not key.endswith("_token_id")]
    return [f"{key} is {theirs[key]}, and the run's {ours[key]}" for key in both if ours[key] != theirs[key]]


def _field(content: bytes, name: str) -> Any:
    """Of a JSON object; None where there is none."""
    with suppress(ValueError, TypeError, KeyError):
        return json.loads(content)[name]
    return None
