"""The algorithm that the settings describe, and the properties of it that the rest of a run needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from gspo_megatron.base.replay import Replay, replay_of
from gspo_megatron.config.sections import Config
from gspo_megatron.log_probs import Scoring
from gspo_megatron.objective import PolicyObjective, Variant, resolve_variant
from gspo_megatron.objective.dials import make_dial


@dataclass(frozen=True)
class Algorithm:
    """What is minimised, and how rollouts are used for it.

    Attributes:
        variant: the row of the table of algorithms, with the settings' overrides.
        kl_in_reward: the KL to the reference is subtracted from the reward, and is no term of the loss.
        updates_per_rollout: mini-batches that a rollout batch is split into, each used for one update.
        old_log_probs: what computes the log-probs of the policy at the start of a step: a forward pass of the
            `trainer`, the `sampler`, or the `update` itself, if a rollout batch has only one.
        replay: whose experts are recorded, and where they are used again.
        router_shift_floor: the least that a ratio is multiplied by for a shift of the routers; None: ratios are not.
        masks_sampling: log-probs are of the ids that top-k and top-p kept when the token was sampled.
        drops_truncated: responses without an end are not trained on.
        balances_load: the router's load-balancing loss is on, so every token has a gradient.
        skip_zero_gradient: leave out what has no gradient, where that is possible.
        temperature: of the distribution that is sampled and scored, softmax(z / temperature).
        cache_bytes: memory in which log-probs may keep exponentials for their backward.
        log_prob_backend: whose kernels compute them.
    """

    variant: Variant
    kl_estimator: str
    kl_in_reward: bool
    entropy_coef: float
    updates_per_rollout: int
    old_log_probs: str
    replay: Replay
    router_shift_floor: float | None
    masks_sampling: bool
    drops_truncated: bool
    balances_load: bool
    skip_zero_gradient: bool
    temperature: float
    cache_bytes: int
    log_prob_backend: str

    @classmethod
    def of(cls, config: Config) -> Algorithm:
        """The algorithm of these settings.

        Raises:
            ConfigError: an unknown name, or a combination that makes no sense.
        """
        a = config.algorithm
        variant = resolve_variant(
            a.variant,
            dials=a.dials,
            clip_low=a.clip_low,
            clip_high=a.clip_high,
            baseline=a.advantage,
            kl_coef=a.kl_coef,
            correction=a.correction,
        )
        variant = _following(variant, config)
        in_reward = a.kl_in == "reward"
        # A reward is known before an update, and so are the log-probs that it depends on.
        by_itself = a.old_log_probs == "auto" and a.updates_per_rollout == 1 and not in_reward
        return cls(
            variant=variant,
            kl_estimator=a.kl_estimator,
            kl_in_reward=in_reward,
            entropy_coef=a.entropy_coef,
            updates_per_rollout=a.updates_per_rollout,
            old_log_probs="sampler" if a.old_log_probs == "rollout" else "update" if by_itself else "trainer",
            replay=replay_of(a.routing_replay, a.router_shift_floor),
            router_shift_floor=a.router_shift_floor,
            masks_sampling=a.sampling_mask,
            drops_truncated=a.drop_truncated,
            balances_load=config.model.aux_loss_coef > 0,
            skip_zero_gradient=config.train.skip_zero_gradient,
            temperature=config.rollout.temperature,
            cache_bytes=int(config.train.log_prob_store_gib * 2**30),
            log_prob_backend=config.train.log_prob_backend,
        )

    def __str__(self) -> str:
        """`gspo: level sequence_mean, clip ppo (low 0.0003, high 0.0004), ..., no KL term`: with every parameter but
        infinite ones, which have no effect, and a correction if there is one."""
        dials = []
        for kind, dial in self.variant.dials.items():
            if dial is self.variant.correction and not self.variant.correction.acts:
                continue
            given = {name: value for name, value in dial.parameters().items() if math.isfinite(value)}
            parameters = ", ".join(f"{name} {value:g}" for name, value in given.items())
            dials.append(f"{kind} {dial.name}" + (f" ({parameters})" if parameters else ""))
        if self.router_shift_floor is not None:
            dials.append(f"router shift (floor {self.router_shift_floor:g})")
        kl = f"KL {self.kl_estimator} to the reference with weight {self.variant.kl_coef:g}"
        kl += " in the reward" if self.kl_in_reward else ""
        kl += ", by returns of tokens" if self.has_token_advantages else ""
        return f"{self.variant.name}: {', '.join(dials)}, {kl if self.needs_reference else 'no KL term'}"

    @property
    def objective(self) -> PolicyObjective:
        kl_coef = 0.0 if self.kl_in_reward else None  # measured in either case
        return PolicyObjective(
            self.variant,
            kl_coef=kl_coef,
            kl_estimator=self.kl_estimator,
            entropy_coef=self.entropy_coef,
            router_shift_floor=self.router_shift_floor,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the policy, as of the first step, is kept and scored."""
        return self.variant.kl_coef > 0

    @property
    def has_token_advantages(self) -> bool:
        """Whether tokens have advantages of their own, by their returns: what KL in the reward leaves from them on."""
        return self.kl_in_reward and self.variant.baseline.of_returns and self.variant.unit == "token"

    @property
    def scores_old(self) -> bool:
        """Whether a forward pass ahead of the updates scores the old log-probs."""
        return self.old_log_probs == "trainer"

    @property
    def drops_zero_advantage(self) -> bool:
        """Whether sequences of advantage 0 stay out of an update: nothing but the advantage gives them a gradient. With
        KL in the reward advantages are not known when sequences are packed."""
        return self.skip_zero_gradient and not (self.needs_reference or self.entropy_coef or self.balances_load)

    @property
    def scoring(self) -> Scoring:
        """How an update scores trained tokens."""
        return Scoring(
            temperature=self.temperature,
            with_entropy=True,
            # The gradient of an entropy needs the logits themselves.
            store_bytes=0 if self.entropy_coef else self.cache_bytes,
            # The one update of a rollout batch finds ratios of 1: the clip holds nothing.
            skip_zero_rows=self.skip_zero_gradient
            and (self.updates_per_rollout > 1 or self.old_log_probs == "sampler" or self.variant.correction.acts),
            backend=self.log_prob_backend,
        )


def _following(variant: Variant, config: Config) -> Variant:
    """The variant with the parameters that follow other settings, such as a longest response, unless dials has them."""
    for kind, dial in variant.dials.items():
        for parameter, key in dial.follows.items():
            section, _, name = key.partition(".")
            if f"{kind}.{parameter}" not in config.algorithm.dials:
                followed: Any = make_dial(
                    type(dial), dial.parameters() | {parameter: getattr(getattr(config, section), name)}
                )
                variant = replace(variant, **{kind: followed})
    return variant
