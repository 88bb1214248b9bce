"""What `open_trainer` decides for all ranks of a run."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.inputs import settle
from gspo_megatron.build.trainer import check_same_settings, device_of, open_trainer
from gspo_megatron.config.loading import load_config, replaced
from gspo_megatron.log_probs import backends
from gspo_megatron.monitor.console import Console
from gspo_megatron.testing.commands import forked
from gspo_megatron.testing.local_ranks import run_distributed

SMALL = ("precision.device=cpu", "precision.dtype=fp32", "data.eval_size=1", "logging.tensorboard=false")


class Heard(Console):
    """Keeps what the main process would print."""

    def __init__(self, on: bool) -> None:
        super().__init__(on=False)
        self.is_on, self.warnings = on, list[str]()

    def warn(self, text: str) -> None:
        if self.is_on:
            self.warnings.append(text)


def opened(directory: str) -> tuple[list[str], str, str]:
    """The warnings printed on this rank of a run whose kernels fall back, the backend of its policy, and what it says
    to settings that differ on rank 1. Every rank is a vocabulary group of its own."""
    asked = []

    def agree(backend: str, *where: object) -> backends.Choice:
        asked.append(backend)
        return backends.Choice("torch", "Triton cannot run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "agree", agree)
        config = load_config(None, [*SMALL, f"run.dir={directory}"])
        device = device_of(config)
        console = Heard(device.rank == 0)
        with open_trainer(settle(config, device.world_size), device, console) as trainer:
            assert asked == ["auto"]
            with pytest.raises(ConfigError) as refused:
                check_same_settings(replaced(config, {"train.steps": 5 + device.rank}))
            closed = list[int]()
            trainer.parts.source.close = lambda: closed.append(1)  # type: ignore[method-assign]
        assert closed
        return console.warnings, trainer.policy.scoring.backend, str(refused.value)


def test_the_ranks_of_a_run_agree_on_kernels_and_settings(tmp_path: Path) -> None:
    results = run_distributed(opened, 2, str(tmp_path), timeout_s=120, like_torchrun=True)
    assert [said for said, *_ in results] == [["Triton cannot run"], []]
    for _, backend, refusal in results:
        assert backend == "torch"
        assert refusal.startswith("rank 1 has other settings than rank 0: train.steps=6, not 5; give every process")


def test_a_service_that_does_not_answer_ends_every_rank_before_the_warm_start(tmp_path: Path) -> None:
    """Only the last of two pipeline stages would ask it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    reward = ("reward.functions={}", f"reward.terms=[{{function: remote, url: '{url}', retries: 0}}]")
    stages = ("parallel.pp=2", "model.num_layers=2")
    for status, said in forked(2, (*SMALL, *reward, *stages, f"run.dir={tmp_path}", "train.warm_start_steps=9")):
        assert status == 2 and f"reward 'remote': {url}: ConnectError" in said and "correct url" in said
    assert not (tmp_path / "metrics.jsonl").exists() and not list(tmp_path.glob("checkpoints/*"))
