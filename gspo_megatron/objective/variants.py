"""One row per algorithm: its dials, and the source of its equation.

A row names one dial of each kind, with the dial's parameters: a level (what has a ratio), a clip (the surrogate), an
aggregate (which mean over tokens) and a baseline (what a reward is compared with). No row has a correction, the sixth
dial: what samples is not a matter of the algorithm. To add an algorithm:
1. If existing dials suffice, add a row to VARIANTS below.
2. A new dial is a frozen dataclass that extends Level, Clip, Aggregate or Baseline (dials.py): `name`, its parameters
   as fields, their ranges in `__post_init__`, and one method, the equation. It goes into a file of its own, or into
   that of its kind.
3. Add it to the table of its kind (LEVELS, CLIPS, AGGREGATES or BASELINES) in one line. It can then be chosen by name;
   loss.py, the settings and the trainer do not change. Set its parameters with `algorithm.dials.clip.low=0.1`.
4. Write the equation again as a plain loop, a row of ORACLES in tests/support/oracles.py. Tests reject a row without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gspo_megatron.base.errors import ConfigError, did_you_mean, lookup
from gspo_megatron.objective.advantage import (
    BASELINES,
    BatchMeanStd,
    GroupMean,
    GroupMeanBatchStd,
    GroupMeanStd,
    LeaveOneOut,
    MeanNormalised,
)
from gspo_megatron.objective.aggregates import AGGREGATES, ConstantLength, SequenceMean, SequenceSum, TokenMean
from gspo_megatron.objective.clips import CLIPS, LogClip, PpoClip, SoftGate
from gspo_megatron.objective.corrections import CORRECTIONS, NO_CORRECTION
from gspo_megatron.objective.dials import (
    Aggregate,
    Baseline,
    Clip,
    Correction,
    Dial,
    Level,
    Unit,
    make_dial,
    no_such_parameter,
)
from gspo_megatron.objective.levels import LEVELS, SequenceMeanLevel, SequenceSumLevel, SequenceTokenLevel, TokenLevel
from gspo_megatron.objective.weights import BinaryKlMask, CappedWeight, GammaWeight, Reinforce, TotalVariationMask

DIALS: dict[str, Mapping[str, type[Dial]]] = {
    "level": LEVELS,
    "clip": CLIPS,
    "aggregate": AGGREGATES,
    "baseline": BASELINES,
    "correction": CORRECTIONS,
}
"""Kinds of dials, which are fields of Variant, and the dials of each kind by name."""

SHORTHAND = {"clip_low": "clip.low", "clip_high": "clip.high"}
"""Parameters that `resolve_variant` also accepts by a short name."""


@dataclass(frozen=True)
class Variant:
    """An algorithm, validated on construction.

    Attributes:
        name: of the row.
        level, clip, aggregate, baseline, correction: its dials, each with its parameters.
        source: the equations it comes from.
        kl_coef: weight of the KL term to a frozen reference; 0 needs no reference.
        note: where its parameters come from, and what differs from the paper.

    Raises:
        ConfigError: a dial of the wrong kind, a weight out of range, or two dials that cannot be combined.
    """

    name: str
    level: Level
    clip: Clip
    aggregate: Aggregate
    baseline: Baseline
    source: str
    kl_coef: float = 0.0
    correction: Correction = NO_CORRECTION
    note: str = ""

    def __post_init__(self) -> None:
        for kind, dial in self.dials.items():
            if not isinstance(dial, Dial) or dial.kind != kind:
                classes = ", ".join(f"{row.__name__}(...)" for row in DIALS[kind].values())
                raise ConfigError(f"{kind}={dial!r} of variant {self.name!r} is not a {kind}; use one of: {classes}")
        if not 0 <= self.kl_coef < math.inf:  # written so that NaN fails
            raise ConfigError(f"kl_coef={self.kl_coef}: a penalty has a finite weight; set it to 0 or more")
        for kind, dial in self.dials.items():
            if self.unit not in dial.units:
                others = _either(name for name, other in DIALS[kind].items() if self.level.unit in other.units)
                levels = _either(name for name, level in LEVELS.items() if level.unit in dial.units)
                raise ConfigError(
                    f"level={self.level.name!r} has one ratio per {self.level.unit}, and {kind}={dial.name!r} "
                    f"{dial.unit_reason}; set {kind}={others}, or level={levels}"
                )

    @property
    def unit(self) -> Unit:
        """What has its own gradient: one per sequence is not to be summed over the tokens by accident."""
        return "token" if self.clip.weighs_tokens else self.level.unit

    @property
    def dials(self) -> dict[str, Dial]:
        """Its dials by kind."""
        return {kind: getattr(self, kind) for kind in DIALS}

    @property
    def clip_low(self) -> float:
        """`clip.low`.

        Raises:
            ConfigError: the clip has no such parameter.
        """
        return self._parameter("clip_low")

    @property
    def clip_high(self) -> float:
        """`clip.high`.

        Raises:
            ConfigError: the clip has no such parameter.
        """
        return self._parameter("clip_high")

    def _parameter(self, short: str) -> float:
        kind, _, name = SHORTHAND[short].partition(".")
        dial = self.dials[kind]
        if name not in dial.parameter_names():
            raise ConfigError(no_such_parameter(type(dial), name, short))
        return dial.parameters()[name]

    def warnings(self) -> list[str]:
        """What is allowed but probably not intended, one sentence each: a clip range too wide to act at this level, or
        the dials of another row."""
        found = [warning for dial in self.dials.values() for warning in dial.warnings(self.level)]
        own, kinds = VARIANTS.get(self.name, self), [kind for kind in DIALS if kind != "correction"]
        changed = [kind for kind in kinds if self.dials[kind].name != own.dials[kind].name]
        for row in VARIANTS.values() if changed else ():
            if all(self.dials[kind].name == row.dials[kind].name for kind in kinds):
                given = ", ".join(f"{kind}={self.dials[kind].name}" for kind in changed)
                found.append(f"{self.name} with {given} has the dials of {row.name!r}; that row has its own parameters")
        return found + _narrow_bounds(self, own, found)


def _either(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))


NARROW = 1 / 4
"""A bound below this share of the row's own is one that another level needs: the 3e-2 and 4e-2 that suit the mean ratio
of ten tokens, where a row has 0.2 for each of them."""


def _narrow_bounds(variant: Variant, own: Variant, known: list[str]) -> list[str]:
    """A warning where a clip that does not bound a mean has the bounds of one, unless `known` names them already."""
    bounds_a_mean = variant.level.widest_clip < math.inf and not isinstance(variant.clip, LogClip)
    if bounds_a_mean or type(variant.clip) is not type(own.clip):
        return []
    now, rows = variant.clip.parameters(), own.clip.parameters()
    narrow = [
        (short, now[name], rows[name])
        for short, name in (("clip_low", "low"), ("clip_high", "high"))
        if name in now and now[name] < NARROW * rows[name] and not any(f"{short}=" in text for text in known)
    ]
    if not narrow:
        return []
    given = ", ".join(f"{short}={value:g}" for short, value, _ in narrow)
    usual = " and ".join(f"{value:g}" for _, _, value in narrow)
    cure = " and ".join(f"algorithm.{short}=null" for short, _, _ in narrow)
    of_product = variant.unit == "sequence" and variant.level.widest_clip == math.inf
    return [
        f"{given}: {variant.name!r} has {usual}; so narrow a band is for the mean ratio of a response, as in 'gspo', "
        f"and here it bounds {'a product of' if of_product else 'single'} tokens; set {cure} to take the row's"
    ]


SAMPLER_IS_OLD = "the paper's old policy is the sampler: `algorithm.old_log_probs=rollout`"

VARIANTS = {
    row.name: row
    for row in (
        Variant(
            "gspo",
            SequenceMeanLevel(),
            PpoClip(3e-4, 4e-4),
            SequenceMean(),
            GroupMeanStd(),
            "arXiv:2507.18071 Eq. 5-7",
            note="bounds of section 5.1",
        ),
        Variant(
            "gspo_token",
            SequenceTokenLevel(),
            PpoClip(3e-4, 4e-4),
            SequenceMean(),
            GroupMeanStd(),
            "arXiv:2507.18071 Eq. 13-14",
            note="bounds of section 5.1",
        ),
        Variant(
            "gspo_sum",
            SequenceSumLevel(),
            PpoClip(0.2, 0.2),
            SequenceMean(),
            GroupMean(),
            "the tutorial chapter on GSPO, sections 4.1 and 4.2",
            kl_coef=0.01,
            note="the ratio of whole responses, without the 1 / |y| of 2507.18071 Eq. 7",
        ),
        Variant(
            "luspo",
            SequenceMeanLevel(),
            PpoClip(2e-3, 2.5e-3),
            SequenceSum(),
            GroupMeanStd(),
            "arXiv:2602.05261",
            note="`gspo` times |y|; bounds of section 5.1",
        ),
        Variant(
            "gmpo",
            SequenceMeanLevel(),
            LogClip(0.4, 0.4),
            SequenceMean(),
            GroupMeanStd(),
            "arXiv:2507.20673",
            note="tokens are clipped before their mean",
        ),
        Variant(
            "vespo",
            SequenceSumLevel(),
            GammaWeight(),
            TokenMean(),
            GroupMeanStd(),
            "arXiv:2602.10693",
            note=SAMPLER_IS_OLD,
        ),
        # GSPO is compared with this row, its paper writes both without KL, and a comparison should not cost one side a
        # second model in memory.
        Variant(
            "grpo",
            TokenLevel(),
            PpoClip(0.2, 0.2),
            SequenceMean(),
            GroupMeanStd(),
            "arXiv:2402.03300 Eq. 3 without its KL term = arXiv:2507.18071 Eq. 2-3",
            note="DeepSeekMath itself has a KL weight of 0.04",
        ),
        Variant(
            "dapo",
            TokenLevel(),
            PpoClip(0.2, 0.28),
            TokenMean(),
            GroupMeanStd(),
            "arXiv:2503.14476 Eq. 8",
            note="its sampling is `rollout.dynamic_sampling`; for overlong responses: the reward `length`, or "
            "`algorithm.drop_truncated`",
        ),
        Variant(
            "dr_grpo",
            TokenLevel(),
            PpoClip(0.2, 0.2),
            ConstantLength(3000),
            GroupMean(),
            "arXiv:2503.20783",
            note="neither std nor |y| in a denominator; 3000 is the paper's longest response",
        ),
        Variant(
            "cispo",
            TokenLevel(),
            CappedWeight(1.0, 4.0),
            TokenMean(),
            GroupMeanStd(),
            "arXiv:2506.13585 Eq. 4-5",
            note="the cap, 1 + high = 5, is that of ScaleRL (arXiv:2510.13786)",
        ),
        Variant("sapo", TokenLevel(), SoftGate(), SequenceMean(), GroupMeanStd(), "arXiv:2511.20347"),
        Variant(
            "dppo_tv",
            TokenLevel(),
            TotalVariationMask(),
            TokenMean(),
            GroupMeanStd(),
            "arXiv:2602.04879",
            note=SAMPLER_IS_OLD,
        ),
        Variant(
            "dppo_kl",
            TokenLevel(),
            BinaryKlMask(),
            TokenMean(),
            GroupMeanStd(),
            "arXiv:2602.04879",
            note=SAMPLER_IS_OLD,
        ),
        Variant("maxrl", TokenLevel(), PpoClip(0.2, 0.2), SequenceMean(), MeanNormalised(), "arXiv:2602.02710"),
        Variant("rloo", TokenLevel(), Reinforce(), SequenceSum(), LeaveOneOut(), "arXiv:2402.14740"),
        Variant("reinforce_pp", TokenLevel(), PpoClip(0.2, 0.2), SequenceMean(), BatchMeanStd(), "arXiv:2501.03262"),
        Variant(
            "reinforce_pp_baseline",
            TokenLevel(),
            PpoClip(0.2, 0.2),
            SequenceMean(),
            GroupMeanBatchStd(),
            "arXiv:2501.03262",
        ),
    )
}

_OVERRIDES = dict.fromkeys((*DIALS, *SHORTHAND, "kl_coef"))


def resolve_variant(
    name: str, /, *, dials: Mapping[str, float] | None = None, **overrides: str | float | Dial | None
) -> Variant:
    """The row `name` of VARIANTS with some settings overridden; None keeps the row's own.

    Example: resolve_variant("gspo", clip_low=3e-2, clip_high=4e-2)
           = resolve_variant("gspo", dials={"clip.low": 3e-2, "clip.high": 4e-2}).

    Args:
        dials: parameters by `dial.parameter`, of the row's dials or of those that `overrides` chooses.
        overrides: `kl_coef`; `level`, `clip`, `aggregate`, `baseline`, `correction`: another dial, by its name or as an
            object (the name of the row's own dial keeps its parameters); `clip_low`, `clip_high`: shorthand for two
            of `dials`.

    Raises:
        ConfigError: unknown name, setting, dial or parameter (suggests the closest), a parameter given twice, or a
            value or combination that a dial or Variant rejects.
    """
    row = lookup(VARIANTS, name, "variant")
    for setting in overrides:
        lookup(_OVERRIDES, setting, "variant setting")
    given: dict[str, Any] = {setting: value for setting, value in overrides.items() if value is not None}
    chosen = {kind: _chosen(dial, given.pop(kind, None)) for kind, dial in row.dials.items()}
    _set_parameters(chosen, dials or {}, {short: given.pop(short) for short in SHORTHAND if short in given})
    turned: dict[str, Any] = {kind: make_dial(dial, parameters) for kind, (dial, parameters) in chosen.items()}
    return replace(row, **turned, **given)


def _chosen(dial: Dial, choice: str | Dial | None) -> tuple[type[Dial], dict[str, float]]:
    """What the row's dial becomes: the class, and the parameters that it starts from."""
    if choice is None or choice == dial.name:
        return type(dial), dial.parameters()
    if isinstance(choice, Dial):
        return type(choice), choice.parameters()
    return lookup(DIALS[dial.kind], choice, dial.kind), {}


def _set_parameters(
    chosen: Mapping[str, tuple[type[Dial], dict[str, float]]], dials: Mapping[str, float], shorthand: dict[str, float]
) -> None:
    """Writes `dials` and `shorthand` into the parameters of the chosen dials."""
    settings = [(key, key, value) for key, value in dials.items()]
    settings += [(short, SHORTHAND[short], value) for short, value in shorthand.items()]
    for spelled, key, value in settings:
        kind, _, name = key.partition(".")
        if kind not in chosen:
            known = [f"{dial.kind}.{has}" for dial, _ in chosen.values() for has in dial.parameter_names()]
            near = did_you_mean(key, known) or did_you_mean(kind, DIALS) or "."
            raise ConfigError(
                f"{key}={value}: {kind!r} is not one of the dials {', '.join(DIALS)}{near} Their parameters here: "
                f"{', '.join(known) or 'none'}"
            )
        dial, parameters = chosen[kind]
        if name not in dial.parameter_names():
            # The settings of another row, which a file may have: clip_low without a bound to set.
            foreign = [short for short in shorthand if SHORTHAND[short].partition(".")[2] not in dial.parameter_names()]
            cure = "; set " + " and ".join(f"algorithm.{short}=null" for short in foreign) if spelled != key else ""
            if kind == "correction" and (
                owners := [n for n, row in CORRECTIONS.items() if name in row.parameter_names()]
            ):
                cure = f"; algorithm.correction chooses one that has it: {', '.join(owners)}"
            raise ConfigError(no_such_parameter(dial, name, f"{spelled}={value}") + cure)
        if spelled != key and key in dials:
            raise ConfigError(f"{spelled}={value} and {key}={dials[key]} set the same parameter; leave one of them out")
        parameters[name] = value
