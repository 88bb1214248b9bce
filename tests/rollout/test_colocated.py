"""Engines in the run's own processes: who samples what, and what is refused. tests/engine has the real vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError, EngineError, WrongWeights
from gspo_megatron.build.colocated import open_colocated
from gspo_megatron.config.loading import load_config
from gspo_megatron.rollout.colocated import ColocatedEngine, EngineRanks


class World:
    """`WorldRanks` of one process among others, which say `others`."""

    def __init__(self, *others: Any) -> None:
        self.others, self.is_main = others, True

    def from_all(self, mine: Any) -> list[Any]:
        return [mine, *self.others]

    def any_rank(self, flag: bool) -> bool:
        return flag


@pytest.mark.parametrize(("world_size", "per_engine"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6)])
def test_engines_share_the_rollouts_whatever_the_layout(world_size: int, per_engine: int) -> None:
    ranks = [EngineRanks(World(), rank, world_size, per_engine) for rank in range(world_size)]
    assert [r.dp_rank for r in ranks if r.is_reporter] == list(range(world_size // per_engine))
    assert {r.dp_size for r in ranks} == {world_size // per_engine}
    for rank, seen in enumerate(ranks):
        # The processes of an engine sample the same.
        assert seen.dp_rank == ranks[rank - rank % per_engine].dp_rank


def test_the_first_process_of_an_engine_reports() -> None:
    assert EngineRanks(World([3], []), 0, 4, 2).gather([1, 2]) == [1, 2, 3]
    assert EngineRanks(World([3]), 1, 4, 2).gather([1, 2]) == [3]


class Failing:
    """vLLM's engine, as far as `load` asks it."""

    def __init__(self, after: int) -> None:
        self.after = after

    def collective_rpc(self, method: str, args: tuple[Iterator[tuple[str, Tensor]]]) -> None:
        assert method == "gspo_take"
        for number, _ in enumerate(args[0]):
            if number == self.after:
                raise RuntimeError("no such parameter")

    def reset_prefix_cache(self) -> None:
        pass


def engine(vllm: Any, *others: str) -> ColocatedEngine:
    made = ColocatedEngine.__new__(ColocatedEngine)
    made._engine, made.ranks, made._asleep = vllm, World(*others), False  # type: ignore[assignment]
    return made


def tensors(told: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in ("a", "b", "c"):
        told.append(name)
        yield name, torch.ones(1)


def test_a_rank_whose_engine_fails_stays_in_the_exchange_and_all_fail() -> None:
    told: list[str] = []
    with pytest.raises(EngineError, match="the engine in process 0: RuntimeError: no such parameter"):
        engine(Failing(after=0), "").load(4, tensors(told))
    assert told == ["a", "b", "c"]
    with pytest.raises(EngineError, match="the engine in process 1: out of memory"):
        engine(Failing(after=9), "out of memory").load(4, tensors([]))
    with pytest.raises(WrongWeights, match="the engine in process 1: a gap"):
        engine(Failing(after=9), "a gap").raise_first("", WrongWeights)


def opened(monkeypatch: pytest.MonkeyPatch, *settings: str, installed: bool = True, on_cpu: bool = True) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    config = load_config(None, ["rollout.engine=vllm_colocated", *settings])
    device: Any = SimpleNamespace(on_cpu=on_cpu, world_size=4, rank=0)
    inputs: Any = SimpleNamespace(config=config, tokenizer=None)
    nothing: Any = None
    with open_colocated(inputs, nothing, World(), nothing, device, nothing, lambda: False):
        raise AssertionError("refused before")


def test_what_cannot_be_colocated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="a process of the run has no vLLM; install it"):
        opened(monkeypatch, installed=False)
    with pytest.raises(ConfigError, match=r"engine\.cache_gib=0 .* on GPUs, which the trainer shares"):
        opened(monkeypatch, on_cpu=False)
