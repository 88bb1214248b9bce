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
        "A gradient norm is a spike above this many times the median of the last 20 updates. 0: off; else above 1.",
    )
    on_spike: str = setting("skip", "What a spike does.", choices=("stop", "skip"))
    ratio_noise: float = setting(
        0.0, "Stop when a ratio of a step's first update differs from 1 by more than this. 0: off.", least=0
    )
    on_memory: str = setting(
        "stop",
        "What an estimate of more memory than a GPU has free does at the start: refuse to run, or warn.",
        choices=("stop", "warn"),
    )
    check_replicas_every: int = setting(
        0, "Steps between checks that all copies of a parameter are equal. 0: off.", least=0
    )
