"""A new kind of per-token data is one line: it is packed on every layout, saved, resumed and guarded.

Every value encodes its sequence and position, so that a misplaced one is noticed.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import COLUMNS, Column, Prompt, Rollout, RolloutGroup, Sequence
from gspo_megatron.base.errors import CheckpointError, GuardError
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.tensors import read_tensors, write_tensors
from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.run.guards import Guards
from gspo_megatron.run.stages import Packer
from gspo_megatron.run.step_state import StepState
from gspo_megatron.testing.fakes import OneRank
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.small import SMALL

LAYOUTS = {
    "one process": (1, ()),
    "dp2": (2, ()),
    "tp2": (2, ("parallel.tp=2",)),
    "cp2": (2, ("parallel.cp=2",)),
    "pp2 cp2": (4, ("parallel.pp=2", "parallel.cp=2")),
    "tp2 cp2": (4, ("parallel.tp=2", "parallel.cp=2")),
}
GROUP = 2
UPDATES = 2


def add_columns() -> None:
    """The one line that each new kind of data takes."""
    COLUMNS["quality"] = Column("quality", "quality")
    COLUMNS["experts"] = Column("experts", "expert", dtype=torch.int64, shape=(3,), every_token=True, fill=-1)


def quality(number: int, position: Tensor) -> Tensor:
    return (1000 * number + position).double()


def experts(number: int, position: Tensor) -> Tensor:
    return torch.stack([torch.full_like(position, number), position, 7 * position], dim=1)


def support(number: int, position: Tensor) -> Ragged:
    """The column of this name: up to three numbers a token."""
    return Ragged.of([[number, p, 7 * p][: (number + p) % 4] for p in position.tolist()])


def make_step() -> StepState:
    """16 rollouts in groups of 2, their sequences with up to four trained spans, one of them with none."""
    draw, groups = random.Random(5), []
    sequences = []
    for number in range(16):
        length = draw.randint(3, 14)
        trained = torch.tensor([False, *(draw.random() < 0.6 for _ in range(length - 1))]) & (number != 3)
        position = torch.arange(length)
        tokens = torch.tensor([draw.randrange(2, 13) for _ in range(length)])
        columns = {
            "quality": quality(number, position[trained]),
            "support": support(number, position[trained]),
            "experts": experts(number, position),
        }
        sequences.append(Sequence(tokens, trained, draw.gauss(0, 1), columns))
        if number % GROUP == 0:
            groups.append(RolloutGroup(Prompt(number, f"prompt {number}", (1,), "answer"), []))
        outside = [(i, i + 1) for i in range(length - 1) if not trained[i + 1]]
        log_probs = [-draw.random() for _ in tokens[trained]]
        groups[-1].rollouts.append(
            Rollout(number, groups[-1].prompt, tokens[1:].tolist(), log_probs, False, 4, f"text {number}", 0.5)
        )
        groups[-1].rollouts[-1].outside = outside
    return StepState(7, groups, sequences)


def pack(world_size: int, settings: tuple[str, ...], step: StepState) -> tuple[Groups, Any]:
    config = load_config(None, [*SMALL, "model.max_sequence_length=32", *settings])
    groups = Groups(check_config(config, world_size), open_device("cpu", "fp32").torch_device)
    packer = Packer(groups, 0, 48, packing_rules(config), float, GROUP, UPDATES, seed=3)
    packer.pack(step, drop_zero_advantage=False)
    return groups, config


def packed_and_saved(world_size: int, settings: tuple[str, ...]) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """Looks at this rank's micro-batches; returns the values of trained tokens seen, and its snapshot."""
    add_columns()
    step = make_step()
    ranks, _ = pack(world_size, settings, step)
    seen = 0
    for mini_batch, batch in zip(step.mini_batches, step.batches, strict=True):
        for m in batch.micro_batches:
            number_S = torch.tensor([mini_batch[i] for i in m.index], dtype=torch.int64)
            number_R, position_R = number_S[m.sequence_R], m.positions_T[m.rows_R] + 1
            assert torch.equal(m.columns["quality"], 1000.0 * number_R + position_R)
            for i, kept in enumerate(m.columns["support"].each() if m.index else ()):
                assert kept.tolist() == support(int(number_R[i]), position_R[i : i + 1]).tolist()
            assert m.columns["experts"].shape == (len(m.tokens_T), 3)
            known = m.columns["experts"][:, 1] >= 0
            assert torch.equal(m.columns["experts"][known, 1], m.positions_T[known])
            assert (m.columns["experts"][~known] == -1).all() and (m.tokens_T[~known] == 0).all()
            assert set(m.columns["experts"][known, 0].tolist()) <= set(number_S.tolist())
            seen += len(m.rows_R)
    snapshot = step.snapshot(ranks)
    return seen if ranks.is_reporter else 0, snapshot.about, snapshot.tensors


