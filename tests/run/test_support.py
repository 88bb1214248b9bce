"""The ids that a sampler kept are checked before anything is trained on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gspo_megatron.base.batches import Rollout
from gspo_megatron.base.errors import DataError
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.run.step_state import rollout_row
from gspo_megatron.testing.fakes import OneRank, TablePolicy, TableSampler, config_of, trainer_of

MASK = ("rollout.top_p=0.9", "algorithm.sampling_mask=true")


class Recording(TableSampler):
    """Says that every token was drawn from itself and its neighbours, but for what `change` does to that."""

    def __init__(self, *args: Any, change: Any) -> None:
        super().__init__(*args)
        self.change = change

    def generate(self, *args: Any, **how: Any) -> list[Rollout]:
        drawn = super().generate(*args, **how)
        return [replace(r, support=self.change([[t, (t + 1) % 4] for t in r.tokens])) for r in drawn]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lists: None, r"rollout \d+ comes without the ids that top-k and top-p kept; .*sampling_mask=false"),
        (lambda lists: Ragged.of(lists[1:]), r"rollout \d+ has \d sampled tokens and kept ids for \d of them"),
        (lambda lists: Ragged.of([[*ids, 99] for ids in lists]), r"rollout \d+: the kept id 99 is not an id in \[0, "),
        (lambda lists: Ragged.of([ids[1:] for ids in lists]), r"token 0 \(id \d\) is not among the ids that it was"),
    ],
)
def test_ids_that_cannot_be_those_of_the_tokens_stop_the_run(change: Any, message: str) -> None:
    config = config_of(*MASK)
    policy = TablePolicy(OneRank())
    trainer = trainer_of(config, policy=policy, sampler=Recording(policy, config, change=change))
    with pytest.raises(DataError, match=message):
        trainer.run()
    assert policy.version == 0, "nothing was trained"


def test_they_travel_with_the_sequences_and_stay_out_of_the_rollouts_file() -> None:
    config = config_of(*MASK)
    policy = TablePolicy(OneRank())
    trainer = trainer_of(config, policy=policy, sampler=Recording(policy, config, change=Ragged.of))
    groups = trainer.sample(1)
    sequences = trainer.advantages(groups)
    for rollout, sequence in zip([r for g in groups for r in g.rollouts], sequences, strict=True):
        assert sequence.columns["support"].tolist() == [[t, (t + 1) % 4] for t in rollout.tokens]
        assert "support" not in rollout_row(rollout, sequence)
