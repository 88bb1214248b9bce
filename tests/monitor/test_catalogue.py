"""The catalogue of metrics is what a run writes, and docs/metrics.md is what the catalogue says."""

from __future__ import annotations

from pathlib import Path

import torch
from metrics_page import PAGE, page

from gspo_megatron.monitor.catalogue import CATALOGUE, board_name, entry_of
from gspo_megatron.objective import PolicyObjective, Segments, group_advantages, resolve_variant
from gspo_megatron.objective.variants import VARIANTS
from gspo_megatron.testing.commands import forked
from tests.support.small import SMALL

OF_OTHER_RUNS = ("engine/", "lag/", "router/shift_weight", "router/shift_floor_fraction")
"""Metrics of runs with engines: tests/rollout/test_served.py, test_buffer.py and tests/engine have them; and of the
routers' shift: tests/mcore/test_router_shift.py."""


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def test_the_rows_whose_loss_starts_at_0_are_those_that_the_page_names() -> None:
    """At ratios of 1, of two groups whose responses differ in length."""
    rewards_S = torch.tensor([1.0, 0.0, 0.2, 0.0, 1.0, 0.6], dtype=torch.float64)
    segments = Segments.from_lengths([3, 1, 70, 2, 50, 40])
    log_probs_R = -torch.linspace(0.1, 3, 166, dtype=torch.float64)
    entry = entry_of("loss")
    assert entry and "the aggregate sequence_mean and the clip ppo or log, such as gspo and grpo" in entry.formula
    assert "Not in the others, such as dapo, luspo, cispo and sapo" in entry.formula
    for name in VARIANTS:
        row = resolve_variant(name, kl_coef=0.0)
        advantages_S = group_advantages(rewards_S, [0, 0, 0, 1, 1, 1], row.baseline)
        loss, _ = PolicyObjective(row)(log_probs_R, log_probs_R, advantages_S, segments)
        named = row.aggregate.name == "sequence_mean" and row.clip.name in ("ppo", "log")
        assert (abs(loss) < 1e-12) == named, name


def test_every_metric_of_a_run_is_in_the_catalogue_and_the_other_way_round(tmp_path: Path) -> None:
    import json

    rows = ({"prompt": f"{a}{b}>", "answer": f"{min(a, b)}{max(a, b)}"} for a in range(4) for b in range(4))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = f"[{{source: {tmp_path}/pairs.jsonl, name: pairs}}, {{source: 'task:sort_digits', name: sorted}}]"
    few = ("rollout.prompts_per_step=4", "rollout.group_size=2", "data.eval_size=4", "algorithm.updates_per_rollout=2")
    sizes = (
        "model.vocab_size=16",
        "model.max_sequence_length=24",
        "rollout.max_new_tokens=8",
        "data.task.max_length=6",
    )
    [(status, errors)] = forked(
        1,
        [
            *(*SMALL, *few, *sizes, "data.tokenizer=characters:0123456789>", f"run.dir={tmp_path / 'run'}"),
            *(
                "train.steps=1",
                "train.warm_start_steps=1",
                "algorithm.kl_coef=0.1",
                "algorithm.kl_in=reward",
                "algorithm.entropy_coef=0.01",
            ),
            *("model.aux_loss_coef=0.01", "algorithm.routing_replay=compare", "logging.tensorboard=false"),
            *(
                "algorithm.correction=token_tis",
                f"data.train={sources}",
                "data.curriculum=1",
                "rollout.dynamic_sampling=1",
                "rollout.environment=calculator",
                "data.eval=task:sort_digits",
                "eval.sets.more={source: 'task:sort_digits', size: 2, n: 2}",
            ),
        ],
    )
    assert status == 0, errors
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    keys = dict.fromkeys(key for row in found for key in row)
    assert not [key for key in keys if entry_of(key) is None]
    missing = [entry.key for entry in CATALOGUE if not any(entry_of(key) is entry for key in keys)]
    assert not [key for key in missing if not key.startswith(OF_OTHER_RUNS)]
    # The CPU's peak is not known; everything else is a number with these settings.
    assert [key for key, value in (found[0] | found[1]).items() if value is None] == ["mfu"]
    assert len({board_name(key) for key in keys}) == len(keys)


def test_the_most_exact_entry_is_meant() -> None:
    assert [entry_of(key).key for key in ("reward/mean", "reward/my:f", "router/entropy/layer_12")] == [  # type: ignore[union-attr]
        *("reward/mean", "reward/NAME", "router/entropy/layer_NN")
    ]
    assert entry_of("router/entropy/layer_x") is None and entry_of("rewards/mean") is None
    assert [board_name(k) for k in ("loss", "ratio/mean", "reward/mean", "groups/all_right_fraction")] == [
        *("train/loss", "train/ratio_mean", "reward/mean", "reward/groups_all_right_fraction")
    ]
