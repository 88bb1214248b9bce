"""What is wrong with a step, by its row of metrics and its rewards: RULES, each of which warns, or stops the run.

A rule of a new metric is a row of RULES; if it has a limit of its own, also a setting of section guards by its name.
"""

from __future__ import annotations

import math
import operator
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

from gspo_megatron.base.batches import RolloutGroup
from gspo_megatron.base.errors import plural
from gspo_megatron.config.guards import GuardConfig
from gspo_megatron.rewards.rewards import listed
from gspo_megatron.run.algorithm import Algorithm

STEPS_A_WARNING = 20
"""Of steps in a row with the same fault the first is warned of, and every one of this number."""
CLIPPED = 1 / 3
"""A clip that removes the gradient of more than this share of the tokens is too narrow for the updates."""
NOISY = 1 / 4
"""Ratios that differ from 1 by more than this share of the clip range, before anything was learned, are noisy."""
WINDOW, FEWEST = 20, 5
"""A metric is compared with the last WINDOW steps, or with the first FEWEST; with nothing before there are FEWEST."""


class Seen(NamedTuple):
    """What rules look at after a step.

    Attributes:
        past: values of earlier steps by the name of the rule that compares with them.
    """

    row: Mapping[str, Any]
    groups: Seq[RolloutGroup]
    algorithm: Algorithm
    guards: GuardConfig
    past: Mapping[str, tuple[float, ...]]


class Fault(NamedTuple):
    """What is wrong, and what to do, as `step 7, RULE: WHAT: ADVICE`."""

    what: str
    advice: str


class Rule(ABC):
    """Attributes:
    name: in guards.stop_on.
    """

    name: str

    @abstractmethod
    def fault(self, seen: Seen) -> Fault | None: ...

    def remembered(self, seen: Seen) -> tuple[float, ...]:
        """What later steps are compared with."""
        return ()


@dataclass(frozen=True)
class Check(Rule):
    """A rule that looks at one step, whatever its limit."""

    name: str
    look: Callable[[Seen], Fault | None]

    def fault(self, seen: Seen) -> Fault | None:
        return self.look(seen)


class Usual(NamedTuple):
    """A value of earlier steps: which of them are kept, and what is made of them."""

    words: str
    kept: slice
    of: Callable[[Seq[float]], float]


FIRST = Usual(f"its mean over the first {FEWEST} steps", slice(FEWEST), statistics.fmean)
RECENT = Usual(f"its median over the last {WINDOW} steps", slice(-WINDOW, None), statistics.median)


@dataclass(frozen=True)
class Limit(Rule):
    """metric > limit, or metric < limit, where limit = guards.NAME times what is usual; 0 is none.

    Attributes:
        usual: what the limit is a multiple of; None: of 1.
        beyond: operator.gt or operator.lt.
    """

    name: str
    metric: str
    advice: str
    usual: Usual | None = None
    beyond: Callable[[float, float], bool] = operator.gt

    def fault(self, seen: Seen) -> Fault | None:
        limit, past = getattr(seen.guards, self.name), seen.past.get(self.name, ())
        value = _number(seen.row.get(self.metric))
        if not limit or value is None or (self.usual and len(past) < FEWEST):
            return None
        unit = self.usual.of(past) if self.usual else 1.0
        if not self.beyond(value, limit * unit):
            return None
        side = "above" if self.beyond is operator.gt else "below"
        compared = f" times {unit:.3g}, {self.usual.words}" if self.usual else ""
        return Fault(f"{self.metric} is {value:.3g}, {side} guards.{self.name}={limit:g}{compared}", self.advice)

    def remembered(self, seen: Seen) -> tuple[float, ...]:
        past, value = seen.past.get(self.name, ()), _number(seen.row.get(self.metric))
        return (past if value is None else (*past, value))[self.usual.kept] if self.usual else ()


def _number(value: Any) -> float | None:
    """None for what had nothing to average: NaN, infinite or absent."""
    return float(value) if value is not None and math.isfinite(value) else None


def _flat(seen: Seen) -> Fault | None:
    if seen.row["groups/zero_variance_fraction"] != 1:
        return None
    return Fault(
        f"within each group all rewards are equal (in the first of {len(seen.groups)}: "
        f"{seen.groups[0].rollouts[0].reward:g})",
        "every advantage is 0 and there is no policy gradient; use easier or harder prompts, a larger "
        "rollout.group_size or a finer-grained reward",
    )


def _clipped(seen: Seen) -> Fault | None:
    if not (share := seen.row["clip_fraction"]) > CLIPPED:
        return None
    far, limit = _number(seen.row.get("kl/old")), seen.guards.kl_old
    if limit and far is not None and far > limit:
        # A wider band would let the policy move even further.
        advice = f"the updates are too large for any band, as kl/old={far:.3g} tells; lower optimizer.lr"
    else:
        advice = (
            "the band is too narrow for these updates; widen algorithm.clip_low and algorithm.clip_high, or lower "
            "optimizer.lr"
        )
    return Fault(
        f"the clip removes the gradient of {share:.0%} of the tokens, more than a third",
        f"{advice} or algorithm.updates_per_rollout",
    )


