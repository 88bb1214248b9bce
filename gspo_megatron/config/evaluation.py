"""Settings of section `eval`: held-out sets, and what their metrics decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gspo_megatron.config.declarations import setting


@dataclass(frozen=True)
class EvalConfig:
    """Held-out sets besides data.eval, and what their metrics decide; docs/evaluation.md has more. They are measured
    with data.eval: before the first step, after the last, and every train.eval_every steps."""

    sets: dict[str, Any] = setting(
        {},
        "Sets by name, each a source as in data.train, or {source: ..., n: 8}, with size (prompts; null: all), n "
        "(responses to each), k (of pass@k and maj@k, such as [1, 8]), temperature, top_p, top_k, max_new_tokens, "
        "reward, by (a field to split results by), and settings of section data for itself.",
    )
    rollouts: int = setting(
        64, "Responses of each set, and of data.eval, written to rollouts/eval_*.jsonl. -1: all.", least=-1
    )
    patience: int = setting(
        0, "End the run after this many evaluations in a row without a new largest eval.stop_metric. 0: off.", least=0
    )
    stop_metric: str = setting("eval/accuracy", "The metric that eval.patience watches.")
