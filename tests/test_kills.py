"""kill -9 and other signals at every kind of moment: the run continues as if nothing had happened.

A rank kills itself where its attempt specifies: at the n-th call of a function, so that every phase of a step and of a
save is covered, or after some time, wherever it is then. Every attempt is the real command on two processes; the next
one continues from the run directory that it leaves behind.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gspo_megatron.mcore.sampler
import gspo_megatron.mcore.saving  # noqa: F401  (both for the forked ranks)
from gspo_megatron.run.stop import STOPPED
from gspo_megatron.testing.commands import forked, metrics, rollouts
from gspo_megatron.testing.local_ranks import RankError, run_distributed
from gspo_megatron.testing.time_limits import time_factor
from gspo_megatron.train import main

CONFIG = """
run: {seed: 3}
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 4, num_query_groups: 2, head_dim: 8, num_experts: 4,
        expert_ffn_size: 16, max_sequence_length: 16, init_std: 0.2}
parallel: {ep: 2}
precision: {device: cpu}
data: {train: "task:sort_digits", eval: "task:sort_digits", task: {min_length: 1, max_length: 4}, eval_size: 6,
       tokenizer: "characters:0123456789>"}
rollout: {prompts_per_step: 4, group_size: 4, max_new_tokens: 4, top_p: 0.95}
algorithm: {clip_low: 1.0e-2, clip_high: 1.2e-2, kl_coef: 0.05, updates_per_rollout: 2, routing_replay: R2,
            sampling_mask: true}
optimizer: {lr: 3.0e-3, lr_decay: cosine}
train: {steps: 4, warm_start_steps: 25, warm_start_batch: 16, warm_start_lr: 1.0e-2, eval_every: 2,
        tokens_per_micro_batch: 48}
checkpoint: {save_every: 1}
logging: {tensorboard: false, rollouts_per_step: -1}
"""


class Kill(NamedTuple):
    """Who gets the signal, and where: at the n-th call of `function` ("module:name"), or `after_s` seconds into the
    command."""

    ranks: tuple[int, ...]
    function: str = ""
    call: int = 0
    after_s: float = 0.0
    number: int = int(signal.SIGKILL)


def attempt(arguments: list[str], kill: Kill | None) -> int:
    """The command on this rank, which may not live to see its end."""
    if kill and int(os.environ["RANK"]) in kill.ranks:
        if kill.function:
            _signal_in(kill)
        else:
            threading.Timer(kill.after_s, os.kill, (os.getpid(), kill.number)).start()
    return main(arguments)


def _signal_in(kill: Kill) -> None:
    module, _, path = kill.function.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for attribute in owners:
        owner = getattr(owner, attribute)
    own: Callable[..., Any] = getattr(owner, name)
    calls = itertools.count(1)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == kill.call:
            os.kill(os.getpid(), kill.number)
            time.sleep(0.5 * time_factor())  # for the thread that hears of it
        return own(*args, **kwargs)

    setattr(owner, name, watched)


def arguments_of(folder: Path, run: str, *settings: str) -> list[str]:
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    limit = f"parallel.timeout_s={20 * time_factor()}"
    return ["--config", str(config), f"run.dir={folder / run}", "checkpoint.load=latest", limit, *settings]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    for status, errors in forked(2, arguments_of(folder, "run")):
        assert status == 0, errors
    return folder / "run"


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Every row of metrics, every rollout with its log-probs, and the files of the last checkpoint: bit for bit."""
    assert metrics(run) == metrics(undisturbed)
    assert rollouts(run) == rollouts(undisturbed)
    last, expected = (weights(path / "checkpoints" / "step_000004") for path in (run, undisturbed))
    assert last == expected and len(last) > 0


def weights(checkpoint: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(checkpoint)): path.read_bytes()
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "run.json")
    }


