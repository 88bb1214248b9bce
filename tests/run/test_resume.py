"""How a run continues: which settings may change, and checkpoints of format 1."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.base.batches import Position
from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.resume import Continuation, changed_settings
from gspo_megatron.run.state import Contents, GuardState, RunState, SavedStep
from gspo_megatron.run.step_state import StepState
from gspo_megatron.testing.fakes import OneRank, Shelf, config_of, trainer_of
from tests.support.hugging_face import model_folder

NO_CONTENTS = Contents({}, None)


def state_of(config: Config) -> RunState:
    """As it comes back from a checkpoint."""
    state = RunState.of(config, Position(0, 3, 0), began=True, guards=GuardState((1.5, 2.0), 1), step=None)
    return RunState.from_saved(json.loads(json.dumps(state.to_json())), [])


def test_a_state_survives_json() -> None:
    config = load_config(None, ["reward.functions.my.module:f=0.5", "algorithm.dials.clip.low=0.1"])
    state = state_of(config)
    assert (state.position, state.began, state.guards) == (Position(0, 3, 0), True, GuardState((1.5, 2.0), 1))
    assert state.settings["reward.functions"] == {"my.module:f": 0.5}
    assert state == RunState.of(config, Position(0, 3, 0), began=True, guards=GuardState((1.5, 2.0), 1), step=None)


def test_settings_that_changed_are_said_and_some_are_refused() -> None:
    config = load_config(None)
    state = state_of(config)
    assert changed_settings(state, config) == []
    other = load_config(None, ["optimizer.lr=0.5", "run.seed=7", "parallel.ep=2", "run.dir=x", "rollout.group_size=2"])
    changed = ["run.seed: 7, was 1", "rollout.group_size: 2, was 8", "optimizer.lr: 0.5, was 1e-06"]
    assert changed_settings(state, other) == changed
    inside = replace(state, step=SavedStep({"number": 4}, ()))
    with pytest.raises(CheckpointError, match=r"inside a step .*\(run.seed: 7, was 1; rollout.group_size: 2, was 8\)"):
        changed_settings(inside, other)


def test_another_variant_is_refused_unless_asked_for() -> None:
    state = state_of(load_config(None))

    def continued(*settings: str, state: RunState = state) -> tuple[str, ...]:
        config = load_config(None, ["checkpoint.load=latest", *settings])
        return Continuation.of(state, config, Algorithm.of(config), has_reference=False, contents=NO_CONTENTS).changed

    with pytest.raises(CheckpointError, match=r"algorithm\.variant: 'grpo', was 'gspo'.*allow_other_variant=true"):
        continued("algorithm.variant=grpo")
    assert continued("algorithm.clip_low=0.1") == ("algorithm.clip_low: 0.1, was None",)
    allowed = continued("algorithm.variant=grpo", "checkpoint.allow_other_variant=true")
    assert allowed == ("algorithm.variant: 'grpo', was 'gspo'",)
    assert continued("algorithm.variant=grpo", state=replace(state, began=False)) == allowed


def test_a_setting_that_did_not_exist_then_is_no_change() -> None:
    config = load_config(None)
    state = state_of(config)
    known = {name: value for name, value in state.settings.items() if name != "optimizer.lr"}
    assert changed_settings(replace(state, settings={**known, "rollout.backend": "megatron"}), config) == []


def test_a_setting_is_known_by_the_name_it_had_then() -> None:
    """As in checkpoints of the first format."""
    config = load_config(None)
    about = json.loads(json.dumps(state_of(config).to_json()))
    about["config"]["train"]["skip_dead"] = about["config"]["train"].pop("skip_zero_gradient")
    state = replace(RunState.from_saved(about, []), step=SavedStep({"number": 4}, ()))
    assert changed_settings(state, config) == []
    with pytest.raises(CheckpointError, match=r"train.skip_zero_gradient: False, was True"):
        changed_settings(state, load_config(None, ["train.skip_zero_gradient=false"]))


@pytest.mark.parametrize(
    ("load", "own", "newest"),
    [("latest", True, True), ("{run}/checkpoints/step_3", True, False), ("x/y", False, False)],
)
def test_where_a_state_comes_from_decides_what_is_moved_aside(load: str, own: bool, newest: bool, tmp_path) -> None:
    settings = [f"run.dir={tmp_path}", f"checkpoint.load={load.format(run=tmp_path)}"]
    config = load_config(None, settings)
    found = Continuation.of(state_of(config), config, Algorithm.of(config), has_reference=False, contents=NO_CONTENTS)
    assert (found.own, found.is_newest, found.fresh, found.first_step) == (own, newest, not own, 4)
    assert Continuation().fresh and Continuation().first_step == 0


def test_a_reference_that_was_never_frozen_is_missed() -> None:
    config = load_config(None, ["algorithm.kl_coef=0.1"])
    with pytest.raises(CheckpointError, match=r"no reference policy.*set algorithm.kl_coef=0"):
        Continuation.of(state_of(config), config, Algorithm.of(config), has_reference=False, contents=NO_CONTENTS)
    assert (
        Continuation.of(state_of(config), config, Algorithm.of(config), has_reference=True, contents=NO_CONTENTS).state
        is not None
    )


def test_the_start_of_a_run_says_what_it_starts_from(tmp_path: Path) -> None:
    def messages(state: RunState | None, *overrides: str) -> list[str]:
        config = config_of(f"run.dir={tmp_path}", *overrides)
        return list(Continuation(state).messages(config))

    shelf = Shelf()
    trainer_of(config_of("train.steps=3"), checkpoints=shelf).run()
    saved = shelf.saved[-1][1]
    assert messages(None) == []
    assert messages(None, "checkpoint.load=latest") == [
        f"checkpoint.load=latest: nothing was saved in {tmp_path}/checkpoints, so the run starts from the beginning"
    ]
    assert messages(saved, "train.steps=4") == ["continuing after step 3"]
    (_, done) = messages(saved, "train.steps=3", "checkpoint.load=latest")
    assert done == "train.steps=3 are done: nothing is left to train; a larger train.steps continues the run"


def test_what_an_earlier_run_left_is_named_with_its_new_place(tmp_path: Path) -> None:
    config = config_of(f"run.dir={tmp_path}", "train.steps=2", "logging.tensorboard=false")

    def opened(first_step: int, fresh: bool) -> list[str]:
        writer = RunWriter.of_run(config, first_step=first_step, fresh=fresh)
        trainer_of(config, writer=writer).run()
        return writer.moved

    assert opened(0, True) == []
    assert opened(0, True) == [
        "its rollouts/ is now rollouts.replaced_1/",
        "3 rows of its metrics moved to metrics.replaced.jsonl",
    ]


def test_another_folder_is_not_where_the_weights_come_from(tmp_path: Path) -> None:
    shape = load_config(None, ["model.preset=tiny_moe", "model.vocab_size=61"]).model.shape
    old, new = (
        load_config(None, [f"model.hf={model_folder(tmp_path / name, shape)}", "checkpoint.load=latest"])
        for name in ("old", "new")
    )

    def said(config: Config) -> str:
        algorithm = Algorithm.of(config)
        continuation = Continuation.of(state_of(old), config, algorithm, has_reference=False, contents=NO_CONTENTS)
        return "\n".join(continuation.messages(config))

    assert f"the weights are those of the checkpoint, not of model.hf={tmp_path / 'old'}" in said(old)
    assert "when the run began" not in said(old)
    assert f"model.hf was {tmp_path / 'old'} when the run began" in said(new)
    assert "to train the new folder's weights, start a run of its own: checkpoint.load=none" in said(new)


def anything_else(value: Any) -> Iterator[Any]:
    """What a field of JSON may hold besides `value`."""
    yield from (other for other in (None, True, -1, 0.5, 10**30, "text", [None], {"x": 1}) if other != value)


def test_a_state_that_was_edited_is_refused_by_the_name_of_the_field() -> None:
    """Every field of run.json's state, and of its objects, is left out and set to other things in turn: an error that
    names it, or a state, and never another exception."""
    shelf = Shelf()
    config = config_of("train.steps=2", "algorithm.kl_coef=0.1")
    asked = itertools.count(1)
    assert not trainer_of(config, checkpoints=shelf, stop=lambda: next(asked) == 4).run()
    [(position, state)] = shelf.saved[-1:]
    assert position == Position(0, 1, 1) and isinstance(state.step, SavedStep)
    about = state.to_json()
    about["contents"] = {"digests": {"data.train": "0" * 64}, "num_prompts": 8}
    owners = [about, *(about[name] for name in ("guards", "taken", "contents", "step"))]
    refused = 0
    for owner in owners:
        for name in list(owner):
            value = owner.pop(name)
            for other in (*anything_else(value), ...):
                if other is not ...:
                    owner[name] = other
                try:
                    found = RunState.from_saved(json.loads(json.dumps(about)), state.step.shares)
                    if isinstance(found.step, SavedStep):
                        StepState.restore(found.step.about, found.step.shares, OneRank(), torch.float64)
                except CheckpointError as error:
                    refused += 1
                    assert name in str(error) or "unfinished step" in str(error)
                owner.pop(name, None)
            owner[name] = value
    assert refused > 100
    for position in ([0, 10**30, 0], [0, -1, 0], [1, 2], ["0", 1, 0]):
        with pytest.raises(CheckpointError, match=r"state: position is .*expected a list of three counts"):
            RunState.from_saved(about | {"position": position}, state.step.shares)
