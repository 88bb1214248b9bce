"""Rollouts that are conversations: turns of the model, and between them what an environment says.

    1. All turns that are due are sampled together.
    2. The reporter of each share asks the environment; its answers become tokens there, once.
    3. Every process learns all answers in one exchange: so those that hold one model add the same tokens, and all of
       them know whether anyone samples another turn.

The tokens so far are the prompt of the next turn. Nothing that was sampled becomes text and tokens again.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from gspo_megatron.base.batches import Prompt, Rollout, Sampling
from gspo_megatron.base.errors import DataError
from gspo_megatron.base.protocols import Ranks, Sampler
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.data.chat import ChatTemplate
from gspo_megatron.data.token_ids import Tokenizer, text_of
from gspo_megatron.environments.environment import LONGEST, Environment, Turn

MOST_FAILED = 0.5
"""An environment that fails in a larger share of the conversations sampled together does not work."""
LISTED = 3


class Reply(NamedTuple):
    """What becomes of a rollout after a turn. `tokens`: what is added before its next one; None: it has ended.
    `cut`: a limit ended it, or `error`."""

    id: int
    tokens: list[int] | None = None
    cut: bool = False
    error: str = ""


@dataclass(frozen=True)
class ConversationSampler:
    """`Sampler` of base/protocols.py over another one, which samples a turn.

    Attributes:
        chat: what writes the environment's messages, where the prompt is a conversation.
        max_turns: most turns of the model.
        max_new_tokens: most tokens after the prompt, from both sides.
    """

    sampler: Sampler
    ranks: Ranks
    environment: Environment
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    max_turns: int
    max_new_tokens: int

    def generate(
        self,
        prompts: Seq[Prompt],
        ids: Seq[int],
        *,
        greedy: bool = False,
        sampling: Sampling | None = None,
        ended: Callable[[Rollout], None] = lambda rollout: None,
        begun: Seq[int] = (),
    ) -> list[Rollout]:
        """See `Sampler.generate`.

        Raises:
            StopRequested: as the sampler of turns.
            DataError: the environment failed in more than MOST_FAILED of all conversations; on all ranks.
        """
        most = sampling.max_new_tokens if sampling else self.max_new_tokens
        sample = partial(self.sampler.generate, greedy=greedy, sampling=sampling)
        rollouts = sample(prompts, ids, begun=begun)
        due, turns, failed, total = rollouts, 1, [], 0
        while True:
            replies: list[Reply] = self.ranks.gather(self._replies(due, turns, most) if self.ranks.is_reporter else [])
            total = total or len(replies)
            failed += [reply for reply in replies if reply.error]
            own = {reply.id: reply for reply in replies}
            for rollout in due:
                if own[rollout.id].tokens is None:
                    rollout.truncated |= own[rollout.id].cut
                    ended(rollout)
            if all(reply.tokens is None for reply in replies):
                break
            due = [rollout for rollout in due if own[rollout.id].tokens is not None]
            for rollout in due:
                self._add(rollout, own[rollout.id].tokens or [])
            _sample_turn(sample, due)
            turns += 1
        _refuse_failing(failed, total)
        return rollouts

    def _add(self, rollout: Rollout, tokens: Seq[int]) -> None:
        begin = len(rollout.tokens)
        rollout.tokens += tokens
        rollout.outside.append((begin, len(rollout.tokens)))

    # ------------------------------------------------------------------------------------------- on reporters

    def _replies(self, due: Seq[Rollout], turns: int, most: int) -> list[Reply]:
        """Asks the environment about the turns just sampled, and notes what was said."""
        for rollout in due:
            rollout.text = text_of(self.tokenizer, rollout.last_turn)
            rollout.turns.append({"role": "assistant", "content": rollout.text, "sampled": True})
        # A turn that was cut has not said what it meant to.
        asked = [rollout for rollout in due if not rollout.truncated]
        answered = dict(zip([r.id for r in asked], self.environment.replies(asked) if asked else [], strict=True))
        return [self._reply(r, answered[r.id], turns, most) if r.id in answered else Reply(r.id) for r in due]

    def _reply(self, rollout: Rollout, turn: Turn, turns: int, most: int) -> Reply:
        rollout.tool_calls += turn.calls
        rollout.tool_errors += turn.failed
        rollout.environment_error = turn.error
        if turn.done or turn.error:
            return Reply(rollout.id, cut=bool(turn.error), error=turn.error)
        try:
            tokens = self._encoded(rollout, turn)
        except Exception as error:  # a text that the tokenizer or the template refuses, each in its own way
            rollout.environment_error = f"its answer {turn.content[:60]!r} cannot be used ({error})"
            return Reply(rollout.id, cut=True, error=rollout.environment_error)
        if turns == self.max_turns or len(rollout.tokens) + len(tokens) >= most:
            return Reply(rollout.id, cut=True)
        rollout.turns.append({"role": turn.role, "content": turn.content, "sampled": False})
        return Reply(rollout.id, tokens)

    def _encoded(self, rollout: Rollout, turn: Turn) -> list[int]:
        """The tokens between a turn and the next one."""
        if len(turn.content) > LONGEST:
            raise DataError(f"it has {len(turn.content):,} characters, more than {LONGEST:,}")
        if turn.role == "assistant" or self.chat is None or not rollout.prompt.messages:
            return self.tokenizer.encode(turn.content)
        *before, _ = rollout.messages
        tokens = self.tokenizer.encode(self.chat.after_turn(before, {"role": turn.role, "content": turn.content}))
        # The template ends the turn with the token that the model has ended it with already.
        ended_itself = rollout.tokens[-1] in self.tokenizer.stop_ids and tokens[:1] == rollout.tokens[-1:]
        return tokens[1:] if ended_itself else tokens


def _sample_turn(sample: Callable[..., list[Rollout]], due: Seq[Rollout]) -> None:
    """The next turn of each: what has been said so far is its prompt."""
    so_far = [replace(r.prompt, tokens=(*r.prompt.tokens, *r.tokens)) for r in due]
    drawn = sample(so_far, [r.id for r in due], begun=[len(r.tokens) for r in due])
    for rollout, turn in zip(due, drawn, strict=True):
        rollout.tokens += turn.tokens
        rollout.log_probs += turn.log_probs
        rollout.truncated = turn.truncated
        if rollout.support is not None and turn.support is not None:
            rollout.support = Ragged.join([rollout.support, turn.support])
        if (before := rollout.routed_experts) is not None and (all_so_far := turn.routed_experts) is not None:
            # The turn has processed earlier ones once more: their tokens keep the experts that they were drawn with.
            rollout.routed_experts = torch.cat([before, all_so_far[len(before) :]])


def _refuse_failing(failed: Seq[Reply], total: int) -> None:
    if len(failed) <= MOST_FAILED * total:
        return
    listed = "\n".join(f"  rollout {reply.id}: {reply.error}" for reply in failed[:LISTED])
    raise DataError(
        f"the environment failed in {len(failed)} of {total} conversations; fix it, or, where it ran into a limit, "
        f"raise rollout.reply_timeout_s. The first of them:\n{listed}"
    )
