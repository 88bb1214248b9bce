"""What a run needs before any process group exists: tokenizer, prompts, rewards."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import prompt_limit
from gspo_megatron.config.sections import Config
from gspo_megatron.data.generated import find_task
from gspo_megatron.data.sources import PromptSource, load_prompts
from gspo_megatron.data.tokenizers import Tokenizer, load_tokenizer
from gspo_megatron.run.algorithm import rewards_of, variant_of


@dataclass
class Inputs:
    """What a run needs before any process group exists."""

    tokenizer: Tokenizer
    train_prompts: PromptSource
    eval_prompts: PromptSource


def load_inputs(config: Config) -> Inputs:
    """Tokenizer and prompts; settles model.vocab_size. Raises DataError or ConfigError."""
    # The trainer makes its own; a name that is wrong ends the run here, before any process group exists.
    variant_of(config)
    if not config.reward.functions:
        kind, _, name = config.data.train.partition(":")
        judge = find_task(name, **config.data.task).reward if kind == "task" else "exact_match"
        config.reward.functions = {judge: 1.0}
    rewards_of(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size is None:
        config.model.vocab_size = tokenizer.vocab_size
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size={config.model.vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size}, or null to take the tokenizer's"
        )
    d = config.data

    def prompts(spec: str, split: str, size: int | None) -> PromptSource:
        return load_prompts(
            spec,
            tokenizer,
            split=split,
            seed=config.run.seed,
            max_prompt_tokens=prompt_limit(config),
            size=size,
            task_parameters=d.task,
            prompt_field=d.prompt_field,
            answer_field=d.answer_field,
            solution_field=d.solution_field,
            prompt_template=d.prompt_template,
            overlong=d.overlong,
        )

    return Inputs(tokenizer, prompts(d.train, "train", None), prompts(d.eval, "eval", d.eval_size))