SAMPLER, POLICY = "gspo_megatron.mcore.sampler:MegatronSampler.", "gspo_megatron.mcore.policy:MegatronPolicy."
SAVING = "gspo_megatron.mcore.saving:"
DIRECTORY, MANIFEST = "gspo_megatron.checkpoint.directory:", "gspo_megatron.checkpoint.manifest:"
WRITER = "gspo_megatron.monitor.run_directory:RunWriter."
BOTH = (0, 1)
CHAINS = {
    # Every list is one run, killed and continued until nobody kills it any more. Calls are counted from the start of an
    # attempt: in the first ones 25 updates of the warm start come ahead, in the others the step after the checkpoint.
    "in the rollout": [
        Kill(BOTH, SAMPLER + "_forward", 1),
        Kill((1,), SAMPLER + "_forward", 3),
        Kill((0,), SAMPLER + "_forward", 5),
        Kill(BOTH, SAMPLER + "_forward", 4),
        Kill((1,), SAMPLER + "generate", 3),
    ],
    "in the update": [
        Kill((0,), POLICY + "update", 10),
        Kill(BOTH, POLICY + "update", 27),
        Kill((1,), "gspo_megatron.mcore.schedule:train", 28),
        Kill((0,), "gspo_megatron.mcore.schedule:log_probs", 2),
        Kill(BOTH, POLICY + "update", 2),
        Kill((0,), WRITER + "metrics", 1),
        Kill((1,), POLICY + "update", 3),
    ],
    "in the save": [
        Kill(BOTH, SAVING + "write_shards", 1),
        Kill((0,), DIRECTORY + "CheckpointDirectory.begin", 1),
        Kill((1,), SAVING + "write_shards", 2),
        Kill((0,), DIRECTORY + "seal", 1),
        Kill((0,), MANIFEST + "sync", 5),
        Kill((0,), DIRECTORY + "write_synced", 1),
        Kill((0,), DIRECTORY + "CheckpointDirectory._retire", 1),
        Kill((0,), DIRECTORY + "sync", 3),
    ],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_that_is_killed_continues_to_the_last_bit(chain: str, tmp_path: Path, undisturbed: Path) -> None:
    for kill in CHAINS[chain]:
        with pytest.raises(RankError, match="died without a word"):
            run_distributed(attempt, 2, arguments_of(tmp_path, "run"), kill, like_torchrun=True)
    finish(tmp_path)
    assert_same_run(tmp_path / "run", undisturbed)


TALKING = (
    "rollout.environment=tests.support.host:host",
    "rollout.max_new_tokens=9",
    "train.warm_start_steps=3",
    "reward.workers=1",
    "algorithm.routing_replay=R3",
)


def test_a_run_of_conversations_continues_to_the_last_bit(tmp_path: Path) -> None:
    """Killed while it samples, while it samples a second turn, and in an update; stopped between two updates. What the
    sampler's routers chose is part of it."""
    for status, errors in forked(2, arguments_of(tmp_path, "undisturbed", *TALKING)):
        assert status == 0, errors
    lengths = [len(r["outside"]) for step in rollouts(tmp_path / "undisturbed") for r in step]
    assert min(lengths.count(turns) for turns in (0, 1, 2)) > 1
    conversation = "gspo_megatron.rollout.conversation:"
    for kill in (
        Kill(BOTH, SAMPLER + "_forward", 3),
        Kill((1,), conversation + "_sample_turn", 2),
        Kill((0,), POLICY + "update", 2),
    ):
        with pytest.raises(RankError, match="died without a word"):
            run_distributed(attempt, 2, arguments_of(tmp_path, "run", *TALKING), kill, like_torchrun=True)
    stop = Kill((1,), POLICY + "update", 4, number=signal.SIGUSR1)
    for kill, status in ((stop, STOPPED), (None, 0)):
        again = arguments_of(tmp_path, "run", *TALKING)
        assert run_distributed(attempt, 2, again, kill, like_torchrun=True) == [status] * 2
        assert status == 0 or (tmp_path / "run" / "checkpoints" / "latest").read_text().strip().endswith("_update_001")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_killed_at_random_moments(tmp_path: Path, undisturbed: Path) -> None:
    """A run that comes to its end before its time is compared, and the next kill is of a new one: how many runs eight
    kills take is the machine's affair."""
    draw, killed, runs = random.Random(7), 0, 1
    while killed < 8:
        kill = Kill(draw.choice([(0,), (1,), BOTH]), after_s=draw.uniform(0.3, 2.0))
        try:
            run_distributed(attempt, 2, arguments_of(tmp_path, f"run{runs}"), kill, like_torchrun=True)
        except RankError as error:
            assert "died without a word" in str(error)
            killed += 1
        else:
            assert_same_run(tmp_path / f"run{runs}", undisturbed)
            runs += 1
        assert runs < 30, "this machine ends every run before 0.3 to 2 s are over: draw from shorter times"
    finish(tmp_path, f"run{runs}")
    assert_same_run(tmp_path / f"run{runs}", undisturbed)


STOPS = [
    (Kill((1,), POLICY + "update", 10, number=signal.SIGTERM), "warm_start_000010"),
    (Kill((0,), SAMPLER + "_forward", 3, number=signal.SIGUSR1), "warm_start_000025"),
    (Kill(BOTH, SAMPLER + "_forward", 8, number=signal.SIGTERM), "step_000001"),
    (Kill((0,), POLICY + "update", 1, number=signal.SIGUSR1), "step_000001_update_001"),
    # The step's last update; the evaluation that follows it is given up.
    (Kill((1,), POLICY + "update", 1, number=signal.SIGTERM), "step_000001_update_002"),
    (Kill((1,), SAVING + "write_shards", 1, number=signal.SIGTERM), "step_000002"),
    (Kill(BOTH, "gspo_megatron.mcore.schedule:log_probs", 1, number=signal.SIGUSR1), "step_000002_update_001"),
]
"""Signals, and the checkpoint that is the newest when the command has ended."""


def test_a_run_that_is_asked_to_stop_saves_and_continues_to_the_last_bit(tmp_path: Path, undisturbed: Path) -> None:
    """Also where only one process is asked; in the warm start, a rollout, between two updates of a step, in a save."""
    for stop, saved in STOPS:
        statuses = run_distributed(attempt, 2, arguments_of(tmp_path, "run"), stop, like_torchrun=True)
        assert statuses == [STOPPED, STOPPED], stop
        assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == saved, stop
    finish(tmp_path)
    assert_same_run(tmp_path / "run", undisturbed)


def test_the_clock_stops_a_run(tmp_path: Path, undisturbed: Path) -> None:
    for _ in range(30):
        again = arguments_of(tmp_path, "run", f"checkpoint.exit_after_s={1.5 * time_factor()}")
        statuses = run_distributed(attempt, 2, again, None, like_torchrun=True)
        assert statuses in ([STOPPED, STOPPED], [0, 0])
        if statuses == [0, 0]:
            break
    assert_same_run(tmp_path / "run", undisturbed)


RESTARTED = """
import os, sys
import torch
sys.path[:0] = {paths}
torch.set_num_threads(1)
from tests.test_kills import Kill, attempt
where = {where}
sys.exit(attempt(sys.argv[1:], where[int(os.environ["TORCHELASTIC_RESTART_COUNT"])]))
"""


def test_torchrun_restarts_a_run(tmp_path: Path, undisturbed: Path) -> None:
    """--max-restarts: the processes are started anew with the command they had, checkpoint.load=none, and continue."""
    where = [Kill((0,), POLICY + "update", 28), Kill((1,), SAMPLER + "_forward", 4), None]
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED.format(paths=[str(Path(__file__).parents[1]), *sys.path], where=where))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    command = [*launcher, str(script), *arguments_of(tmp_path, "run"), "checkpoint.load=none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180 * time_factor())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "restarted by torchrun: continuing from the newest checkpoint" in done.stdout
    assert_same_run(tmp_path / "run", undisturbed)


def finish(folder: Path, run: str = "run") -> None:
    for status in run_distributed(attempt, 2, arguments_of(folder, run), None, like_torchrun=True):
        assert status == 0
