"""The command serve, over a program that stands in for vLLM's server: started, started again, and ended with it.

A real vLLM is in tests/engine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gspo_megatron.base.errors import ConfigError, EngineError
from gspo_megatron.build.serving import engine_of, keep_up, reached_at
from gspo_megatron.config.loading import load_config
from gspo_megatron.rollout.engine_server import EngineServer
from gspo_megatron.rollout.http import exchange
from gspo_megatron.serve import main as serve
from gspo_megatron.testing.time_limits import time_factor

ROOT = Path(__file__).parents[1]
STAND_IN = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("RuntimeError: no memory", flush=True)
            os._exit(3)
        self.send_response(200)
        self.end_headers()

said = sys.argv
place = said[said.index("--host") + 1], int(said[said.index("--port") + 1])
print(os.getpid(), os.environ.get("VLLM_API_KEY"), *said, flush=True)
HTTPServer(place, Handler).serve_forever()
"""
TINY = (
    *("rollout.engine=vllm", "precision.device=cpu", "model.num_layers=1", "model.hidden_size=8", "model.head_dim=32"),
    *("model.num_experts=2", "model.expert_ffn_size=8", "model.max_sequence_length=16"),
    *("data.tokenizer=characters:0123456789>", "data.task.max_length=3", "rollout.max_new_tokens=4"),
)


