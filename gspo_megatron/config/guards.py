"""Settings of section `guards`: checks while running."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.config.declarations import setting


@dataclass(frozen=True)
class GuardConfig:
    """Checks while running. `stop` ends the run with status 70, `skip` skips the update; either way its rollouts are
    written to guards/."""

    on_nonfinite: str = setting(
        "stop",
        "What a non-finite loss or gradient does. A non-finite log-prob before the updates always stops the run.",
        choices=("stop", "skip"),
    )
    grad_norm_spike: float = setting(
        0.0,
        "A gradient norm is a spike above this many times the median of the last 20 updates that were applied and had "
        "a gradient, of at least 5; those of the warm start are on their own. 0: off; else above 1.",
    )
    on_spike: str = setting("skip", "What a spike does.", choices=("stop", "skip"))
    ratio_noise: float = setting(
        0.0, "Stop when a ratio of a step's first update differs from 1 by more than this. 0: off.", least=0
    )
    entropy_drop: float = setting(
        0.0,
        "Warn when the entropy is below this share of its mean over the first 5 steps, such as 0.1. 0: off.",
        least=0,
        below=1,
    )
    length_growth: float = setting(
        3.0,
        "Warn when the mean length of responses is above this many times its median over the last 20 steps. 0: off; "
        "else above 1.",
        least=0,
    )
    kl_old: float = setting(
        0.5, "Warn when kl/old, how far the updates of a step move the policy, is above this. 0: off.", least=0
    )
    kl_ref: float = setting(0.0, "Warn when kl/ref is above this. 0: off.", least=0)
    sampler_far: float = setting(
        0.1,
        "Warn when sampler/far_fraction, the share of tokens that are twice or half as likely for the sampler, is "
        "above this. 0: off.",
        least=0,
        below=1,
    )
    left_out: float = setting(
        0.5,
        "Warn when sampler/left_out_fraction, the share of tokens to which algorithm.correction gives weight 0, is "
        "above this. 0: off.",
        least=0,
        below=1,
    )
    stop_on: list[str] = setting(
        [],
        "Rules that stop the run where they would warn, by name, such as [entropy_drop, kl_ref]; docs/stability.md "
        "lists them.",
    )
    on_memory: str = setting(
        "stop",
        "What an estimate of more memory than a GPU has free does at the start: refuse to run, or warn.",
        choices=("stop", "warn"),
    )
    check_replicas_every: int = setting(
        0, "Steps between checks that all copies of a parameter are equal. 0: off.", least=0
    )
