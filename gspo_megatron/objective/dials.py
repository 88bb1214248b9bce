"""Dials: frozen objects that own their equation and their parameters. One base class for each kind.

    loss = -aggregate(correction * clip(level(log pi(y_t) - log pi_old(y_t)), baseline(rewards)))

All but the baseline work on one number per response token, [R]: a sequence-level quantity is repeated over the tokens
of its sequence. So a micro-batch, or a context-parallel rank, that holds some of the tokens computes its share
of the loss with the same code; an empty response has no tokens and contributes nothing; and KL and entropy terms fit
every algorithm.

    R  response tokens of all sequences, packed end to end      S  sequences      G  groups
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, TypeVar

from torch import Tensor

from gspo_megatron.base.errors import ConfigError, did_you_mean
from gspo_megatron.objective.segments import Segments

Unit = Literal["sequence", "token"]


@dataclass(frozen=True)
class Dial(ABC):
    """The dataclass fields, all numbers, are the dial's parameters; `__post_init__` rejects values out of range.

    Attributes:
        kind: the field of Variant that it goes into; set by the five base classes below.
        name: its name in settings, and its key in the table of its kind.
        units: the units of the levels that it can be combined with.
        unit_reason: completes "has one ratio per sequence, and this dial ..." where `units` leaves one out.
        follows: the setting that a run takes a parameter from, unless it is given.
        such_as: a value to begin with for a parameter that has no default.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    units: ClassVar[tuple[Unit, ...]] = ("sequence", "token")
    unit_reason: ClassVar[str] = ""
    follows: ClassVar[Mapping[str, str]] = MappingProxyType({})
    such_as: ClassVar[Mapping[str, float]] = MappingProxyType({})

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    def parameters(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.parameter_names()}

    def warnings(self, level: Level) -> list[str]:
        """Parameters that are allowed at this level but probably not intended, one sentence each."""
        return []


class Level(Dial):
    """What has a ratio, and how it is computed.

    Attributes:
        unit: what has its own ratio.
        widest_clip: a wider clip range hardly ever acts at this level.
        clip_advice: where `widest_clip` is finite, completes "too wide to act at level 'x', where ...".
    """

    kind = "level"
    unit: ClassVar[Unit]
    widest_clip: ClassVar[float] = math.inf
    clip_advice: ClassVar[str] = ""

    @abstractmethod
    def log_ratio(self, log_ratio_R: Tensor, segments: Segments) -> Tensor:
        """log pi(y_t) - log pi_old(y_t) of every token -> the log-ratio that every token sees, [R]."""


class Tokens(NamedTuple):
    """What is known of each response token. Only `log_probs_R` has a gradient. `log_weight_R`: the log of a factor
    of its ratio, ahead of level and clip; None for 1."""

    log_probs_R: Tensor
    old_log_probs_R: Tensor
    advantages_R: Tensor
    log_weight_R: Tensor | None = None

    @property
    def log_ratio_R(self) -> Tensor:
        """How far the token's log-prob has moved: for a rule that looks at probabilities."""
        return self.log_probs_R - self.old_log_probs_R

    @property
    def weighed_log_ratio_R(self) -> Tensor:
        """What a level takes: for a ratio that is averaged, clipped, or the weight of a term."""
        return self.log_ratio_R if self.log_weight_R is None else self.log_ratio_R + self.log_weight_R


class Surrogate(NamedTuple):
    """Each token's term of the objective (to be maximised), its ratio, and whether the lower or the upper bound acts:
    it removes the gradient, or caps its weight (bool; False in a rule without that bound)."""

    terms_R: Tensor
    ratio_R: Tensor
    clipped_low_R: Tensor
    clipped_high_R: Tensor


class Clip(Dial):
    """Each token's surrogate, and whether a bound is active.

    Attributes:
        weighs_tokens: the term is log pi(y_t) times a number without gradient. A token then has a gradient of its own
            at every level, and may be averaged over tokens.
        corrects: the surrogate depends on the old policy. One that does not is right for the first update only.
    """

    kind = "clip"
    weighs_tokens: ClassVar[bool] = False
    corrects: ClassVar[bool] = True

    @abstractmethod
    def surrogate(self, tokens: Tokens, level: Callable[[Tensor], Tensor]) -> Surrogate:
        """`level` is a function, so that a rule can bound either its input or its output."""

    @property
    def reach(self) -> float:
        """A distance of the ratio from 1 at which this rule acts. Tools draw their batches around it."""
        return 0.2


