"""The objective in pure torch: from log-probs and rewards to a loss, without process groups, devices or Megatron.

variants.py says how an algorithm is composed of dials, and how to add one.
"""

from gspo_megatron.objective.advantage import BASELINES, group_advantages, rewards_differ
from gspo_megatron.objective.kl import KL_ESTIMATORS
from gspo_megatron.objective.loss import LikelihoodObjective, PolicyObjective
from gspo_megatron.objective.segments import Segments
from gspo_megatron.objective.variants import VARIANTS, Variant, resolve_variant

__all__ = [
    "BASELINES",
    "KL_ESTIMATORS",
    "VARIANTS",
    "LikelihoodObjective",
    "PolicyObjective",
    "Segments",
    "Variant",
    "group_advantages",
    "resolve_variant",
    "rewards_differ",
]
