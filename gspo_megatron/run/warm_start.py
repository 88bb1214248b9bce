"""Supervised updates on given solutions, for a policy that starts from random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Prompt, Sequence, UpdateBatch
from gspo_megatron.base.errors import DataError
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.base.protocols import Policy, Ranks
from gspo_megatron.config.sections import Config
from gspo_megatron.data.order import OrderedPrompts
from gspo_megatron.data.sources import checked_tokens
from gspo_megatron.data.token_ids import Tokenizer
from gspo_megatron.monitor.console import Console
from gspo_megatron.objective import LikelihoodObjective
from gspo_megatron.run.guards import Guards
from gspo_megatron.run.stages import Packer, reduced, segments_of


@dataclass(frozen=True)
class WarmStart:
    """loss = -sum log p(solution) / tokens, on train.warm_start_steps batches of the first training prompts."""

    config: Config
    policy: Policy
    ranks: Ranks
    prompts: OrderedPrompts
    tokenizer: Tokenizer
    packer: Packer
    guards: Guards
    console: Console
    note: Callable[[str], None]

    def run(self, done: int, safe_point: Callable[[], None]) -> Iterator[tuple[int, float]]:
        """Makes the updates after the first `done`, and yields the number done and the loss after each. `safe_point` is
        called before every update, on all processes; it may raise to stop the run."""
        t, cut = self.config.train, 0
        while done < t.warm_start_steps:
            safe_point()
            prompts = self.prompts.next(t.warm_start_batch)
            sequences = [self.with_solution(p) for p in prompts]
            cut += sum(int(s.tokens[-1]) != self.tokenizer.eos_id for s in sequences)
            batch = self.packer.update_batch(sequences)
            self.note(where := f"warm start, update {done + 1}")
            metrics = self.policy.update(batch, self._loss, lr=t.warm_start_lr, accept=self.guards.accept)
            self.guards.verdict(where, f"warm_start_{done + 1:06d}", partial(map, asdict, prompts))
            loss = reduced([metrics], self.ranks)["loss"]
            done += 1
            self.prompts.taken += len(prompts)
            yield done, loss
            self.console.warm_start(done, t.warm_start_steps, loss)
        if cut:
            self.console.warn(
                f"warm start: {cut} of {t.warm_start_steps * t.warm_start_batch} solutions were truncated "
                f"at model.max_sequence_length={self.config.model.max_sequence_length}, so the policy did not see "
                "their end; raise model.max_sequence_length, or remove such prompts"
            )

    def with_solution(self, prompt: Prompt) -> Sequence:
        """The prompt with its solution and EOS, truncated at model.max_sequence_length.

        Raises:
            DataError: the tokenizer rejects the solution, or the embedding does not have one of its ids.
        """
        try:
            solution = [*self.tokenizer.encode(prompt.solution), self.tokenizer.eos_id]
        except DataError as error:
            raise DataError(f"the solution of prompt {prompt.id} ({prompt.text[:60]!r}): {error}") from error
        m = self.config.model
        assert m.vocab_size is not None
        tokens = checked_tokens(prompt, solution[: m.max_sequence_length - len(prompt.tokens)], m.vocab_size)
        return Sequence.after_prompt(tokens, len(prompt.tokens))

    def _loss(
        self, log_probs_R: Tensor, entropy_R: Tensor | None, micro_batch: MicroBatch, batch: UpdateBatch
    ) -> LossTerms:
        segments = segments_of(micro_batch, self.ranks)
        return LikelihoodObjective()(log_probs_R, segments, num_tokens=batch.num_tokens)
