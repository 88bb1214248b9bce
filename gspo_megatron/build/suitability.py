"""Whether the prompts of a file suit the tokenizer, the warm start and the rewards: known before the run, not at the
step that draws them."""

from __future__ import annotations

from gspo_megatron.base.batches import Prompt
from gspo_megatron.base.errors import DataError, shortened
from gspo_megatron.config.sections import Config
from gspo_megatron.data.sources import PromptSource
from gspo_megatron.data.tokenizers import SentencePieceTokenizer, Tokenizer
from gspo_megatron.rewards.rewards import Rewards

READ_BACK = 1000
"""Prompts of which the text is compared with what the tokenizer makes of it."""


def check_prompts(config: Config, prompts: PromptSource, tokenizer: Tokenizer, rewards: Rewards) -> list[str]:
    """Warnings about the training prompts. Generated tasks, which are endless, suit their rewards and alphabet.

    Raises:
        DataError: a solution that the warm start could not write, or an answer that a reward cannot read.
    """
    if prompts.size is None:
        return []
    every = [prompts[i] for i in range(prompts.size)]
    for prompt in every:
        if config.train.warm_start_steps:
            _check_solution(prompt, tokenizer)
        if config.reward.on_error == "stop":
            rewards.check_answer(prompt)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return []
    some = every[:READ_BACK]
    changed = [p for p in some if tokenizer.decode(p.tokens) != p.text]
    if not changed:
        return []
    first = changed[0]
    return [
        f"the tokenizer {config.data.tokenizer} changes {len(changed)} of the first {len(some)} prompts of "
        f"{config.data.train}, the first: {shortened(first.text, 60)!r} becomes "
        f"{shortened(tokenizer.decode(first.tokens), 60)!r}; it normalises text or lacks characters, and the model "
        "sees what it makes of them; tools/train_tokenizer.py trains one that keeps all"
    ]


def _check_solution(prompt: Prompt, tokenizer: Tokenizer) -> None:
    try:
        tokenizer.encode(prompt.solution)
    except DataError as error:
        raise DataError(f"the solution of prompt {prompt.id} ({shortened(prompt.text, 60)!r}): {error}") from error
