"""The environment of a run, and the sampler whose rollouts it answers."""

from __future__ import annotations

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.base.protocols import Ranks, Sampler
from gspo_megatron.build.programs import runner_of
from gspo_megatron.build.set_specs import chat_templates
from gspo_megatron.config.sections import Config, RolloutConfig
from gspo_megatron.data.token_ids import Tokenizer
from gspo_megatron.environments.environment import Environment
from gspo_megatron.environments.environments import find_environment, runs_programs
from gspo_megatron.environments.single_turn import SingleTurn
from gspo_megatron.rollout.conversation import ConversationSampler
from gspo_megatron.rollout.user_environment import UserEnvironment


def environment_of(config: Config, tokenizer: Tokenizer) -> Environment:
    """What rollout.environment names.

    Raises:
        ConfigError: an environment that cannot be used, or settings that it makes no use of.
    """
    r = config.rollout
    if ":" in r.environment:
        environment: Environment = UserEnvironment(
            r.environment,
            r.environment_arguments,
            timeout_s=r.reply_timeout_s,
            memory_gib=config.reward.memory_gib,
            seed=config.run.seed,
        )
    else:
        run = runner_of(config) if runs_programs(r.environment) else None
        environment = find_environment(r.environment, r.environment_arguments, run)
    if isinstance(environment, SingleTurn):
        for name in ("max_turns", "reply_timeout_s"):
            if getattr(r, name) != getattr(RolloutConfig(), name):
                raise ConfigError(
                    f"rollout.{name}={getattr(r, name)} has no effect with rollout.environment={r.environment}; "
                    "remove it"
                )
    elif r.reply_timeout_s != RolloutConfig().reply_timeout_s and not isinstance(environment, UserEnvironment):
        raise ConfigError(
            f"rollout.reply_timeout_s={r.reply_timeout_s} has no effect with rollout.environment={r.environment}, only "
            "with one of your own; remove it"
        )
    elif len(names := chat_templates(config, tokenizer)) > 1:
        raise ConfigError(
            f"rollout.environment={r.environment}: the sources have {len(names)} different settings of the chat "
            "template (chat_arguments), and the environment's messages are written with one; give all the same"
        )
    return environment


def in_conversation(
    sampler: Sampler, environment: Environment, config: Config, tokenizer: Tokenizer, ranks: Ranks
) -> Sampler:
    """The sampler of a run, around the one that samples single turns."""
    if isinstance(environment, SingleTurn):
        return sampler
    return ConversationSampler(
        sampler,
        ranks,
        environment,
        tokenizer,
        chat=next(iter(chat_templates(config, tokenizer)), None),
        max_turns=config.rollout.max_turns,
        max_new_tokens=config.rollout.max_new_tokens,
    )