def _shifted(seen: Seen) -> Fault | None:
    weight, low = _number(seen.row.get("router/shift_weight")), seen.algorithm.variant.clip.parameters().get("low")
    if weight is None or low is None or not 1 - weight > low:
        return None
    return Fault(
        f"router/shift_weight is {weight:.4g}: the routers' shift alone lowers ratios by more than clip_low={low:g}",
        "how far routers moved then decides what is clipped; widen algorithm.clip_low, or use "
        "algorithm.routing_replay=R2 in place of algorithm.router_shift_floor",
    )


def _noisy(seen: Seen) -> Fault | None:
    clip, noise = seen.algorithm.variant.clip, seen.row["ratio/first_update_noise"]
    if not noise > NOISY * clip.reach:
        return None
    bounds = ", ".join(f"{name} {x:g}" for name, x in clip.parameters().items() if math.isfinite(x))
    advice = "the same forward gave two results: look for a kernel that does not repeat (precision.deterministic=true)"
    if seen.algorithm.old_log_probs == "sampler":
        advice = (
            "algorithm.old_log_probs=rollout takes the old log-probs from the sampler, which rounds differently; use "
            "auto, which scores with the trainer, or precision.dtype=fp32"
        )
    return Fault(
        f"before its first update, ratios differ from 1 by up to {noise:.1e}, {noise / clip.reach:.2g} times the clip "
        f"range ({bounds})",
        f"rounding, not what was learned, decides which responses are clipped; {advice} (docs/numerics.md)",
    )


def _unscored(seen: Seen) -> Fault | None:
    failed = [rollout for group in seen.groups for rollout in group.rollouts if rollout.reward_error]
    if not failed:
        return None
    return Fault(
        f"{plural(len(failed), 'rollout')} without a reward, which counts as 0", f"the first of them:\n{listed(failed)}"
    )


RULES: tuple[Rule, ...] = (
    Check("equal_rewards", _flat),
    Check("clip_fraction", _clipped),
    Check("first_update_noise", _noisy),
    Check("failed_rewards", _unscored),
    Check("router_shift", _shifted),
    Limit(
        "ratio_noise",
        "ratio/first_update_noise",
        "the old log-probs are not those of the policy in training. With algorithm.old_log_probs=rollout the sampler "
        "computes in another precision or order (recompute avoids that); otherwise the same forward gave two results, "
        "as with dropout, routing that depends on the batch, or a failing device",
    ),
    Limit(
        "entropy_drop",
        "entropy",
        "the policy stops trying other responses. A wider algorithm.clip_high, algorithm.entropy_coef, a higher "
        "rollout.temperature or harder prompts keep it from that",
        FIRST,
        operator.lt,
    ),
    Limit(
        "length_growth",
        "response_length/mean",
        "look at rollouts/: do responses repeat themselves, or has their end lost its probability? A reward for length "
        "or algorithm.drop_truncated may pay for it",
        RECENT,
    ),
    Limit(
        "kl_old",
        "kl/old",
        "the updates of one step move the policy far from what was sampled; lower optimizer.lr or "
        "algorithm.updates_per_rollout, or narrow the clip",
    ),
    Limit(
        "kl_ref",
        "kl/ref",
        "the policy has left the reference; raise algorithm.kl_coef, lower optimizer.lr, or continue from an earlier "
        "checkpoint",
    ),
    Limit(
        "sampler_far",
        "sampler/far_fraction",
        "the sampler draws from another distribution than the policy, which came before collapse in arXiv 2510.11370; "
        "use algorithm.correction, algorithm.routing_replay or precision.dtype=fp32",
    ),
    Limit(
        "left_out",
        "sampler/left_out_fraction",
        "the correction leaves out most of what was sampled, and little is learned; widen its bounds "
        "(algorithm.dials.correction), use one that caps weights, such as token_tis, or bring the sampler nearer to "
        "the policy: precision.dtype=fp32, algorithm.routing_replay=R3",
    ),
)
ALWAYS_STOPS = ("ratio_noise",)


class Concern(NamedTuple):
    rule: str
    text: str
    stops: bool


class Concerns:
    """Applies RULES after every step.

    Attributes:
        past: as in `Seen`.
        streaks: by rule, in how many steps in a row, up to the last one, it found a fault.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        guards: GuardConfig,
        past: Mapping[str, tuple[float, ...]],
        streaks: Mapping[str, int],
    ) -> None:
        self.algorithm, self.guards, self.past, self.streaks = algorithm, guards, dict(past), dict(streaks)
        self.stop_on = {*guards.stop_on, *ALWAYS_STOPS}

    def of(self, row: Mapping[str, Any], groups: Seq[RolloutGroup]) -> list[Concern]:
        """What to warn of after a step, or to stop for."""
        seen, found = Seen(row, groups, self.algorithm, self.guards, dict(self.past)), []
        for rule in RULES:
            if past := rule.remembered(seen):
                self.past[rule.name] = past
            fault, stops = rule.fault(seen), rule.name in self.stop_on
            streak = self.streaks.pop(rule.name, 0) + 1
            if fault is None:
                continue
            self.streaks[rule.name] = streak
            if stops or streak == 1 or streak % STEPS_A_WARNING == 0:
                before = f", as in the {plural(streak - 1, 'step')} before" if streak > 1 else ""
                text = f"step {row['step']}, {rule.name}: {fault.what}{before}: {fault.advice}"
                found.append(Concern(rule.name, text, stops))
        return found
