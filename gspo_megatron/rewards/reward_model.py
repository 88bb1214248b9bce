"""Scores from a reward model: a sequence classifier in a Hugging Face folder, in a process of its own.

The process (`worker.py`) loads it with transformers (`classifier.py`), so that the training process keeps its memory,
its dtype and its random numbers to itself. Each rank that scores starts one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards.functions import Arguments, Outcome
from gspo_megatron.rewards.parameters import number, read
from gspo_megatron.rewards.workers import WorkerPool

TERM = "reward_model"
TRIAL = {"prompt": "What is 2 + 2?", "response": "2 + 2 = 4", "messages": []}


@dataclass(frozen=True, kw_only=True)
class RewardModelParameters:
    """
    Attributes:
        model: the folder, with config.json, weights and tokenizer.
        device: of torch, such as cpu or, of a GPU, its type and number.
        dtype: of torch, such as bfloat16; auto: that of the folder.
        label: which class's probability is the score. None: the model has one output, which is the score.
        batch_size: rollouts in a forward.
        max_tokens: a longer conversation is an error of its rollout. None: what the model's positions allow.
        timeout_s: of a batch, and of loading.

    Raises:
        ConfigError: not such a folder.
    """

    model: str
    device: str = "cpu"
    dtype: str = "auto"
    label: int | None = None
    batch_size: int = number(8, least=1)
    max_tokens: int | None = number(None, least=1)
    timeout_s: float = number(300.0, above=0)

    def __post_init__(self) -> None:
        try:
            architectures = json.loads((Path(self.model) / "config.json").read_text())["architectures"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"model={self.model!r} is not the folder of a model ({type(error).__name__}: {error}); name one on "
                "this machine, with a config.json that has architectures"
            ) from error
        if not any("SequenceClassification" in str(name) for name in architectures or ()):
            raise ConfigError(
                f"model={self.model!r} is a {architectures}; a reward model is a ...ForSequenceClassification"
            )


class RewardModel:
    """See `Service`."""

    takes = ("prompt", "response", "messages")
    groups_at_once = 4  # one process: the next group waits while another is scored

    def __init__(self, parameters: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        p = self._parameters = read(RewardModelParameters, parameters)
        self.longest_s = p.timeout_s
        passed = {k: v for k, v in asdict(p).items() if k not in ("batch_size", "timeout_s")}
        function = ("gspo_megatron.rewards.classifier:scores", passed)
        self._pool = WorkerPool({TERM: function}, timeout_s=p.timeout_s, memory_gib=0, limit="timeout_s")

    def submit(self, items: Sequence[Arguments], ids: Sequence[int]) -> list[Future[list[Outcome]]]:
        size = self._parameters.batch_size
        return [self._pool.submit(TERM, items[i : i + size], ids[i : i + size]) for i in range(0, len(items), size)]

    def check(self) -> None:
        (outcome,) = self._pool.submit(TERM, [TRIAL], [0]).result()
        if outcome.error:
            raise ConfigError(f"model={self._parameters.model!r}: {outcome.error}")

    def close(self) -> None:
        self._pool.close()
