"""The algorithm that the settings name."""

from __future__ import annotations

from gspo_megatron.config.sections import Config
from gspo_megatron.objective import (
    Variant,
    resolve_variant,
)
from gspo_megatron.rewards.rewards import Rewards


def variant_of(config: Config) -> Variant:
    """The algorithm that the settings name, with their overrides. Raises ConfigError for one that makes no sense."""
    a = config.algorithm
    return resolve_variant(
        a.variant, dials=a.dials, clip_low=a.clip_low, clip_high=a.clip_high, baseline=a.advantage, kl_coef=a.kl_coef
    )


def rewards_of(config: Config) -> Rewards:
    """The rewards that the settings name. Raises ConfigError for a name or function that cannot be used."""
    return Rewards(config.reward.functions, config.reward.accuracy, config.reward.on_error)