@pytest.fixture
def settings(tmp_path: Path) -> tuple[str, ...]:
    """Of a run whose engine.python answers as soon as it is started."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I {tmp_path / "stand_in.py"} "$@"\n')
    python.chmod(0o755)
    return (*TINY, f"engine.python={python}", f"run.dir={tmp_path / 'run'}", "engine.start_timeout_s=120")


def wait_until(reached: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 120 * time_factor()
    while not reached():
        assert time.monotonic() < until, what
        time.sleep(0.05)


class Kept:
    """`keep_up` in a thread."""

    def __init__(self, server: EngineServer, most_starts: int) -> None:
        self.server, self.said, self.error = server, list[str](), None
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(most_starts,), daemon=True)
        self._thread.start()

    def _run(self, most_starts: int) -> None:
        try:
            keep_up(self.server, most_starts, self.stop.is_set, self.said.append)
        except EngineError as error:
            self.error = error

    def wait_for_ready(self, times: int) -> None:
        def ready() -> bool:
            return sum("ready" in line for line in self.said) == times

        wait_until(ready, f"ready {times} times: {self.said}")

    def kill(self) -> None:
        with pytest.raises(EngineError):
            exchange(self.server.address, "GET", "/die", timeout_s=30)

    def join(self) -> None:
        self._thread.join(60 * time_factor())
        assert not self._thread.is_alive()


@pytest.fixture
def kept(settings: tuple[str, ...]) -> Iterator[Kept]:
    kept = Kept(engine_of(load_config(None, settings), "127.0.0.1", 0), most_starts=1)
    yield kept
    kept.stop.set()
    kept.join()


def test_a_server_that_dies_is_started_again_at_the_same_address(kept: Kept) -> None:
    kept.wait_for_ready(1)
    kept.kill()
    kept.wait_for_ready(2)
    url = kept.server.address.url
    starts, ready = f"vLLM starts; its log is {kept.server.log}", f"ready: engine.addresses=[{url}]"
    assert kept.said == [starts, ready, "the engine ended with status 3; it is started again", starts, ready]
    kept.kill()
    kept.join()
    assert str(kept.error).startswith("the engine ended with status 3, after 2 starts (engine.most_starts=1)")
    assert "RuntimeError: no memory" in str(kept.error)


def test_a_server_ends_with_the_command(kept: Kept) -> None:
    kept.wait_for_ready(1)
    kept.stop.set()
    kept.join()
    assert kept.error is None
    with pytest.raises(EngineError, match="refused"):
        exchange(kept.server.address, "GET", "/health", timeout_s=5)


def test_settings_that_one_engine_would_ignore_are_refused(settings: tuple[str, ...]) -> None:
    for overrides, complaint in (
        (["rollout.engine=collective"], "a run of these settings asks no engine; set rollout.engine=vllm"),
        (
            ["engine.count=2"],
            "engine.count=2: this command starts one engine; remove it, and start the command 2 times",
        ),
        (
            ["model.head_dim=16"],
            "model.head_dim=16 with engines on a CPU: vLLM's attention there takes heads of 32 or more; set model.head",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            engine_of(load_config(None, [*settings, *overrides]), "127.0.0.1", 0)
        assert complaint in str(caught.value)
    with pytest.raises(EngineError, match=r"cannot listen at port 0 of 198\.51\.100\.1 .*--host names an address"):
        engine_of(load_config(None, settings), "198.51.100.1", 0)


def test_the_engine_is_that_of_the_run(settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSPO_ENGINE_TOKEN", "known-to-both")
    # Where the run finds its engines is no matter of theirs.
    apart = [*settings, "precision.dtype=bf16", "parallel.ep=2"]
    server = engine_of(load_config(None, [*apart, "engine.gpus=[1]"]), "0.0.0.0", 0)
    assert (server.settings.dtype, server.settings.max_length, server.settings.gpus) == ("bfloat16", 16, (1,))
    assert server.token == "known-to-both"
    assert (server.settings.folder / "config.json").exists()
    server._address = None
    again = engine_of(load_config(None, [*settings, "engine.addresses=[http://node7:1]"]), "localhost", server.port)
    assert again.port == server.port
    again.start()
    assert reached_at(again) == f"http://localhost:{server.port}"
    again.end()


def test_what_cannot_be_served_has_a_status(
    settings: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    config = Path(settings[-2].removeprefix("run.dir=")).with_name("run.yaml")
    config.write_text("{}")
    try:
        assert serve(["--config", str(config), *settings, "--port", "70000"]) == 2
        assert "--port 70000 is no port" in capsys.readouterr().err
        monkeypatch.delenv("GSPO_ENGINE_TOKEN", raising=False)
        assert serve(["--config", str(config), *settings, "--host", "198.51.100.1"]) == 2
        assert "everyone who reaches it could use the engine" in capsys.readouterr().err
        broken = config.with_name("broken")
        broken.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'vllm'\"\nexit 1\n")
        broken.chmod(0o755)
        assert serve(["--config", str(config), *settings, f"engine.python={broken}"]) == 2
        assert "No module named 'vllm'" in capsys.readouterr().err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that end with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_the_command_ends_with_its_server_however_it_ends(
    settings: tuple[str, ...], tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GSPO_ENGINE_TOKEN": "known-to-both"}
    for name in ("ended", "killed"):
        command = [sys.executable, "-m", "gspo_megatron.serve", "--config", str(tmp_path / "run.yaml"), *settings]
        place = [f"run.dir={tmp_path / name}"]
        started.append(subprocess.Popen([*command, *place], env=environment, stdout=subprocess.PIPE, text=True))
    for process, name, number in zip(started, ("ended", "killed"), (signal.SIGTERM, signal.SIGKILL), strict=True):
        assert process.stdout is not None
        assert process.stdout.readline().startswith("vLLM starts; its log is ")
        assert process.stdout.readline().startswith("ready: engine.addresses=[http://127.0.0.1:")
        [log] = (tmp_path / name).glob("engine/*/engine.log")
        pid, token, *words = log.read_text().split()
        # What a batch system sends for runs to save.
        process.send_signal(signal.SIGUSR1)
        os.kill(int(pid), signal.SIGUSR1)
        assert token == "known-to-both" and token not in " ".join(words)
        time.sleep(0.3)
        assert process.poll() is None and Path(f"/proc/{pid}").exists()
        process.send_signal(number)
        assert process.wait(60 * time_factor()) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "the server ends")  # type: ignore[misc]
        assert "known-to-both" not in "".join(path.read_text() for path in (tmp_path / name).rglob("*.json"))


def test_nothing_of_megatron_is_imported() -> None:
    code = (
        "import gspo_megatron.serve, sys; print([m for m in ('megatron', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
