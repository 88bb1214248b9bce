"""Rollouts from a real vLLM server: those of the product's own sampler, exact after a cut and after a resume.

transformers, which shares no code with this package or with vLLM, says what the log-probs are.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout import weight_channels
from gspo_megatron.rollout.engine import Piece, Request, Span, Weights
from gspo_megatron.rollout.engine_draws import DrawByCounter
from gspo_megatron.rollout.engine_server import EngineServer, ServerSettings
from gspo_megatron.rollout.native.sampling import Decoding, distribution, draw, uniforms
from gspo_megatron.rollout.probe import Probe
from gspo_megatron.rollout.vllm import VllmEngine
from gspo_megatron.rollout.weight_channels import SHARED, Broadcast, Channel, Disk, SharedMemory
from gspo_megatron.rollout.weight_sync import send_weights
from gspo_megatron.testing.commands import forked, metrics, rollouts
from gspo_megatron.testing.time_limits import time_factor

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-engine", allow_module_level=True)
pytestmark = pytest.mark.skipif(
    "avx2" not in Path("/proc/cpuinfo").read_text(),
    reason="vLLM's wheel for CPUs needs AVX2, which this processor lacks",
)

ROOT = Path(__file__).parents[2]
STEPS, NUM_IDS, EOS = 3, 13, 1
SETTINGS = (
    *("--config", str(ROOT / "examples" / "cpu_tiny_vllm.yaml"), "engine.python=null", "logging.tensorboard=false"),
    *(f"train.steps={STEPS}", "train.warm_start_steps=60", "train.eval_every=0", "data.eval_size=4"),
    *("rollout.prompts_per_step=8", "logging.rollouts_per_step=-1", "checkpoint.save_every=1", "checkpoint.keep=5"),
    *("train.hf_at_end=on", "train.hf_dtype=fp32"),
)
OWN = ("rollout.engine=collective",)


def trained(directory: Path, *settings: str) -> Path:
    arguments = [*SETTINGS, f"run.dir={directory}", *settings]
    for status, errors in forked(2, arguments, timeout_s=600):
        logs = [path.read_text()[-3000:] for path in (directory / "engine").glob("*.log")]
        assert status == 0, errors + "".join(logs)
    return directory


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("served") / "run")


def weights_in(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / f"step_{STEPS:06d}" / "model.safetensors")


def test_a_run_has_the_rollouts_of_the_own_sampler(served: Path, tmp_path: Path) -> None:
    own = trained(tmp_path / "run", *OWN)
    for of_engine, of_sampler in zip(rollouts(served), rollouts(own), strict=True):
        assert len(of_engine) == 64
        assert [r["tokens"] for r in of_engine] == [r["tokens"] for r in of_sampler]
        assert [r["reward"] for r in of_engine] == [r["reward"] for r in of_sampler]
    rows = metrics(served)[1:]
    assert len(rows) == STEPS
    for row, of_own in zip(rows, metrics(own)[1:], strict=True):
        # The same tokens, and old log-probs that the trainer computes.
        assert (row["loss"], row["grad_norm"]) == (of_own["loss"], of_own["grad_norm"])
        assert row["grad_norm"] > 0
        assert abs(row["sampler/kl"]) < 1e-5
        assert 0 < row["engine/probe_gap"] < 1e-5
    for name, tensor in weights_in(own).items():
        assert torch.equal(weights_in(served)[name], tensor), name


def test_a_run_continues_to_the_same_bits(served: Path, tmp_path: Path) -> None:
    checkpoint = served / "checkpoints" / "step_000001"
    continued = trained(tmp_path / "run", f"checkpoint.load={checkpoint}")
    assert rollouts(continued) == rollouts(served)[1:]
    assert [{**row, "engine/probe_gap": 0} for row in metrics(continued)] == [
        {**row, "engine/probe_gap": 0} for row in metrics(served)[2:]
    ]
    for name, tensor in weights_in(served).items():
        assert torch.equal(weights_in(continued)[name], tensor), name


@pytest.fixture(scope="module")
def server(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    settings = ServerSettings(sys.executable, served / "engine" / "model", "float32", max_length=24, max_batch=32)
    server = EngineServer("engine 0", settings, tmp_path_factory.mktemp("server") / "engine.log")
    server.start()
    server.wait()
    engine = engine_of(server)
    engine.pause("wait")
    tensors = weights_in(served)
    send_weights([server.address.url], Weights(7, iter(tensors.items())), SharedMemory("t"), token=server.token)
    engine.resume()
    yield server
    server.end()


def engine_of(server: EngineServer, **changed: Any) -> VllmEngine:
    settings: dict[str, Any] = {
        "draw": DrawByCounter(NUM_IDS, NUM_IDS),
        "temperature": 0.8,
        "timeout_s": 60 * time_factor(),
        "stream_interval": 16,
    }
    engine = VllmEngine(server.address, **settings | changed)
    engine.version()  # as before every resume: what is streamed then has a version
    return engine


def request(number: int, **changed: Any) -> Request:
    length = 1 + number % 9
    prompt = tuple(2 + (number * 7 + i * i) % (NUM_IDS - 2) for i in range(length))
    return replace(Request(number, prompt, (), 3, 0.8, 1.0, 0, 12, (EOS,)), **changed)


def sampled(pieces: Iterator[Piece]) -> dict[int, tuple[list[int], list[float], str]]:
    """Tokens, log-probs and finish by id."""
    found: dict[int, tuple[list[int], list[float], str]] = {}
    for piece in pieces:
        tokens, log_probs, _ = found.get(piece.id, ([], [], ""))
        found[piece.id] = [*tokens, *piece.tokens], [*log_probs, *piece.log_probs], piece.finish
    return found


@pytest.fixture(scope="module")
def model(served: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(served / "hf" / f"step_{STEPS:06d}", dtype=torch.float32)


WAYS = (
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 6},
    {"temperature": 0.0},
)


def test_tokens_are_drawn_from_the_distribution_that_comes_back(server: EngineServer, model: Any) -> None:
    """All ways in one batch."""
    asked = {i: request(i, **way) for i in range(40) for way in [WAYS[i % len(WAYS)]]}
    found = sampled(engine_of(server).generate(list(asked.values())))
    assert found.keys() == asked.keys()
    for number, (tokens, log_probs, finish) in found.items():
        r = asked[number]
        assert finish == ("stop" if tokens[-1] == EOS else "length")
        assert (EOS not in tokens[:-1]) and (finish == "stop" or len(tokens) == r.max_new_tokens)
        with torch.no_grad():
            logits_LV = model(torch.tensor([[*r.prompt, *tokens]])).logits[0, len(r.prompt) - 1 : -1]
        how = Decoding(r.temperature or 1.0, r.top_k, r.top_p, greedy=r.temperature == 0)
        log_probs_LV = distribution(logits_LV, how)
        positions = np.arange(len(tokens))
        u_L = torch.from_numpy(uniforms(r.seed, np.full(len(tokens), number), positions))
        tokens_L, expected_L = draw(log_probs_LV, u_L, how)
        assert tokens_L.tolist() == tokens, r
        torch.testing.assert_close(torch.tensor(log_probs).double(), expected_L, rtol=0, atol=1e-4)


def test_tokens_depend_neither_on_batch_nor_order_nor_cut(server: EngineServer) -> None:
    engine = engine_of(server, stream_interval=1)
    together = sampled(engine.generate([request(i) for i in range(30)]))
    order = list(range(30))
    random.Random(1).shuffle(order)
    assert sampled(engine.generate([request(i) for i in order]))[4] == together[4]
    assert sampled(engine.generate([request(4)])) == {4: together[4]}
    cuts = {i: len(tokens) // 2 for i, (tokens, _, _) in together.items() if len(tokens) > 1}
    rest = sampled(engine.generate([request(i, response=tuple(together[i][0][:cut])) for i, cut in cuts.items()]))
    for i, cut in cuts.items():
        tokens, log_probs, finish = together[i]
        assert rest[i] == (tokens[cut:], log_probs[cut:], finish)


def test_a_probe_scores_what_was_drawn(server: EngineServer) -> None:
    engine = engine_of(server)
    tokens, log_probs, _ = sampled(engine.generate([request(2)]))[2]
    prompt = request(2).prompt
    assert engine.probe([*prompt, *tokens], len(prompt)) == log_probs


def test_pieces_tell_their_version_across_pauses(server: EngineServer) -> None:
    engine = engine_of(server, stream_interval=1)
    assert engine.version() == 7
    long = [request(i, stop_ids=(), prompt=(3,), max_new_tokens=23) for i in range(8)]
    whole = sampled(engine.generate(long))
    pieces = engine.generate(long)
    begun = [next(pieces) for _ in range(12)]
    engine.pause("keep")
    engine.resume()
    assert sampled(iter([*begun, *pieces])) == whole
    pieces = engine.generate(long)
    begun = [next(pieces) for _ in range(12)]
    engine.pause("abort")
    engine.resume()
    ended = [*begun, *pieces]
    cut = sampled(iter(ended))
    assert {finish for _, _, finish in cut.values()} <= {"abort", "length"}
    assert all(tokens == whole[i][0][: len(tokens)] for i, (tokens, _, _) in cut.items())
    for i in cut:
        spans = [span for piece in ended if piece.id == i for span in piece.versions]
        assert {span.version for span in spans} <= {7}
        assert sum(span.end - span.begin for span in spans) == len(cut[i][0])
    assert Span(7, 0, 1) in {span for piece in ended for span in piece.versions}


def test_what_the_engine_refuses_is_said(server: EngineServer) -> None:
    with pytest.raises(EngineError, match=r"engine 0 .* failed while it sampled: .*24"):
        list(engine_of(server).generate([request(0, prompt=(3,) * 30, max_new_tokens=12)]))
    with pytest.raises(EngineError, match="status 401"):
        stranger = engine_of(server)
        stranger.address = replace(server.address, token="guessed")
        list(stranger.generate([request(0)]))
    assert engine_of(server).alive()


CHANNELS: dict[str, Callable[[Path], Channel]] = {
    "broadcast": lambda folder: Broadcast("127.0.0.1", bucket_bytes=20_000, timeout_s=60 * time_factor()),
    "shared_memory": lambda folder: SharedMemory("channels", bucket_bytes=20_000),
    "disk": lambda folder: Disk(folder, bucket_bytes=20_000),
}


def test_every_channel_brings_the_weights(server: EngineServer, served: Path, model: Any, tmp_path: Path) -> None:
    """Other ones and those of before, twice: through memory, groups and layers that exist already, too."""
    assert CHANNELS.keys() == weight_channels.CHANNELS.keys()
    engine, probe = engine_of(server, temperature=1.0), Probe.of_vocabulary(NUM_IDS, 20)
    of_run = weights_in(served)
    others = {name: 0.75 * tensor for name, tensor in of_run.items()}
    other_model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter *= 0.75
    expected = [scored(each, probe.tokens) for each in (other_model, model)]
    assert probe.complaint(*expected)
    version, best, slower = 100, {}, 1.0
    for name, open_channel in CHANNELS.items():
        channel, seconds = open_channel(tmp_path / name), []
        for tensors, log_probs in 2 * [*zip((others, of_run), expected, strict=True)]:
            engine.pause("keep")
            slower = max(slower, time_factor())
            started = time.monotonic()
            content = Weights(version := version + 1, iter(tensors.items()))
            send_weights([server.address.url], content, channel, token=server.token)
            seconds.append(time.monotonic() - started)
            engine.resume()
            assert engine.version() == version
            probe.check(engine, log_probs)
        channel.close()
        best[name] = min(seconds)  # the others tell what else this machine was doing: the engine steps back for it
    assert max(best.values()) < 0.5 * slower
    assert not list(SHARED.glob("gspo_megatron.channels.*"))


def scored(model: Any, tokens: Sequence[int]) -> list[float]:
    """Log-probs of all but the first."""
    with torch.no_grad():
        log_probs_LV = torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1, :NUM_IDS], -1)
    return log_probs_LV.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def test_a_server_that_is_killed_leaves_nothing(server: EngineServer, tmp_path: Path) -> None:
    """The last test of this server."""
    engine = engine_of(server, stream_interval=1)
    ours = processes_with(server.token)
    workers = [pid for pid, command in ours.items() if "spawn_main" in command]
    assert workers
    shared = {path for pid in ours for path in shared_by(pid)}
    assert shared
    pieces = engine.generate([request(i, stop_ids=(), prompt=(3,), max_new_tokens=23) for i in range(32)])
    kept = [next(pieces) for _ in range(5)]
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(EngineError, match="engine 0 "):
        kept += pieces
    assert len(kept) >= 5
    assert not engine.alive()
    until = time.monotonic() + 60 * time_factor()
    while (left := processes_with(server.token)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
    server.end()
    assert not [path for path in shared if path.exists()]


def processes_with(token: str) -> dict[int, str]:
    """Commands of those that have the server's token in their environment."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        # Another process may end at any moment. A dead one has no environment.
        with contextlib.suppress(OSError):
            if token.encode() in (directory / "environ").read_bytes():
                found[int(directory.name)] = (directory / "cmdline").read_text()
    return found


def shared_by(pid: int) -> set[Path]:
    """Files in /dev/shm that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split()[-1]) for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}
