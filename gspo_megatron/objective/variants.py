"""One row per algorithm: which dial it turns where, and where its equation is printed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from gspo_megatron.base.errors import ConfigError, lookup
from gspo_megatron.objective.advantage import BASELINES
from gspo_megatron.objective.aggregates import AGGREGATES
from gspo_megatron.objective.clips import CLIPS
from gspo_megatron.objective.levels import LEVELS


@dataclass(frozen=True)
class Variant:
    """An algorithm. Checked when made, so that a Variant that exists makes sense.

    Attributes:
        name, source: what it is called, and the equations it comes from.
        level, clip, aggregate, baseline: keys of LEVELS, CLIPS, AGGREGATES and advantage.BASELINES.
        clip_low, clip_high: the ratio is held to [1 - clip_low, 1 + clip_high]; clip_high may be inf (no bound).
        kl_coef: weight of the KL term to a frozen reference; 0 needs no reference.

    Raises:
        ConfigError: an unknown key, a bound out of range, or two dials that contradict each other.
    """

    name: str
    level: str
    clip: str
    aggregate: str
    clip_low: float
    clip_high: float
    baseline: str
    kl_coef: float
    source: str

    def __post_init__(self) -> None:
        level, aggregate = lookup(LEVELS, self.level, "level"), lookup(AGGREGATES, self.aggregate, "aggregate")
        lookup(CLIPS, self.clip, "clip")
        lookup(BASELINES, self.baseline, "baseline")
        # Written so that NaN fails every one of them.
        if not 0 <= self.clip_low < 1:
            raise ConfigError(f"clip_low={self.clip_low}: the lowest ratio is 1 - clip_low; set it in [0, 1)")
        if not self.clip_high >= 0:
            raise ConfigError(f"clip_high={self.clip_high}: the highest ratio is 1 + clip_high; set it to 0 or more")
        if not 0 <= self.kl_coef < math.inf:
            raise ConfigError(f"kl_coef={self.kl_coef}: a penalty has a finite weight; set it to 0 or more")
        if level.unit == "sequence" and aggregate.unit == "token":
            raise ConfigError(
                f"level={self.level!r} has one ratio per sequence, and aggregate={self.aggregate!r} would weight it by "
                "the length of the response; set aggregate='sequence_mean', or level='token' or 'sequence_token'"
            )

    def warnings(self) -> list[str]:
        """What is allowed but hardly meant, one sentence each: a clip range too wide to act at this level."""
        widest = LEVELS[self.level].widest_clip
        wide = [f"{name}={getattr(self, name)}" for name in ("clip_low", "clip_high") if getattr(self, name) > widest]
        return wide and [
            f"{', '.join(wide)} can hardly act at level {self.level!r}, where the ratio is a mean over the response "
            f"and stays within {widest} of 1; usual: clip_low=3e-4, clip_high=4e-4, for about ten tokens 3e-2 and 4e-2"
        ]


VARIANTS = {
    row.name: row
    for row in (
        Variant(
            name="gspo",
            level="sequence_mean",
            clip="ppo",
            aggregate="sequence_mean",
            clip_low=3e-4,
            clip_high=4e-4,
            baseline="mean_std",
            kl_coef=0.0,
            source="arXiv:2507.18071 Eq. 5-7, clip range of section 5.1",
        ),
        Variant(
            name="gspo_token",
            level="sequence_token",
            clip="ppo",
            aggregate="sequence_mean",
            clip_low=3e-4,
            clip_high=4e-4,
            baseline="mean_std",
            kl_coef=0.0,
            source="arXiv:2507.18071 Eq. 13-14",
        ),
        # The ratio of whole responses, without the 1 / |y| of Eq. 7.
        Variant(
            name="gspo_sum",
            level="sequence_sum",
            clip="ppo",
            aggregate="sequence_mean",
            clip_low=0.2,
            clip_high=0.2,
            baseline="mean",
            kl_coef=0.01,
            source="the tutorial chapter on GSPO, sections 4.1 and 4.2",
        ),
        # DeepSeekMath itself uses a KL weight of 0.04. Here it is 0: this row is what GSPO is compared with, the GSPO
        # paper writes both without KL, and a comparison should not cost one side a second model in memory.
        Variant(
            name="grpo",
            level="token",
            clip="ppo",
            aggregate="sequence_mean",
            clip_low=0.2,
            clip_high=0.2,
            baseline="mean_std",
            kl_coef=0.0,
            source="arXiv:2402.03300 Eq. 3 without its KL term = arXiv:2507.18071 Eq. 2-3",
        ),
        Variant(
            name="dapo",
            level="token",
            clip="ppo",
            aggregate="token_mean",
            clip_low=0.2,
            clip_high=0.28,
            baseline="mean_std",
            kl_coef=0.0,
            source="arXiv:2503.14476 Eq. 8",
        ),
    )
}

_DIALS = {field.name: field for field in fields(Variant) if field.name not in ("name", "source")}


def resolve_variant(name: str, /, **overrides: str | float | None) -> Variant:
    """The row `name` of VARIANTS with some of its dials turned; None leaves a dial as it is.

    Example: resolve_variant("gspo", clip_low=3e-2, clip_high=4e-2).

    Raises:
        ConfigError: unknown name or dial (with the nearest right one), or a combination that Variant refuses.
    """
    row = lookup(VARIANTS, name, "variant")
    for dial in overrides:
        lookup(_DIALS, dial, "variant setting")
    return replace(row, **{dial: value for dial, value in overrides.items() if value is not None})  # type: ignore[arg-type]