def resumed(
    world_size: int, settings: tuple[str, ...], about: dict[str, Any], files: list[Path]
) -> list[tuple[Any, ...]]:
    """What this rank knows of the step after reading it from the files."""
    add_columns()
    config = load_config(None, [*SMALL, "model.max_sequence_length=32", *settings])
    ranks = Groups(check_config(config, world_size), open_device("cpu", "fp32").torch_device)
    step = StepState.restore(about, [read_tensors(file) for file in files], ranks, torch.float64)
    # Also with a sequence that has no trained token in the same micro-batch.
    Packer(ranks, 0, 48, packing_rules(config), float, GROUP, UPDATES, seed=3).pack(step, drop_zero_advantage=False)
    return [
        (s.tokens, s.trained, s.advantage, s.columns, r.tokens, r.log_probs, r.text, r.prompt)
        for s, r in zip(step.sequences, step.rollouts, strict=True)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_packed_saved_and_resumed(layout: str, tmp_path: Path) -> None:
    world_size, settings = LAYOUTS[layout]
    ranks = run_distributed(packed_and_saved, world_size, world_size, settings)
    expected = make_step()
    assert sum(seen for seen, _, _ in ranks) == sum(s.num_trained for s in expected.sequences)
    files = []
    for rank, (_, about, tensors) in enumerate(ranks):
        assert json.dumps(about) == json.dumps(ranks[0][1]), "the same on every process"
        if tensors:
            files.append(tmp_path / f"{rank}.safetensors")
            write_tensors(files[-1], tensors)
    about = json.loads(json.dumps(ranks[0][1]))
    for other in ("one process", "cp2"):
        for found in run_distributed(resumed, LAYOUTS[other][0], *LAYOUTS[other], about, files):
            for (tokens, trained, advantage, columns, *rest), s, r in zip(
                found, expected.sequences, expected.rollouts, strict=True
            ):
                assert torch.equal(tokens, s.tokens) and torch.equal(trained, s.trained) and advantage == s.advantage
                assert columns.keys() == {"quality", "experts", "support"}
                assert columns.pop("support").tolist() == s.columns["support"].tolist()
                for name, values in columns.items():
                    assert torch.equal(values, s.columns[name])
                assert rest == [r.tokens, r.log_probs, r.text, r.prompt]


def refused(world_size: int, settings: tuple[str, ...]) -> str:
    """What the guard says when one value on the last rank that has any is not finite."""
    add_columns()
    step = make_step()
    ranks, config = pack(world_size, settings, step)
    last = (ranks.dp_rank, ranks.cp_rank) == (ranks.dp_size - 1, ranks.cp_size - 1)
    if last:
        step.batches[0].micro_batches[0].columns["quality"][1] = math.nan
    guards = Guards(config, ranks, None, print)
    try:
        guards.check_columns(step)
    except GuardError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", ["one process", "dp2", "cp2", "tp2 cp2"])
def test_it_is_guarded(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    first, *others = run_distributed(refused, world_size, world_size, settings)
    assert first.startswith("step 7: the quality of token ")
    assert "is nan; rollouts with a value that is not finite: 1 of 16," in first
    assert set(others) <= {first}


def test_a_value_that_is_missing_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COLUMNS, "quality", Column("quality", "quality"))
    step = make_step()
    for sequence in step.sequences:
        del sequence.columns["experts"]
    packer = Packer(OneRank(), 0, 48, packing_rules(load_config(None)), float, GROUP, UPDATES, seed=3)
    packer.pack(step, drop_zero_advantage=False)
    snapshot = step.snapshot(OneRank())
    broken = {name: values[1:] if name.startswith("quality") else values for name, values in snapshot.tensors.items()}
    with pytest.raises(CheckpointError, match=r"quality of sequence \d+ of step 7 is known for \d+ of \d+ tokens"):
        StepState.restore(snapshot.about, [broken], OneRank(), torch.float64)
    broken = snapshot.tensors | {"support.counts": snapshot.tensors["support.counts"][1:]}
    with pytest.raises(CheckpointError, match="does not fit together"):
        StepState.restore(snapshot.about, [broken], OneRank(), torch.float64)
