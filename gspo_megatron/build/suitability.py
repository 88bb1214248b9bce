"""Whether the prompts of a file suit the tokenizer, the warm start and the rewards: known before the run, not at the
step that draws them."""

from __future__ import annotations

from functools import partial

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import DataError, plural, shortened
from gspo_megatron.build.data import shown
from gspo_megatron.build.rewards import RunRewards
from gspo_megatron.config.sections import Config
from gspo_megatron.data.mixture import Mixture
from gspo_megatron.data.prompts import RowPrompts
from gspo_megatron.data.sources import PromptSource
from gspo_megatron.data.tokenizers import SentencePieceTokenizer, Tokenizer
from gspo_megatron.run.evaluation import Judge

VERSION = 1
"""Of these checks: another one does them again on data in the cache."""
READ_BACK = 1000
"""Prompts of which the text is compared with what the tokenizer makes of it."""


def check_prompts(config: Config, prompts: PromptSource, tokenizer: Tokenizer, rewards: RunRewards) -> list[str]:
    """Warnings about the training prompts. Generated tasks, which are endless, suit their rewards and alphabet. Of data
    in the cache, what was found is kept there.

    Raises:
        DataError: a solution that the warm start could not write, or an answer that a reward cannot read.
    """
    if isinstance(prompts, Mixture):
        return [text for part in prompts.parts for text in check_prompts(config, part.prompts, tokenizer, rewards)]
    find = partial(_found, config, prompts, tokenizer, rewards)
    if not isinstance(prompts, RowPrompts):
        return find() if prompts.size is not None else []
    r = config.reward
    return prompts.remembered([VERSION, bool(config.train.warm_start_steps), r.on_error, r.functions, r.terms], find)


def _found(config: Config, prompts: PromptSource, tokenizer: Tokenizer, rewards: RunRewards) -> list[str]:
    assert prompts.size is not None
    with_solutions, with_answers = bool(config.train.warm_start_steps), config.reward.on_error == "stop"
    some: list[Prompt] = []
    for index in range(prompts.size if with_solutions or with_answers else min(prompts.size, READ_BACK)):
        prompt = prompts[index]
        if with_solutions:
            _check_solution(prompt, tokenizer)
        if with_answers:
            rewards.check_answer(prompt)
        if index < READ_BACK:
            some.append(prompt)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return []
    changed = [p for p in some if tokenizer.decode(p.tokens) != p.text]
    if not changed:
        return []
    first = changed[0]
    return [
        f"the tokenizer {config.data.tokenizer} changes {len(changed)} of the first {plural(len(some), 'prompt')} of "
        f"{shown(config.data.train)}, the first: {shortened(first.text, 60)!r} becomes "
        f"{shortened(tokenizer.decode(first.tokens), 60)!r}; it normalises text or lacks characters, and the model "
        "sees what it makes of them; tools/train_tokenizer.py trains one that keeps all"
    ]


def try_rewards(config: Config, prompts: PromptSource, tokenizer: Tokenizer, rewards: Judge) -> list[str]:
    """Scores a response to the first prompt of every source, as a step would: a reward that fails whatever it is given
    is found here, not after a warm start. Not with reward.isolate=false: such functions may need what is not built yet.

    Returns:
        Warnings: what went wrong, where the run would go on.

    Raises:
        DataError: a reward fails, and reward.on_error is stop.
    """
    if not config.reward.isolate:
        return []
    found = []
    for index in range(len(prompts.parts) if isinstance(prompts, Mixture) else 1):
        asked = _made_up(prompts[index], tokenizer)
        score = rewards.try_functions(asked)
        if not score.error:
            continue
        what = (
            f"prompt {asked.prompt.id} ({shortened(asked.prompt.text, 60)!r}), tried with the response "
            f"{shortened(asked.text, 60)!r}: {score.error}"
        )
        if config.reward.on_error == "stop" and not score.lost:
            raise DataError(f"{what}; correct it, or set reward.on_error=count to count such a reward as 0")
        found.append(f"{what}; such a reward counts as 0, and a run that loses most of its rewards stops")
    return found


def _made_up(prompt: Prompt, tokenizer: Tokenizer) -> Rollout:
    """A response that a model might give: the written solution, else the answer, else the prompt's own words."""
    text = prompt.solution or prompt.answer
    try:
        tokens = tokenizer.encode(text)
    except DataError:
        tokens = []
    if not tokens:
        text, tokens = prompt.text, list(prompt.tokens)
    return Rollout(0, prompt, tokens, [], truncated=False, policy_version=0, text=text)


def _check_solution(prompt: Prompt, tokenizer: Tokenizer) -> None:
    try:
        tokenizer.encode(prompt.solution)
    except DataError as error:
        raise DataError(f"the solution of prompt {prompt.id} ({shortened(prompt.text, 60)!r}): {error}") from error
