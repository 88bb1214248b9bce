"""What the settings of section engine become: a server's command, its environment, and how it is asked."""

from __future__ import annotations

import dataclasses
import inspect
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gspo_megatron.base.errors import EngineError, StopRequested, UnfitEngine
from gspo_megatron.build import engine_servers, engines
from gspo_megatron.build.engine_servers import channel_of, server_settings, servers_of
from gspo_megatron.checkpoint.export import FolderFiles
from gspo_megatron.config.engine import EngineConfig
from gspo_megatron.config.loading import load_config
from gspo_megatron.device import Device
from gspo_megatron.rollout import engine_server
from gspo_megatron.rollout.engine_server import EngineServer, ServerSettings
from gspo_megatron.rollout.external_engine import ExternalEngine
from gspo_megatron.rollout.http import Address
from gspo_megatron.rollout.weight_channels import Broadcast, Channel, Disk, SharedMemory
from gspo_megatron.testing.time_limits import time_factor

SETTINGS = (
    *("rollout.engine=vllm", "engine.python=/other/python", "engine.cache_gib=2", "engine.threads=3"),
    *("engine.tensor_parallel=2", "engine.arguments=['--seed', 7]", "engine.start_timeout_s=5"),
    *("rollout.max_batch=64", "model.max_sequence_length=48", "precision.dtype=bf16"),
)


def after(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_settings_reach_the_server() -> None:
    settings = server_settings(load_config(None, SETTINGS), Path("RUN/engine/model"))
    command = settings.command(8123)
    assert command[0] == "/other/python"
    assert command[-2:] == ["--seed", "7"]
    told = {"--model": "RUN/engine/model", "--dtype": "bfloat16", "--max-model-len": "48", "--max-num-seqs": "65"}
    told |= {"--tensor-parallel-size": "2", "--kv-cache-memory-bytes": str(2 << 30), "--port": "8123"}
    told |= {"--host": "127.0.0.1"}
    assert {name: after(command, name) for name in told} == told
    assert settings.environment("secret")["OMP_NUM_THREADS"] == "3"
    assert settings.start_timeout_s == 5
    # A GPU's memory is vLLM's to divide, and it has graphs.
    on_gpu = dataclasses.replace(settings, cache_gib=0).on((4, 5)).command(1)
    assert "--kv-cache-memory-bytes" not in on_gpu
    assert "--enforce-eager" not in on_gpu
    assert "--enforce-eager" in command


def test_an_engine_imports_this_package_and_none_of_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed, it stands beside the trainer's torch and all that the trainer has."""
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "gspo_megatron").symlink_to(Path(engine_server.__file__).parents[1])
    (site / "fastapi.py").write_text("raise ImportError('this is the fastapi of the trainer')")
    monkeypatch.setattr(engine_server, "__file__", str(site / "gspo_megatron" / "rollout" / "engine_server.py"))
    for _ in range(2):
        modules = engine_server.package_alone(tmp_path / "engine" / "modules")
        assert [entry.name for entry in modules.iterdir()] == ["gspo_megatron"]
    code = "import sys, importlib.util as u, gspo_megatron.rollout.lease; print(u.find_spec('fastapi'))"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(modules)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.stdout == "None\n", found.stderr


CPU = Device(torch.device("cpu"), "", torch.float32, 1, 0)
OTHER_DEVICE = dataclasses.replace(CPU, torch_device=torch.device("meta"))
HERE, APART = "http://127.0.0.1:8000", "http://node7:8000"
SIZES = ("model.max_sequence_length=48", "model.vocab_size=13", "engine.start_timeout_s=7")


def channel(device: Device, *overrides: str) -> Channel:
    return channel_of(
        load_config(None, ["rollout.engine=vllm", "run.dir=RUN/a", *overrides]), device, lambda line: None
    )


