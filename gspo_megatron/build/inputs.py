"""What a run needs before any process group exists: checked settings, and the objects that they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from gspo_megatron.base.errors import ConfigError, did_you_mean
from gspo_megatron.build.checks import check_config, config_warnings
from gspo_megatron.build.data import is_chat, left_out, open_training, sources_of
from gspo_megatron.build.engine_checks import check_shares
from gspo_megatron.build.environments import environment_of
from gspo_megatron.build.eval_sets import open_default, open_sets, rewards_in, setting_of
from gspo_megatron.build.rewards import RunRewards, rewards_of, slow_rewards
from gspo_megatron.build.set_specs import DEFAULT, all_sources, set_specs
from gspo_megatron.build.suitability import check_prompts, try_rewards
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
from gspo_megatron.run.evaluation import EvalSet


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
        sets: that of data.eval, then those of eval.sets.
        warnings: what works but is probably not intended.
    """

    rewards: RunRewards
    train_prompts: PromptSource
    sets: tuple[EvalSet, ...]
    warnings: tuple[str, ...] = ()
    environment: Environment = field(default_factory=SingleTurn)


@dataclass(frozen=True)
class EvaluationInputs(ModelInputs):
    """The same with what an evaluation needs."""

    rewards: RunRewards
    sets: tuple[EvalSet, ...]
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
    if config.checkpoint.load == "best":
        best = CheckpointDirectory(Path(config.run.dir) / CHECKPOINTS, keep=1).best()
        config = replaced(config, {"checkpoint.load": str(best)})
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
        DataError: a tokenizer, prompts or a reward that cannot be used.
    """
    model = settle_model(config, world_size)
    check_shares(config, world_size)
    config, tokenizer, rewards, environment = _with_rewards(model)
    more_sets = open_sets(config, set_specs(config), tokenizer, rewards)
    train = open_training(config, tokenizer)
    sets = (open_default(config, tokenizer, rewards), *more_sets)
    warnings = [*left_out("data.train", train)]
    warnings += [text for each in sets for text in left_out(setting_of(each), each.prompts)]
    warnings += config_warnings(config, model.algorithm)
    warnings += check_prompts(config, train, tokenizer, rewards)
    warnings += try_rewards(config, train, tokenizer, rewards)
    warnings += [text for each in sets for text in try_rewards(config, each.prompts, tokenizer, each.reward)]
    warnings += slow_rewards(config, rewards_in(rewards, sets))
    of_model = (config, model.layout, model.algorithm, tokenizer)
    return Inputs(*of_model, rewards, train, sets, tuple(warnings), environment)


def settle_evaluation(config: Config, world_size: int, names: Sequence[str] = ()) -> EvaluationInputs:
    """`settle_model`, and opens rewards and held-out sets: those called `names`, or all.

    Raises:
        ConfigError: a setting that cannot work, or a name that no set has.
        DataError: a tokenizer or prompts that cannot be used.
    """
    model = settle_model(config, world_size)
    config, tokenizer, rewards, environment = _with_rewards(model)
    specs = set_specs(config)
    known = [DEFAULT, *(spec.name for spec in specs)]
    for name in names:
        if name not in known:
            near = did_you_mean(name, known) or ""
            raise ConfigError(f"no held-out set is called {name!r}{near}; there are {', '.join(known)}")
    wanted = names or known
    sets = []
    if DEFAULT in wanted:
        sets.append(open_default(config, tokenizer, rewards, DEFAULT))
    sets += open_sets(config, [spec for spec in specs if spec.name in wanted], tokenizer, rewards)
    warnings = [text for each in sets for text in left_out(setting_of(each), each.prompts)]
    warnings += [text for each in sets for text in try_rewards(config, each.prompts, tokenizer, each.reward)]
    warnings += slow_rewards(config, rewards_in(rewards, sets))
    of_model = (config, model.layout, model.algorithm, tokenizer)
    return EvaluationInputs(*of_model, rewards, tuple(sets), tuple(warnings), environment)


def _with_rewards(model: ModelInputs) -> tuple[Config, Tokenizer, RunRewards, Environment]:
    """The settings with reward.functions and data.chat_date filled in, the tokenizer, the rewards, and who answers."""
    config, tokenizer = with_rewards(model.config), model.tokenizer
    rewards = rewards_of(config)
    if config.data.chat_date is None and _tells_day(config, tokenizer):
        config = replaced(config, {"data.chat_date": _day_of_run(config)})
    environment = environment_of(config, tokenizer)
    stops_of([*config.rollout.stop, *environment.stop], tokenizer)  # which refuses what cannot end a response
    return config, tokenizer, rewards, environment


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
    tells = tokenizer.chat_template is not None and tokenizer.chat_template.tells_day
    return tells and any(map(is_chat, all_sources(config)))


def _day_of_run(config: Config) -> str:
    """Of the run that is continued, or today's. `check_same_settings` sees to it that all ranks have the same."""
    load = config.checkpoint.load
    earlier = None
    if load != "none":
        folder = Path(config.run.dir) if load == "latest" else Path(load).resolve().parent.parent
        earlier = saved_setting(folder / "config.yaml", "data.chat_date")
    return earlier or datetime.now(timezone.utc).date().isoformat()
