"""Engines that a run did not start: each that it cannot use is named before anything is trained.

The server here answers what vLLM 0.32 answers, and each case spoils one answer. A real one is in tests/engine.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gspo_megatron.base.errors import EngineError, UnfitEngine
from gspo_megatron.rollout import external_engine
from gspo_megatron.rollout.engine_draws import REFUSAL
from gspo_megatron.rollout.external_engine import GENERATE, ROUTES, RPC, ExternalEngine
from gspo_megatron.rollout.http import Address
from gspo_megatron.rollout.lease import LEASE, RUN
from gspo_megatron.testing.time_limits import time_factor

MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "dtype": "float32", "eos_token_id": 1, "rope_scaling": None}


class Vllm:
    """Attributes: answers, by method and route or by the method of an RPC: (status, JSON). asked: in order."""

    def __init__(self, port: int = 0) -> None:
        about = {**MODEL, "dtype": "bfloat16", "eos_token_id": 2, "rope_parameters": {}}
        refused = {"error": {"message": f"this engine draws tokens for a trainer: {REFUSAL} seed, id, got None"}}
        self.answers: dict[str, tuple[int, Any]] = {
            "GET /health": (200, None),
            "GET /version": (200, {"version": "0.32.0"}),
            "GET /v1/models": (200, {"data": [{"id": "policy", "max_model_len": 24}]}),
            f"POST {GENERATE}": (400, refused),
            # Of another number format, another end, and with an entry of vLLM's own.
            "gspo_about": (200, {"results": [{"vocab_size": 13, "device": "cpu", "model": about}]}),
            "gspo_forget_update": (200, {"results": [None]}),
        }
        self.missing: tuple[str, ...] = ()
        self.token, self.asked = "secret", list[str]()
        self.holder = ""
        vllm = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
                key = f"{self.command} {self.path}"
                if self.path == RPC and self.command == "POST":
                    key = body["method"]
                vllm.asked.append(key)
                status, content = vllm.answers.get(key, (405 if self.path in ROUTES else 404, {"detail": "no"}))
                if self.path in vllm.missing:
                    status, content = 404, {"detail": "Not Found"}
                if self.path != "/health" and self.headers["Authorization"] != f"Bearer {vllm.token}":
                    status, content = 401, {"error": {"message": "Unauthorized"}}
                if key == f"POST {LEASE}" and status != 401 and LEASE not in vllm.missing:
                    self.lend()
                    return
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

            do_GET = do_POST

            def lend(self) -> None:
                self.send_response(409 if vllm.holder else 200)
                self.end_headers()
                if vllm.holder:
                    self.wfile.write(json.dumps({"error": {"message": vllm.holder}}).encode())
                    return
                vllm.holder = self.headers[RUN]
                self.rfile.read(1)  # until the other end closes
                vllm.holder = ""

            def log_message(self, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    server = Vllm()
    yield server
    server.close()


def engine_at(port: int, **changed: Any) -> ExternalEngine:
    address = Address("engine 0", "127.0.0.1", port, "secret")
    how: dict[str, Any] = {"max_length": 24, "vocab_size": 13, "model": MODEL, "start_timeout_s": 30 * time_factor()}
    return ExternalEngine(address, **how | changed)


def test_an_engine_of_the_command_serve_is_taken(vllm: Vllm) -> None:
    said: list[str] = []
    engine_at(vllm.port, same_device="cpu", say=said.append).wait()
    assert vllm.asked[-1] == "gspo_forget_update"
    assert not said
    vllm.answers["GET /version"] = 200, {"version": "0.34.1"}
    engine_at(vllm.port, say=said.append).wait()
    assert said == ["engine 0 is vLLM 0.34.1; 0.32 is what was tested"]


@pytest.mark.parametrize(
    ("spoilt", "complaint"),
    [
        ({"GET /version": (404, {"detail": "Not Found"})}, "is not vLLM: it answers /version with status 404"),
        ({"GET /version": (200, b"<html>")}, "is not vLLM: it answers /version with status 200, '<html>'"),
        ({"GET /version": (200, {"version": "0.11.2"})}, "is vLLM 0.11.2, older than 0.32; install 0.32"),
        ({"GET /v1/models": (500, {})}, "answers /v1/models with status 500"),
        ({"GET /v1/models": (200, {"data": [{"max_model_len": 23}]})}, "takes sequences of 23 tokens"),
        ({f"POST {GENERATE}": (403, {"error": "off"})}, "does not serve token ids (--enable-scale-out)"),
        ({f"POST {GENERATE}": (200, {"choices": []})}, "draws tokens by itself"),
        ({"gspo_about": (500, {"error": {"message": "no attribute"}})}, "has no worker that takes the run's weights"),
        ({"gspo_about": (200, {"results": [{"vocab_size": 14}]})}, "has a model of 14 ids, and the run's has 13"),
        (
            {"gspo_about": (200, {"results": [{"vocab_size": 13, "model": {**MODEL, "hidden_size": 128, "new": 1}}]})},
            "has another model than the run: hidden_size is 128, and the run's 64; start it with",
        ),
        (
            {"gspo_about": (200, {"results": [{"vocab_size": 13, "device": "cuda"}]})},
            "computes on cuda and the run on cpu, which no broadcast joins; set engine.channel=disk",
        ),
    ],
)
def test_an_engine_that_a_run_cannot_use_is_refused(vllm: Vllm, spoilt: dict[str, Any], complaint: str) -> None:
    vllm.answers |= spoilt
    with pytest.raises(UnfitEngine) as caught:
        engine_at(vllm.port, same_device="cpu").wait()
    assert str(caught.value).startswith(f"engine 0 (http://127.0.0.1:{vllm.port}) {complaint}"), caught.value
    assert "gspo_forget_update" not in vllm.asked


def told(log_prob: float) -> dict[str, Any]:
    return {"choices": [{"logprobs": {"content": [{"token_id": 0, "logprob": log_prob}]}}]}


@pytest.mark.parametrize(
    ("status", "answer", "complaint"),
    [
        (200, told(0.0), ""),
        (200, told(-2.56), "sends log-probs of another distribution than it draws from, or none (-2.56)"),
        (200, {"choices": [{"logprobs": None}]}, "sends log-probs of another distribution than it draws from, or none"),
        (400, {"error": {"message": f"{REFUSAL} seed"}}, "draws the product's random numbers"),
    ],
)
def test_an_engine_that_draws_otherwise_than_the_run_asks_is_refused(
    vllm: Vllm, status: int, answer: Any, complaint: str
) -> None:
    vllm.answers[f"POST {GENERATE}"] = status, answer
    engine = engine_at(vllm.port, draw="vllm")
    if not complaint:
        engine.wait()
        return
    with pytest.raises(UnfitEngine) as caught:
        engine.wait()
    assert complaint in str(caught.value) and "--logprobs-mode processed_logprobs" in str(caught.value)


def test_a_vllm_without_the_routes_is_refused(vllm: Vllm) -> None:
    vllm.missing = ("/pause", "/update_weights")
    with pytest.raises(UnfitEngine, match=r"is vLLM 0.32.0 without /pause, /update_weights; start it with"):
        engine_at(vllm.port).wait()


def test_another_token_is_said(vllm: Vllm) -> None:
    vllm.token = "other"
    with pytest.raises(UnfitEngine, match="refuses the token of this run; set GSPO_ENGINE_TOKEN"):
        engine_at(vllm.port).wait()


def test_what_does_not_speak_http_is_said() -> None:
    def answer() -> None:
        connection, _ = taken.accept()
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UnfitEngine, match="is not vLLM: it does not speak HTTP; correct"):
            engine_at(taken.getsockname()[1]).wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_an_engine_serves_one_run_at_a_time(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_engine, "ANSWER_S", 2.0)
    monkeypatch.setattr(external_engine, "TELL_S", 0.5)
    first, said = engine_at(vllm.port, run="runs/a on node7"), list[str]()
    first.wait()
    asked = len(vllm.asked)
    with pytest.raises(UnfitEngine, match=r"is used by another run, runs/a on node7; end that run, or name another"):
        engine_at(vllm.port, run="runs/b on node8", say=said.append).wait()
    assert said == ["waiting for engine 0, which another run uses: runs/a on node7"]
    # It was asked for nothing that the first run would notice.
    assert {*vllm.asked[asked:]} == {"GET /health", "GET /version", f"POST {LEASE}"}
    engine_at(vllm.port, run="runs/b on node8").wait(stop=lambda: True)
    first.wait()  # as when the engine was started again
    first.end()
    second = engine_at(vllm.port, run="runs/b on node8", start_timeout_s=60 * time_factor())
    second.wait()
    assert vllm.holder == "runs/b on node8"
    second.end()


def test_an_engine_that_a_run_cannot_use_is_free_for_others(vllm: Vllm) -> None:
    with pytest.raises(UnfitEngine, match="takes sequences of 24 tokens"):
        engine_at(vllm.port, max_length=25).wait()
    other = engine_at(vllm.port)
    other.wait()
    other.end()


def test_an_engine_without_leases_is_taken(vllm: Vllm) -> None:
    """One that another command started."""
    vllm.missing = (LEASE,)
    engine_at(vllm.port).wait()
    assert not vllm.holder


def test_an_engine_is_waited_for() -> None:
    port, servers = free_port(), list[Vllm]()
    threading.Timer(1.0, lambda: servers.append(Vllm(port))).start()
    engine_at(port).wait()
    [server] = servers
    # As nginx before a server that is not up, and as vLLM while it ends.
    server.answers["GET /health"] = 503, None
    with pytest.raises(EngineError, match=r"waited 0.1 s for engine 0 \(engine.start_timeout_s\): .* with status 503"):
        engine_at(port, start_timeout_s=0.1).wait()
    server.close()


def test_waiting_ends_with_the_time_or_the_run() -> None:
    port = free_port()
    with pytest.raises(EngineError, match=r"waited 0.1 s for engine 0 .*refused; start it with `python -m gspo_m"):
        engine_at(port, start_timeout_s=0.1).wait()
    began = time.monotonic()
    engine_at(port, start_timeout_s=600).wait(lambda: True)
    assert time.monotonic() - began < 60 * time_factor()
