"""Log-probs of given responses, file to file, in chunks that fit in memory.

R  response tokens of a micro-batch
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gspo_megatron.base.batches import Sequence
from gspo_megatron.base.errors import DataError, plural
from gspo_megatron.base.files import written_aside
from gspo_megatron.base.protocols import Ranks, Scores
from gspo_megatron.data.responses import ADDED, Response
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.stages import Packer

MICRO_BATCHES = 8
"""Of one data-parallel rank in a chunk."""
SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class Scorer:
    """Scores the responses of a file on all ranks together.

    Attributes:
        max_tokens: of a chunk, unless one response alone has more.
    """

    policy: Scores
    ranks: Ranks
    packer: Packer
    console: Console

    @property
    def max_tokens(self) -> int:
        return MICRO_BATCHES * self.ranks.dp_size * self.packer.max_tokens

    def write(self, responses: Iterable[Response], path: Path, total: int) -> None:
        """Writes every line's object with `log_probs`, in order, into a new file `path`, on the main process. Every
        rank passes the same responses.

        Raises:
            DataError: a log-prob is not finite.
        """
        started = said = time.monotonic()
        lines = tokens = 0
        with written_aside(path) if self.ranks.is_main else nullcontext() as file:
            for chunk in _chunks(responses, self.max_tokens):
                scored = self.log_probs(chunk)
                if file:
                    file.writelines(_line(each, log_probs) for each, log_probs in zip(chunk, scored, strict=True))
                lines, tokens = lines + len(chunk), tokens + sum(len(each.tokens) for each in chunk)
                if (now := time.monotonic()) - said > SAY_EVERY_S:
                    said = now
                    self.console.say(f"{lines:,} of {plural(total, 'line')}  {tokens / (now - started):,.0f} tokens/s")
        seconds = time.monotonic() - started
        self.console.say(
            f"{plural(lines, 'line')} with {plural(tokens, 'token')} scored in {seconds:.1f} s; written to {path}"
        )

    def log_probs(self, responses: Seq[Response]) -> list[list[float]]:
        """The log-prob of every response token, on every rank.

        Raises:
            DataError: one is not finite.
        """
        lengths = [len(each.tokens) - each.prompt_length for each in responses]
        # What is empty has nothing to score, and would still cost a forward.
        scored = [i for i, length in enumerate(lengths) if length]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        found_R = np.full(starts[-1], np.nan)
        for index_R, offset_R, log_probs_R in self._gathered([responses[i] for i in scored]):
            found_R[starts[np.array(scored)[index_R]] + offset_R] = log_probs_R
        split = np.split(found_R, starts[1:-1])
        for each, log_probs in zip(responses, split, strict=True):
            if not np.isfinite(log_probs).all():
                number = int(np.flatnonzero(~np.isfinite(log_probs))[0])
                raise DataError(
                    f"{each.place}: the log-prob of response token {number} is {log_probs[number]}; the weights are "
                    "not finite, or overflow in this number format (precision.dtype)"
                )
        return [log_probs.tolist() for log_probs in split]

    def _gathered(self, responses: Seq[Response]) -> list[tuple[Any, Any, Any]]:
        """(which response, which of its tokens, log-prob), [R] each, of every micro-batch of all ranks."""
        if not responses:
            return []
        sequences = [Sequence.after_prompt(each.tokens, each.prompt_length) for each in responses]
        micro_batches = self.packer.update_batch(sequences).micro_batches
        mine = []
        for micro_batch, log_probs_R in zip(micro_batches, self.policy.log_probs(micro_batches), strict=True):
            index_R = np.array(micro_batch.index, dtype=np.int64)[micro_batch.sequence_R.numpy()]
            prompt_length_R = np.array([responses[i].prompt_length for i in index_R], dtype=np.int64)
            # A row predicts the token that comes next.
            position_R = 1 + micro_batch.positions_T[micro_batch.rows_R].numpy()
            mine.append((index_R, position_R - prompt_length_R, log_probs_R.double().cpu().numpy()))
        return self.ranks.gather(mine)


def _chunks(responses: Iterable[Response], max_tokens: int) -> Iterator[list[Response]]:
    """Consecutive responses of at most `max_tokens` tokens together, or one."""
    chunk: list[Response] = []
    size = 0
    for response in responses:
        if chunk and size + len(response.tokens) > max_tokens:
            yield chunk
            chunk, size = [], 0
        chunk.append(response)
        size += len(response.tokens)
    if chunk:
        yield chunk


def _line(response: Response, log_probs: list[float]) -> str:
    return json.dumps(response.record | {ADDED: log_probs}) + "\n"