def test_weights_take_the_way_that_all_engines_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_servers, "own_address", lambda towards: f"seen from {towards}")
    monkeypatch.setattr(engine_servers, "is_loopback", lambda host: host == "127.0.0.1")
    for own in ((), (f"engine.addresses=[{HERE}]",)):
        assert isinstance(channel(CPU, *own), SharedMemory)
        of_gpus = channel(OTHER_DEVICE, *own)
        assert isinstance(of_gpus, Broadcast)
        assert (of_gpus.host, of_gpus.device.type) == ("seen from 127.0.0.1", "meta")
    both = f"engine.addresses=[{HERE}, {APART}]"
    apart = channel(CPU, both)
    assert isinstance(apart, Broadcast) and apart.host == "seen from node7"
    assert isinstance(channel(CPU, "engine.channel=broadcast"), Broadcast)
    assert isinstance(channel(CPU, both, "engine.channel=shared_memory"), SharedMemory)
    by_disk = channel(CPU, both, "engine.channel=disk")
    assert isinstance(by_disk, Disk) and by_disk.directory == Path("RUN/a/engine/weights")


def test_a_machine_that_no_network_leads_to_is_named() -> None:
    with pytest.raises(EngineError, match=r"no network leads .* the engine at no-such.invalid .*engine\.addresses"):
        channel(CPU, "engine.addresses=[http://no-such.invalid:1]")


def test_engines_apart_get_the_token_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GSPO_ENGINE_TOKEN", "known to both")
    settings = ["rollout.engine=vllm", f"run.dir={tmp_path}", f"engine.addresses=[{HERE}, {APART}]", *SIZES]
    servers = servers_of(load_config(None, settings), FolderFiles({}, {}), CPU, print)
    assert list(servers) == ["engine 0", "engine 1"]
    first, second = servers.values()
    assert isinstance(first, ExternalEngine) and isinstance(second, ExternalEngine)
    assert (second.address.url, second.address.token) == (APART, "known to both")
    assert (second.max_length, second.vocab_size, second.start_timeout_s) == (48, 13, 7)
    assert second.same_device == "cpu"
    by_disk = servers_of(load_config(None, [*settings, "engine.channel=disk"]), FolderFiles({}, {}), CPU, print)
    assert [each.same_device for each in by_disk.values() if isinstance(each, ExternalEngine)] == ["", ""]
    assert not list(tmp_path.iterdir())


def test_every_setting_of_the_section_is_used() -> None:
    source = inspect.getsource(engines) + inspect.getsource(engine_servers)
    unused = [f.name for f in dataclasses.fields(EngineConfig) if f"e.{f.name}" not in source.replace("engine.", "e.")]
    assert not unused


def test_a_server_that_cannot_start_says_what_its_log_says(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho starting\necho \"ModuleNotFoundError: No module named 'vllm'\"\nexit 3\n")
    python.chmod(0o755)
    settings = ServerSettings(str(python), tmp_path, "float32", 24, 8, start_timeout_s=60 * time_factor())
    server = EngineServer("engine 0", settings, tmp_path / "engine.log")
    server.start()
    with pytest.raises(
        UnfitEngine, match=r"(?s)engine 0 ended with status 3 .*; install vLLM .*No module named 'vllm'"
    ):
        server.wait()
    python.write_text('#!/bin/sh\necho "ValueError: no such model"\nexit 3\n')
    server.start()
    with pytest.raises(EngineError, match=r"(?s)engine 0 ended with status 3 .*no such model") as caught:
        server.wait()
    assert not isinstance(caught.value, UnfitEngine)
    python.write_text("#!/bin/sh\necho waiting\nsleep 1000\n")
    server.settings = dataclasses.replace(settings, start_timeout_s=0.5)
    server.start()
    with pytest.raises(EngineError, match=r"was not ready after 0.5 s \(engine.start_timeout_s\)"):
        server.wait()
    server.start()
    server.wait(lambda: True)
    server.end()


