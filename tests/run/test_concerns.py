"""Warnings of steps that teach little: the first of a row of them, and every twentieth."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup
from gspo_megatron.base.errors import ConfigError, GuardError
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.build.checks import check_config, config_warnings
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.concerns import Concerns
from gspo_megatron.run.state import GuardState
from gspo_megatron.testing.fakes import (
    Notebook,
    OneRank,
    Replicas,
    Shelf,
    TablePolicy,
    TableSampler,
    config_of,
    trainer_of,
)

PROMPT = Prompt(0, "", (1,), "")
GROUPS = [RolloutGroup(PROMPT, [Rollout(0, PROMPT, [1], [0.0], False, 0, reward=0.5)])]


QUIET = {"groups/zero_variance_fraction": 0.0, "ratio/first_update_noise": -math.inf, "clip_fraction": 0.0}


def concerns_of(*settings: str, state: GuardState = GuardState()) -> Concerns:  # noqa: B008
    config = config_of(*settings)
    return Concerns(Algorithm.of(config), config.guards, state.past, state.streaks)


def said(clip_fractions: list[float], flat: float = 0.0) -> list[str]:
    concerns, rest = concerns_of(), QUIET | {"groups/zero_variance_fraction": flat}
    return [
        concern.text
        for step, clipped in enumerate(clip_fractions, start=1)
        for concern in concerns.of(rest | {"step": step, "clip_fraction": clipped}, GROUPS)
    ]


def test_a_clip_band_that_is_too_narrow() -> None:
    assert said([0.0, 0.33, math.nan]) == []
    first, second, again = said([0.4] * 25 + [0.1, 0.5])
    assert "step 1, clip_fraction: the clip removes the gradient of 40% of the tokens, more than a third: the" in first
    assert "algorithm.clip_low and algorithm.clip_high" in first
    assert "step 20" in second and "as in the 19 steps before" in second
    assert "step 27, clip_fraction: the clip removes the gradient of 50%" in again


def test_a_band_is_not_to_be_widened_where_the_updates_are_too_large() -> None:
    row = QUIET | {"step": 1, "clip_fraction": 0.5, "kl/old": 6.0}
    found = {concern.rule: concern.text for concern in concerns_of().of(row, GROUPS)}
    assert set(found) == {"clip_fraction", "kl_old"}
    assert "too large for any band, as kl/old=6 tells; lower optimizer.lr" in found["clip_fraction"]
    assert "widen" not in found["clip_fraction"]
    (off,) = concerns_of("guards.kl_old=0").of(row, GROUPS)
    assert "widen algorithm.clip_low" in off.text


def test_a_correction_that_leaves_out_most_of_the_data() -> None:
    [(step, text, _)] = values_of("sampler/left_out_fraction", [None, 0.5, 0.51], concerns_of())
    assert step == 3 and "left_out: sampler/left_out_fraction is 0.51, above guards.left_out=0.5: the correc" in text


def test_routers_whose_shift_alone_reaches_the_band() -> None:
    shifts: list[float | None] = [None, math.nan, 1 - 2e-4, 1 - 5e-4]
    [(step, text, _)] = values_of("router/shift_weight", shifts, concerns_of("algorithm.clip_low=3e-4"))
    assert step == 4 and "router_shift: router/shift_weight is 0.9995: the routers' shift alone lowers" in text
    assert "ratios by more than clip_low=0.0003: how far" in text
    assert values_of("router/shift_weight", shifts, concerns_of("algorithm.clip_low=0.2")) == []
    no_bounds = ("algorithm.variant=vespo", "algorithm.clip_low=null", "algorithm.clip_high=null")
    assert values_of("router/shift_weight", shifts, concerns_of(*no_bounds)) == []


def test_groups_without_a_gradient() -> None:
    (first, second) = said([math.nan] * 20, flat=1.0)
    assert "step 1, equal_rewards: within each group all rewards are equal (in the first of 1: 0.5): every" in first
    assert "step 20" in second


def values_of(
    metric: str, values: list[float | None], concerns: Concerns, first: int = 1
) -> list[tuple[int, str, bool]]:
    """(step, text, whether the run stops) of steps with these values."""
    return [
        (step, concern.text, concern.stops)
        for step, value in enumerate(values, start=first)
        for concern in concerns.of(QUIET | {"step": step, metric: value}, GROUPS)
    ]


def test_a_metric_is_held_against_its_limit() -> None:
    stops = ("guards.kl_ref=2", "algorithm.kl_coef=0.1", "guards.stop_on=[kl_ref]")
    found = values_of("kl/ref", [None, math.nan, 2.0, 2.5], concerns_of(*stops))
    assert [(step, stop) for step, _, stop in found] == [(4, True)]
    assert "step 4, kl_ref: kl/ref is 2.5, above guards.kl_ref=2: the policy has left the reference" in found[0][1]
    assert values_of("kl/ref", [9.0], concerns_of()) == []
    [(_, text, stop), *more] = values_of("kl/old", [0.5, 0.6] + [0.7] * 20, concerns_of())
    assert "step 2, kl_old: kl/old is 0.6, above guards.kl_old=0.5:" in text and not stop
    assert [step for step, *_ in more] == [21]
    [(step, *_)] = values_of("sampler/far_fraction", [0.1, 0.11], concerns_of())
    assert step == 2


def test_entropy_is_compared_with_the_first_steps() -> None:
    first = [1.0, 2.0, 1.0, None, 2.0, 4.0]  # mean 2
    concerns = concerns_of("guards.entropy_drop=0.1")
    [(step, text, _)] = values_of("entropy", [*first, 9.0, 0.21, 0.19], concerns)
    assert step == 9 and "entropy is 0.19, below guards.entropy_drop=0.1 times 2, its mean over the first 5" in text
    assert values_of("entropy", [0.001] * 3, concerns_of("guards.entropy_drop=0.1")) == [], "too few to tell"


def test_length_is_compared_with_the_last_steps_and_remembered_by_a_run_that_continues() -> None:
    lengths = [10.0] * 4 + [1.0] + [10.0] * 20 + [31.0, 30.0, 9.0, 31.0]
    whole = values_of("response_length/mean", lengths, concerns_of())
    assert [step for step, *_ in whole] == [26, 29]
    assert (
        "response_length/mean is 31, above guards.length_growth=3 times 10, its median over the last 20" in whole[0][1]
    )
    for at in (3, 26, 27):
        before = concerns_of()
        found = values_of("response_length/mean", lengths[:at], before)
        state = GuardState((), 0, before.past, before.streaks)
        state = GuardState.from_json(json.loads(json.dumps(asdict(state))))
        found += values_of("response_length/mean", lengths[at:], concerns_of(state=state), first=at + 1)
        assert found == whole
    # What is usual now is no longer warned of.
    assert len(values_of("response_length/mean", [10.0] * 20 + [40.0] * 100, concerns_of())) == 1


def test_a_rule_that_stops_the_run_keeps_its_step(tmp_path: Path) -> None:
    config = config_of("guards.kl_old=1e-9", "guards.stop_on=[kl_old]", f"run.dir={tmp_path}")

    def stopped(ranks: Ranks) -> str:
        writer = RunWriter(tmp_path, first_step=0) if ranks.is_main else None
        trainer = trainer_of(config, ranks, writer=writer, checkpoints=Shelf(ranks))
        with pytest.raises(GuardError, match=r"^step 1, kl_old: kl/old is .*, above guards.kl_old=1e-09: ") as caught:
            trainer.run()
        return str(caught.value)

    first, second = Replicas(2).run(stopped)
    kept = tmp_path / "guards" / "step_000001_kl_old.jsonl"
    assert first == second and first.endswith(f"The step's rollouts are in {kept}")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and rows[1]["kl/old"] > 1e-9, "the row shows why"
    assert len(kept.read_text().splitlines()) == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["guards.stop_on=[entropy]"], "did you mean 'entropy_drop'"),
        (
            ["guards.stop_on=[entropy_drop]"],
            "guards.stop_on has entropy_drop, which guards.entropy_drop=0 switches off",
        ),
        (["guards.length_growth=0.5"], "guards.length_growth=0.5 would object to ordinary steps"),
        (["guards.kl_ref=1"], "guards.kl_ref=1.0 has no effect with algorithm.kl_coef=0"),
        (["guards.sampler_far=0.2", "algorithm.old_log_probs=rollout"], "guards.sampler_far=0.2 has no effect"),
        (["guards.left_out=0.9"], "guards.left_out=0.9 has no effect without algorithm.correction"),
    ],
)
def test_limits_that_cannot_act(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(config_of(*settings), 1)
    assert message in str(caught.value)


def test_a_clip_that_cannot_act_is_said_once() -> None:
    def notes(*settings: str) -> list[str]:
        config = config_of(*settings)
        return [n for n in config_warnings(config, Algorithm.of(config)) if "never acts" in n]

    rloo = ("algorithm.variant=rloo", "algorithm.clip_low=null", "algorithm.clip_high=null")
    one = "algorithm.updates_per_rollout=1"
    assert len(notes(one)) == 1 and not notes() and not notes(one, *rloo)
    assert not notes(one, "algorithm.old_log_probs=rollout")


class RoundingSampler(TableSampler):
    """Its log-probs are off by `error`, as those of a sampler that rounds differently."""

    error = 0.02

    def generate(self, *args: Any, **kwargs: Any) -> list[Rollout]:
        rollouts = super().generate(*args, **kwargs)
        for rollout in rollouts:
            rollout.log_probs = [log_prob - self.error for log_prob in rollout.log_probs]
        return rollouts


def test_the_noise_of_the_samplers_log_probs_is_compared_with_the_clip_band() -> None:
    def warned(sampler: type[TableSampler], *overrides: str) -> list[str]:
        config, notebook = config_of("algorithm.old_log_probs=rollout", *overrides), Notebook()
        policy = TablePolicy(OneRank())
        trainer_of(config, OneRank(), policy, sampler=sampler(policy, config), console=notebook).run()
        return [text for text in notebook.warnings if "ratios differ" in text]

    [text] = warned(RoundingSampler, "algorithm.clip_low=3e-4", "algorithm.clip_high=4e-4")
    assert "step 1, first_update_noise: before its first update, ratios differ from 1 by up to 2.0e-02, 58 ti" in text
    assert "(low 0.0003, high 0.0004" in text and "old_log_probs=rollout takes the old log-probs from" in text
    assert warned(RoundingSampler, "algorithm.clip_low=0.2", "algorithm.clip_high=0.2") == []
    assert warned(TableSampler, "algorithm.clip_low=3e-4", "algorithm.clip_high=4e-4") == []
    assert warned(RoundingSampler, "algorithm.old_log_probs=auto", "algorithm.clip_low=3e-4") == []