class Correction(Dial):
    """A weight for every token, where something else than the old policy has drawn it.

    Attributes:
        acts: weights differ from 1, and the sampler's log-probs are needed.
        ratio_of: what has a ratio to the sampler; None where nothing has.
    """

    kind = "correction"
    acts: ClassVar[bool] = True
    ratio_of: ClassVar[Level | None] = None

    @abstractmethod
    def weights(self, log_rho_R: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
        """From log_rho = log pi_old - log mu, mu the sampler, to weights. `tokens` has no gradient."""


class Aggregate(Dial):
    """From per-token terms to this micro-batch's share of the update's loss."""

    kind = "aggregate"

    @abstractmethod
    def share(self, terms_R: Tensor, segments: Segments, num_sequences: int, num_tokens: int) -> Tensor:
        """A scalar, summed in float64. The two counts, 1 or more, are those of the whole update over all ranks."""


@dataclass(frozen=True)
class Groups:
    """Which of the G groups each of the S sequences belongs to.

    Attributes:
        index_S: the group of each sequence, int64.
        size_S: the number of sequences in that group.
        num_groups: G.
    """

    index_S: Tensor
    size_S: Tensor
    num_groups: int

    def sum(self, values_S: Tensor) -> Tensor:
        """The sum over the group of each sequence: [S] -> [S]."""
        return values_S.new_zeros(self.num_groups).index_add(0, self.index_S, values_S)[self.index_S]

    def mean(self, values_S: Tensor) -> Tensor:
        """The mean over the group of each sequence: [S] -> [S]."""
        return self.sum(values_S) / self.size_S


class Baseline(Dial):
    """What a reward is compared with.

    Attributes:
        scope: whose rewards it is compared with, those of its group or of the whole batch. Where they are all equal,
            advantages are 0. In a scope "none" a reward stands for itself.
        of_returns: where a reward comes token by token, as with KL in the reward, and a token has a ratio of its own,
            each token has an advantage: that of what it and the tokens after it earn.
    """

    kind = "baseline"
    scope: ClassVar[Literal["group", "batch", "none"]] = "group"
    of_returns: ClassVar[bool] = False

    @abstractmethod
    def advantages(self, rewards_S: Tensor, groups: Groups) -> Tensor:
        """[S] float64 -> [S]. In the scope "batch" all sequences are one group. Where all rewards of a group are equal,
        the result is ignored, except in the scope "none", and may be NaN."""


AnyDial = TypeVar("AnyDial", bound=Dial)


def table(*classes: type[AnyDial]) -> dict[str, type[AnyDial]]:
    """The dials of one kind, by name."""
    return {dial.name: dial for dial in classes}


def make_dial(dial: type[AnyDial], parameters: Mapping[str, float]) -> AnyDial:
    """The dial with these parameters, and defaults for the rest.

    Raises:
        ConfigError: an unknown parameter, a missing one that has no default, or a value that is not a number or that
            the dial rejects.
    """
    for name, value in parameters.items():
        if name not in dial.parameter_names():
            raise ConfigError(no_such_parameter(dial, name, f"{dial.kind}.{name}={value}"))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{dial.kind}.{name}={value!r}: a parameter of a dial is a number")
    required = [field.name for field in fields(dial) if field.default is MISSING]
    if missing := [name for name in required if name not in parameters]:
        keys = [f"{dial.kind}.{name}" for name in missing]
        shown = (f"={dial.such_as[name]:g}" if name in dial.such_as else "" for name in missing)
        fix = " and ".join(f"algorithm.dials.{key}{value}" for key, value in zip(keys, shown, strict=True))
        raise ConfigError(f"{dial.kind} {dial.name!r} needs {', '.join(keys)}: no default; set {fix}")
    return dial(**parameters)


def no_such_parameter(dial: type[Dial], name: str, given: str) -> str:
    """`clip.hihg=0.2: clip 'ppo' has no parameter 'hihg'; did you mean 'high'? It has: clip.low, clip.high`."""
    near = did_you_mean(name, dial.parameter_names()) or "."
    has = ", ".join(f"{dial.kind}.{known}" for known in dial.parameter_names()) or "none"
    return f"{given}: {dial.kind} {dial.name!r} has no parameter {name!r}{near} It has: {has}"
