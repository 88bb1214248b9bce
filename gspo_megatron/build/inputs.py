"""What a run needs before any process group exists: checked settings, and the objects that they name."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config, config_warnings
from gspo_megatron.build.data import left_out, open_prompts, sources_of, uses_chat
from gspo_megatron.build.environments import environment_of
from gspo_megatron.build.rewards import RunRewards, rewards_of
from gspo_megatron.build.suitability import check_prompts
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.checkpoint.hugging_face import HuggingFaceFolder
from gspo_megatron.checkpoint.inspection import check_folder
from gspo_megatron.checkpoint.names import CHECKPOINTS
from gspo_megatron.config.loading import replaced, saved_setting
from gspo_megatron.config.sections import Config
from gspo_megatron.data.sources import SOURCES, PromptSource, scheme_of
from gspo_megatron.data.tokenizers import Tokenizer, load_tokenizer
from gspo_megatron.environments.environment import Environment
from gspo_megatron.environments.single_turn import SingleTurn
from gspo_megatron.layout.layout import Layout
from gspo_megatron.rollout.native.stopping import stops_of
from gspo_megatron.run.algorithm import Algorithm


@dataclass(frozen=True)
class ModelInputs:
    """Settings with their final values, and what a model that is not trained needs of the objects that they name."""

    config: Config
    layout: Layout
    algorithm: Algorithm
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Inputs(ModelInputs):
    """The same with what training needs.

    Attributes:
        warnings: what works but is probably not intended.
    """

    rewards: RunRewards
    train_prompts: PromptSource
    eval_prompts: PromptSource
    warnings: tuple[str, ...] = ()
    environment: Environment = field(default_factory=SingleTurn)


def settle_model(config: Config, world_size: int) -> ModelInputs:
    """Checks the settings against the number of processes, opens the tokenizer, and fills in data.tokenizer and
    model.vocab_size.

    Raises:
        ConfigError: a setting, or a combination of settings, that cannot work.
        DataError: a tokenizer that cannot be used.
        CheckpointError: model.hf is not a whole model.
    """
    layout, algorithm = check_config(config, world_size), Algorithm.of(config)
    config = replaced(config, {"data.tokenizer": tokenizer_spec(config)})
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if tokenizer.vocab_size > vocab_size:
        advice = (
            "use the tokenizer of the model, or enlarge the model's embeddings (transformers: resize_token_embeddings)"
            if config.model.hf
            else f"set model.vocab_size to {tokenizer.vocab_size}, or null to take the tokenizer's"
        )
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size={vocab_size}; {advice}"
        )
    config = replaced(config, {"model.vocab_size": vocab_size})
    check_weights(config)
    return ModelInputs(config, layout, algorithm, tokenizer)


def check_weights(config: Config) -> None:
    """Refuses a folder whose files are not a whole model, where a run would start from it: by their headers, before
    anything is built or written.

    Raises:
        CheckpointError: what is wrong, by file and tensor.
    """
    load, saved = config.checkpoint.load, CheckpointDirectory(Path(config.run.dir) / CHECKPOINTS, keep=1)
    if config.model.hf and (load == "none" or (load == "latest" and saved.is_empty())):
        check_folder(HuggingFaceFolder(config.model.hf), config.model.shape)


def settle(config: Config, world_size: int) -> Inputs:
    """`settle_model`, and opens rewards and prompts; fills in reward.functions and data.chat_date.

    Raises:
        ConfigError: a setting, or a combination of settings, that cannot work.
        DataError: a tokenizer or prompts that cannot be used.
    """
    model = settle_model(config, world_size)
    config, tokenizer = model.config, model.tokenizer
    config = with_rewards(config)
    rewards = rewards_of(config)
    if config.data.chat_date is None and _tells_day(config, tokenizer):
        config = replaced(config, {"data.chat_date": _day_of_run(config)})
    environment = environment_of(config, tokenizer)
    stops_of([*config.rollout.stop, *environment.stop], tokenizer)  # which refuses what cannot end a response
    train, evaluation = (open_prompts(config, split, tokenizer) for split in ("train", "eval"))
    warnings = [*left_out("data.train", train), *left_out("data.eval", evaluation)]
    warnings += config_warnings(config, model.algorithm)
    warnings += check_prompts(config, train, tokenizer, rewards)
    return Inputs(
        config, model.layout, model.algorithm, tokenizer, rewards, train, evaluation, tuple(warnings), environment
    )


def with_rewards(config: Config) -> Config:
    """With reward.functions filled in, where the settings name no reward."""
    if config.reward.functions or config.reward.terms:
        return config
    spec = sources_of(config, "train")[0].spec
    return replaced(config, {"reward.functions": {SOURCES[scheme_of(spec.source)].reward(spec): 1.0}})


def tokenizer_spec(config: Config) -> str:
    """data.tokenizer, with what `auto` stands for."""
    spec = config.data.tokenizer
    return (config.model.hf or "characters") if spec == "auto" else spec


def _tells_day(config: Config, tokenizer: Tokenizer) -> bool:
    return uses_chat(config) and tokenizer.chat_template is not None and tokenizer.chat_template.tells_day


def _day_of_run(config: Config) -> str:
    """Of the run that is continued, or today's. `check_same_settings` sees to it that all ranks have the same."""
    load = config.checkpoint.load
    earlier = None
    if load != "none":
        folder = Path(config.run.dir) if load == "latest" else Path(load).resolve().parent.parent
        earlier = saved_setting(folder / "config.yaml", "data.chat_date")
    return earlier or datetime.now(timezone.utc).date().isoformat()