class Other(BaseHTTPRequestHandler):
    """Another run's engine: it is well, and wants another token."""

    def do_GET(self) -> None:
        known = self.path == "/health" or self.headers["Authorization"] == "Bearer another"
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def sleeping(tmp_path: Path, seconds: float, **how: float) -> ServerSettings:
    """Of a server that ends after so long with status 3, and never answers."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep {seconds}\nexit 3\n")
    python.chmod(0o755)
    return ServerSettings(str(python), tmp_path, "float32", 24, 8, **{"start_timeout_s": 60 * time_factor(), **how})


def test_another_runs_engine_at_the_same_port_is_not_taken(tmp_path: Path) -> None:
    """Both found the port free, and one was faster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = EngineServer("engine 0", sleeping(tmp_path, 1), tmp_path / "log", port)
    server.start()
    other = ThreadingHTTPServer(("127.0.0.1", port), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    with pytest.raises(EngineError, match="engine 0 ended with status 3 while it started"):
        server.wait()
    # And if it had this run's token, the own program would still have to run.
    server.token = "another"
    server.start = lambda: None  # type: ignore[method-assign]
    server._address = Address("engine 0", "127.0.0.1", port, "another")
    with pytest.raises(EngineError, match="engine 0 ended with status 3"):
        server.wait()
    other.shutdown()
    other.server_close()


def test_the_end_of_a_server_ends_the_waiting_for_it(tmp_path: Path) -> None:
    server = EngineServer("engine 0", sleeping(tmp_path, 1000), tmp_path / "log")
    server.start()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(server.wait)
        time.sleep(0.3)
        server.end()
        with pytest.raises(EngineError, match="engine 0 ended with status"):
            waiting.result(20 * time_factor())


def engines_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> engines.VllmEngines:
    monkeypatch.setattr(engine_servers, "server_settings", lambda config, folder: sleeping(tmp_path, 1000))
    config = load_config(
        None, ["rollout.engine=vllm", "model.vocab_size=9", f"engine.count={count}", f"run.dir={tmp_path}"]
    )
    inputs = SimpleNamespace(config=config, tokenizer=SimpleNamespace(vocab_size=9))
    on_cpu = SimpleNamespace(on_cpu=True)
    return engines.VllmEngines(inputs, FolderFiles({}, {}), on_cpu, print)  # type: ignore[arg-type]


def test_a_run_that_is_to_stop_does_not_wait_for_its_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rank was told so."""
    opened = engines_of(tmp_path, monkeypatch, 2)
    opened.start(lambda: False)
    began = time.monotonic()
    with pytest.raises(StopRequested):
        opened.ready(lambda engine: "", lambda: time.monotonic() - began > 0.3)
    opened.close()
    with pytest.raises(EngineError, match="engine 0 is not started again: the run ends"):
        opened._start_again(SimpleNamespace(name="engine 0"))
    assert all(server._program is None for server in opened.servers.values())


def test_engines_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = engines_of(tmp_path, monkeypatch, 4)
    meeting = threading.Barrier(4, timeout=10 * time_factor())
    for server in opened.servers.values():
        server.end = meeting.wait  # type: ignore[assignment, method-assign]
    opened.close()


def test_a_python_that_is_none_is_said(tmp_path: Path) -> None:
    settings = ServerSettings(str(tmp_path / "python"), tmp_path, "float32", 24, 8)
    with pytest.raises(
        UnfitEngine, match=r"engine.python=.*/python is no program on this machine; name the Python that"
    ):
        EngineServer("engine 0", settings, tmp_path / "engine.log").start()


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = ServerSettings("python", tmp_path, "float32", 24, 8)
        with pytest.raises(EngineError, match=rf"port {port} of 127.0.0.1 is in use; set engine.port"):
            EngineServer("engine 0", settings, tmp_path / "log", port).start()


def test_an_address_of_another_machine_is_said(tmp_path: Path) -> None:
    settings = ServerSettings("python", tmp_path, "float32", 24, 8, host="198.51.100.1")
    with pytest.raises(EngineError, match=r"cannot listen at 198\.51\.100\.1 .*; name an address of this machine"):
        EngineServer("engine 0", settings, tmp_path / "log").start()
