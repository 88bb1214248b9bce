"""The product's own draw inside vLLM: a custom logits processor, loaded by the engine's process.

    --logits-processors gspo_megatron.rollout.vllm_draw:CounterDraw --logprobs-mode processed_logits

A request asks vLLM for temperature 0, so vLLM takes the largest logit and skips its own temperature, top-k and top-p.
The processor draws the token itself and leaves only one logit: at the drawn token, its log-prob under the distribution
it was drawn from. `processed_logits` sends that number back as it is. Random numbers depend on seed, rollout id and
position alone (`sampling.uniforms`), so tokens do not depend on the batch, on the order of requests, or on where a
response was cut and continued.

What a request says about its draw is in `SamplingParams.extra_args[KEY]`, the fields of `Draw`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from gspo_megatron.rollout.engine_draws import KEY
from gspo_megatron.rollout.native.sampling import Decoding, distribution, draw, uniforms


class Draw(NamedTuple):
    """How the tokens of one request are drawn.

    Attributes:
        id: the rollout's.
        begin: position in the response of the first token that this request draws.
        num_ids: ids that may be drawn, from 0; the embedding may have more.
        forced: the tokens to take, whatever the random numbers say: the request only scores them.
    """

    seed: int
    id: int
    begin: int
    temperature: float
    top_k: int
    top_p: float
    num_ids: int
    forced: tuple[int, ...] = ()

    @classmethod
    def of(cls, params: SamplingParams) -> Draw:
        """
        Raises:
            ValueError: the request does not say how to draw.
        """
        said = (params.extra_args or {}).get(KEY)
        required = [field for field in cls._fields if field not in cls._field_defaults]
        if not isinstance(said, Mapping) or not set(required) <= set(said) <= set(cls._fields):
            raise ValueError(
                f"this engine draws tokens for a trainer: extra_args.{KEY} must hold {', '.join(required)}, got {said}"
            )
        return cls(**{**said, "forced": tuple(said.get("forced", ()))})

    @property
    def how(self) -> Decoding:
        return Decoding(self.temperature or 1.0, self.top_k, self.top_p, greedy=self.temperature == 0)


class Row(NamedTuple):
    """A request in the batch; `sampled` is vLLM's own list, which grows."""

    draw: Draw
    sampled: list[int]


class CounterDraw(LogitsProcessor):
    """Leaves one logit in each row: the log-prob of the token drawn."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError, which the server answers with status 400."""
        Draw.of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """See `LogitsProcessor.update_state`."""
        process_dict_updates(self._rows, batch_update, _row)

    def apply(self, logits: Tensor) -> Tensor:
        """Rows that are drawn in the same way are drawn together."""
        alike = defaultdict(list)
        for index, (asked, _) in self._rows.items():
            if index < len(logits):
                alike[asked.how, asked.seed, asked.num_ids, bool(asked.forced)].append(index)
        for (how, seed, num_ids, is_forced), indices in alike.items():
            rows = [self._rows[index] for index in indices]
            positions = [row.draw.begin + len(row.sampled) for row in rows]
            log_probs_BV = distribution(logits[indices, :num_ids], how)
            if is_forced:
                tokens_B = torch.tensor([_forced(row) for row in rows], device=logits.device)
                drawn_B = log_probs_BV.gather(1, tokens_B[:, None]).squeeze(1)
            else:
                ids = np.array([row.draw.id for row in rows], dtype=np.int64)
                uniforms_B = torch.from_numpy(uniforms(seed, ids, np.array(positions, dtype=np.int64)))
                tokens_B, drawn_B = draw(log_probs_BV, uniforms_B.to(logits.device), how)
            logits[indices] = -torch.inf
            logits[indices, tokens_B] = drawn_B.to(logits.dtype)
        return logits


def _row(params: SamplingParams, prompt: list[int] | None, sampled: list[int]) -> Row | None:
    # vLLM's own requests, while it warms up, say nothing.
    return Row(Draw.of(params), sampled) if params.extra_args else None


def _forced(row: Row) -> int:
    forced = row.draw.forced
    return forced[min(len(row.sampled), len(forced) - 1)]
