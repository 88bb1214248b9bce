"""The two losses: a row of `variants.VARIANTS`, and the negative log-likelihood of a warm start.

R  response tokens of all sequences, packed end to end      S  sequences
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError, lookup
from gspo_megatron.base.metrics import LossTerms, Metric
from gspo_megatron.objective.corrections import gap_metrics, gap_to_sampler
from gspo_megatron.objective.dials import Surrogate, Tokens
from gspo_megatron.objective.kl import KL_ESTIMATORS, k3
from gspo_megatron.objective.segments import Segments
from gspo_megatron.objective.variants import Variant


class PolicyObjective:
    """loss = aggregate(-correction * clip(level(log_probs - old_log_probs)) + kl_coef * KL - entropy_coef * entropy)

    The variant supplies level, clip, aggregate and correction. KL and entropy are per-token terms, combined by the same
    aggregate.

    Metrics, to be merged over micro-batches and ranks: ratio/mean, ratio/min, ratio/max, over sequences or tokens
    depending on the level (min and max of an empty batch are inf and -inf). As means over response tokens:
    clip_fraction (a bound of the clip acts) and its parts clip_fraction_low and _high; kl/old, the k3 estimate of
    KL(old || policy), whose tokens come from old; kl/ref, the chosen estimate of KL(policy || ref), entropy, and
    sampler/*, the distance between the old policy and the sampler, where given.

    Args:
        variant: a row, from `resolve_variant`.
        kl_coef: weight of the KL term; the variant's own by default.
        kl_estimator: a key of KL_ESTIMATORS; kl.py says how their gradients differ.
        entropy_coef: weight of the entropy bonus, 0 or more.
        router_shift_floor: RSPO (2510.23027): ratios w_t become sg[max(exp(-shift_t), floor)] w_t, ahead of level and
            clip; None: they do not.

    Raises:
        ConfigError: unknown estimator, a weight that is negative or not finite, or a floor outside (0, 1).
    """

    def __init__(
        self,
        variant: Variant,
        *,
        kl_coef: float | None = None,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
        router_shift_floor: float | None = None,
    ) -> None:
        self.variant = variant if kl_coef is None else replace(variant, kl_coef=kl_coef)
        self.kl = lookup(KL_ESTIMATORS, kl_estimator, "kl_estimator")
        if not 0 <= entropy_coef < math.inf:
            raise ConfigError(f"entropy_coef={entropy_coef}: a bonus has a finite weight; set it to 0 or more")
        if router_shift_floor is not None and not 0 < router_shift_floor < 1:
            raise ConfigError(f"router_shift_floor={router_shift_floor}: the least of a weight up to 1; try 0.8")
        self.entropy_coef, self.router_shift_floor = entropy_coef, router_shift_floor

    def __call__(
        self,
        log_probs_T: Tensor,
        old_log_probs_T: Tensor,
        advantages_S: Tensor,
        segments: Segments,
        *,
        token_advantages_T: Tensor | None = None,
        sampler_log_probs_T: Tensor | None = None,
        ref_log_probs_T: Tensor | None = None,
        entropy_T: Tensor | None = None,
        router_shift_T: Tensor | None = None,
        num_sequences: int | None = None,
        num_tokens: int | None = None,
    ) -> LossTerms:
        """This micro-batch's share of the update's loss; the shares of all micro-batches and ranks add up to it.

        Computed in float32, or in float64 when log_probs_T is. Only response tokens are passed: arguments in T are [R].
        Gradient flows only to log_probs_T and entropy_T. Without tokens the loss is 0 and still has an (empty)
        gradient, so that every rank can call backward.

        Args:
            log_probs_T, old_log_probs_T: under the policy, and under the old one.
            advantages_S: one per sequence, including empty responses (whose advantage is ignored).
            token_advantages_T: an advantage for each token in place of advantages_S    (2507.18071 Eq. 14, gspo_token).
            sampler_log_probs_T: of what drew the tokens; required by a correction, otherwise only measured.
            ref_log_probs_T, entropy_T: required where kl_coef or entropy_coef is not 0; otherwise only measured.
            router_shift_T: mean |log p - log p_old| of the routers, 0 or more; required where it has a floor.
            num_sequences, num_tokens: non-empty responses and response tokens of the whole update over all ranks;
                by default of this batch.

        Raises:
            ConfigError: a term has a weight other than 0, or a correction acts, and its input is missing; or advantages
                of tokens for one ratio per sequence.
        """
        # Different shapes may broadcast, to numbers that look right.
        others = (token_advantages_T, sampler_log_probs_T, ref_log_probs_T, entropy_T, router_shift_T)
        packed = [x_T for x_T in (log_probs_T, old_log_probs_T, *others) if x_T is not None]
        assert all(x_T.shape == segments.index_R.shape for x_T in packed), [x_T.shape for x_T in packed]
        assert advantages_S.shape == segments.lengths_S.shape, advantages_S.shape
        variant, dtype = self.variant, torch.promote_types(log_probs_T.dtype, torch.float32)
        log_probs_R, old_log_probs_R = log_probs_T.to(dtype), old_log_probs_T.detach().to(dtype)

        advantages_R = segments.spread(advantages_S) if token_advantages_T is None else token_advantages_T
        if token_advantages_T is not None and variant.unit == "sequence":
            raise ConfigError(
                f"level={variant.level.name!r} has one ratio per sequence, and so one advantage; for advantages of "
                "tokens use level='sequence_token' (the row gspo_token)"
            )
        log_weight_R, of_shift = self._log_weight(router_shift_T, dtype)
        tokens = Tokens(log_probs_R, old_log_probs_R, advantages_R.detach().to(dtype), log_weight_R)
        surrogate = variant.clip.surrogate(tokens, lambda log_R: variant.level.log_ratio(log_R, segments))
        weight_R, of_sampler = self._correction(tokens, segments, sampler_log_probs_T)
        terms_R = -surrogate.terms_R if weight_R is None else -weight_R * surrogate.terms_R
        metrics = self._ratio_metrics(surrogate, segments) | of_sampler | of_shift
        metrics["kl/old"] = _token_mean(k3(old_log_probs_R, log_probs_R.detach()))
        kl_R = None if ref_log_probs_T is None else self.kl(log_probs_R, ref_log_probs_T.detach().to(dtype))
        for name, coef, values_R in (("kl/ref", variant.kl_coef, kl_R), ("entropy", -self.entropy_coef, entropy_T)):
            if values_R is not None:
                metrics[name] = _token_mean(values_R)
                # Not 0 * values: a NaN in what is only measured must not reach the loss.
                terms_R = terms_R + coef * values_R if coef else terms_R
            elif coef:
                raise ConfigError(f"{name} has weight {abs(coef)}: pass ref_log_probs_T or entropy_T, or set it to 0")

        # An update without tokens divides 0 by 1.
        num_sequences = max(segments.num_sequences if num_sequences is None else num_sequences, 1)
        num_tokens = max(segments.num_tokens if num_tokens is None else num_tokens, 1)
        loss = variant.aggregate.share(terms_R, segments, num_sequences, num_tokens)
        return LossTerms(loss.to(dtype), metrics)

    def _log_weight(self, shift_R: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, dict[str, Metric]]:
        """The log of what ratios are multiplied by for the routers' shift, None for 1, and what is known of that."""
        if self.router_shift_floor is None:
            return None, {}
        if shift_R is None:
            raise ConfigError(f"router_shift_floor={self.router_shift_floor}: pass router_shift_T, or set it to None")
        floor = math.log(self.router_shift_floor)
        log_weight_R = (-shift_R.detach().to(dtype)).clamp(min=floor)
        metrics = {
            "router/shift_weight": _token_mean(log_weight_R.exp()),
            "router/shift_floor_fraction": _token_mean(log_weight_R <= floor),
        }
        return log_weight_R, metrics

    def _correction(
        self, tokens: Tokens, segments: Segments, sampler_log_probs_R: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Metric]]:
        """The weight of each token, None for 1, and what is known of the distance to the sampler."""
        correction = self.variant.correction
        if sampler_log_probs_R is None:
            if correction.acts:
                raise ConfigError(
                    f"correction={correction.name!r} weighs tokens by the sampler's log-probs: pass "
                    "sampler_log_probs_T, or set it to 'none'"
                )
            return None, {}
        frozen = tokens._replace(log_probs_R=tokens.log_probs_R.detach())
        gap_R, known_R = gap_to_sampler(
            tokens.old_log_probs_R, sampler_log_probs_R.detach().to(tokens.old_log_probs_R.dtype)
        )
        metrics = gap_metrics(gap_R, known_R)
        if not correction.acts:
            return None, metrics
        weight_R = correction.weights(gap_R, frozen, segments)
        metrics |= {"sampler/weight": _token_mean(weight_R), "sampler/left_out_fraction": _token_mean(weight_R == 0)}
        return weight_R, metrics

    def _ratio_metrics(self, surrogate: Surrogate, segments: Segments) -> dict[str, Metric]:
        ratio_R = surrogate.ratio_R.detach()
        weight_R = segments.share_R if self.variant.level.unit == "sequence" else torch.ones_like(segments.share_R)
        some = ratio_R.numel() > 0
        return {
            "ratio/mean": Metric((ratio_R * weight_R).sum(), weight_R.sum()),
            "ratio/min": Metric(ratio_R.amin() if some else math.inf, reduction="min"),
            "ratio/max": Metric(ratio_R.amax() if some else -math.inf, reduction="max"),
            "clip_fraction": _token_mean(surrogate.clipped_low_R | surrogate.clipped_high_R),
            "clip_fraction_low": _token_mean(surrogate.clipped_low_R),
            "clip_fraction_high": _token_mean(surrogate.clipped_high_R),
        }


class LikelihoodObjective:
    """loss = -(1 / num_tokens) sum_t log pi(y_t): a supervised warm start on written solutions."""

    def __call__(self, log_probs_T: Tensor, segments: Segments, *, num_tokens: int | None = None) -> LossTerms:
        """This micro-batch's share, as in PolicyObjective; log_probs_T is [R]. No metrics besides the loss."""
        num_tokens = segments.num_tokens if num_tokens is None else num_tokens
        dtype = torch.promote_types(log_probs_T.dtype, torch.float32)
        return LossTerms((-log_probs_T.sum(dtype=torch.float64) / max(num_tokens, 1)).to(dtype), {})


def _token_mean(values_R: Tensor) -> Metric:
    return Metric(values_R.detach().sum(dtype=torch.float64), values_R.numel())
