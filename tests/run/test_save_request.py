"""A run saves by the clock and when asked, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_megatron.base.batches import Position
from gspo_megatron.base.errors import DataError
from gspo_megatron.run import save_request
from gspo_megatron.run.save_request import SaveRequest
from gspo_megatron.testing.fakes import Notebook, Replicas, Shelf, TablePolicy, TableSampler, config_of, trainer_of


def test_the_clock_starts_anew_with_every_save(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = 100.0
    monkeypatch.setattr(save_request.time, "monotonic", lambda: now)
    request = SaveRequest(every_s=10, file=tmp_path / "save")
    never = SaveRequest(every_s=0, file=tmp_path / "save")
    elsewhere = SaveRequest(every_s=10, file=None)
    now = 109.9
    assert not request.is_set()
    now = 110.0
    assert request.is_set() and not never.is_set() and not elsewhere.is_set()
    request.saved()
    assert not request.is_set()
    now = 120.0
    assert request.is_set()


def test_a_due_save_is_written_between_updates_and_the_run_goes_on(tmp_path: Path) -> None:
    """Every safe point finds it due: after each update of the three steps, of two updates each."""
    replicas = Replicas(2)

    def work(ranks) -> list[Position]:
        shelf = Shelf(ranks)
        config = config_of(f"run.dir={tmp_path}", "checkpoint.save_every_s=1e-9")
        assert trainer_of(config, ranks, checkpoints=shelf).run()
        return [position for position, _ in shelf.saved]

    for saved in replicas.run(work):
        assert saved == [(0, step, updates) for step in range(3) for updates in (0, 1)] + [(0, 3, 0)]


def test_touching_a_file_saves_once(tmp_path: Path) -> None:
    shelf, config = Shelf(), config_of(f"run.dir={tmp_path}", "train.steps=4")
    asked = tmp_path / "save"

    class Asking(TableSampler):
        def generate(self, prompts, ids, *, greedy=False, **how):
            if len(self.ids) == 2:  # after the first evaluation and one step
                asked.touch()
            return super().generate(prompts, ids, greedy=greedy, **how)

    class Watching(Shelf):
        def save(self, position, state, *, wait, best=None):
            super().save(position, state, wait=wait, best=best)
            events.append(f"save, wait {wait}, file {asked.exists()}")

        def finish(self, *, wait=True):
            if wait:
                events.append(f"finish, file {asked.exists()}")

    events: list[str] = []
    shelf = Watching()
    policy = TablePolicy(shelf.ranks)
    assert trainer_of(config, policy=policy, sampler=Asking(policy, config), checkpoints=shelf).run()
    assert [position for position, _ in shelf.saved] == [(0, 1, 1), (0, 4, 0)]
    # The file stays until the save is complete, so a crash on the way does not lose the request.
    assert events[:2] == ["save, wait True, file True", "finish, file True"]
    assert not asked.exists()


def test_a_run_that_its_data_ends_is_saved_first(tmp_path: Path) -> None:
    shelf, config = Shelf(), config_of(f"run.dir={tmp_path}", "train.steps=4")

    class Ending(TableSampler):
        def generate(self, prompts, ids, *, greedy=False, **how):
            if len(self.ids) == 3:
                raise DataError("no such prompt")
            return super().generate(prompts, ids, greedy=greedy, **how)

    policy = TablePolicy(shelf.ranks)
    with pytest.raises(DataError, match="no such prompt"):
        trainer_of(config, policy=policy, sampler=Ending(policy, config), checkpoints=shelf).run()
    assert [position for position, _ in shelf.saved] == [(0, 2, 0)]


def test_a_warm_start_is_not_lost_where_the_first_evaluation_fails(tmp_path: Path) -> None:
    shelf, config = Shelf(), config_of(f"run.dir={tmp_path}", "train.steps=2", "train.warm_start_steps=3")

    class Ending(TableSampler):
        def generate(self, prompts, ids, *, greedy=False, **how):
            raise DataError("no such reward")

    policy, notebook = TablePolicy(shelf.ranks), Notebook()
    with pytest.raises(DataError, match="no such reward"):
        trainer_of(config, policy=policy, sampler=Ending(policy, config), checkpoints=shelf, console=notebook).run()
    assert [position for position, _ in shelf.saved] == [(3, 0, 0)]
    assert any("saved in" in line and "warm_start_000003" in line for line in notebook.said)


def test_a_run_that_an_evaluation_ends_is_saved_first(tmp_path: Path) -> None:
    shelf, config = Shelf(), config_of(f"run.dir={tmp_path}", "train.steps=2")

    class Ending(TableSampler):
        def generate(self, prompts, ids, *, greedy=False, **how):
            if greedy and len(self.ids) > 1:
                raise DataError("no such prompt")
            return super().generate(prompts, ids, greedy=greedy, **how)

    policy = TablePolicy(shelf.ranks)
    with pytest.raises(DataError, match="no such prompt"):
        trainer_of(config, policy=policy, sampler=Ending(policy, config), checkpoints=shelf).run()
    ((position, state),) = shelf.saved
    assert position == (0, 1, 2), "both updates of the second step are kept"
    again = config_of(f"run.dir={tmp_path}", "train.steps=2", "checkpoint.load=latest")
    after = trainer_of(again, policy=policy, state=state, checkpoints=Shelf())
    calls = len(policy.calls)
    assert after.run()
    assert policy.calls[calls:] == ["sample greedily"]
