"""What a run needs before any process group exists: checked settings, and the objects that they name."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config, config_warnings, prompt_limit
from gspo_megatron.build.suitability import check_prompts
from gspo_megatron.config.loading import replaced
from gspo_megatron.config.sections import Config
from gspo_megatron.data.sources import SOURCES, DataSpec, PromptSource, open_source, scheme_of
from gspo_megatron.data.tokenizers import Tokenizer, load_tokenizer
from gspo_megatron.layout.layout import Layout
from gspo_megatron.rewards.rewards import Rewards
from gspo_megatron.run.algorithm import Algorithm


@dataclass(frozen=True)
class Inputs:
    """Settings with their final values, and the objects that they name.

    Attributes:
        warnings: what works but is probably not intended.
    """

    config: Config
    layout: Layout
    algorithm: Algorithm
    tokenizer: Tokenizer
    rewards: Rewards
    train_prompts: PromptSource
    eval_prompts: PromptSource
    warnings: tuple[str, ...] = ()


def settle(config: Config, world_size: int) -> Inputs:
    """Checks the settings against the number of processes, opens tokenizer, rewards and prompts, and fills in the
    settings that depend on them: reward.functions and model.vocab_size.

    Raises:
        ConfigError: a setting, or a combination of settings, that cannot work.
        DataError: a tokenizer or prompts that cannot be used.
    """
    layout, algorithm = check_config(config, world_size), Algorithm.of(config)
    if not config.reward.functions:
        spec = _data_spec(config, "train")
        config = replaced(config, {"reward.functions": {SOURCES[scheme_of(spec.source)].reward(spec): 1.0}})
    rewards = Rewards(config.reward.functions, config.reward.accuracy, config.reward.on_error)
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size={vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size}, or null to take the tokenizer's"
        )
    config = replaced(config, {"model.vocab_size": vocab_size})
    train, evaluation = (
        open_source(_data_spec(config, split), tokenizer, seed=config.run.seed) for split in ("train", "eval")
    )
    warnings = [
        f"data.{name}: {source.dropped} prompts longer than {prompt_limit(config)} tokens dropped"
        for name, source in (("train", train), ("eval", evaluation))
        if source.dropped
    ]
    warnings += config_warnings(config, algorithm)
    warnings += check_prompts(config, train, tokenizer, rewards)
    return Inputs(config, layout, algorithm, tokenizer, rewards, train, evaluation, tuple(warnings))


def _data_spec(config: Config, split: str) -> DataSpec:
    d = config.data
    return DataSpec(
        source=d.eval or d.train if split == "eval" else d.train,
        split=split,
        size=None if split == "train" else d.eval_size,
        max_prompt_tokens=prompt_limit(config),
        task=d.task,
        prompt_field=d.prompt_field,
        answer_field=d.answer_field,
        solution_field=d.solution_field,
        prompt_template=d.prompt_template,
        messages_field=d.messages_field,
        chat=d.chat,
        chat_arguments=d.chat_arguments,
        overlong=d.overlong,
    )
