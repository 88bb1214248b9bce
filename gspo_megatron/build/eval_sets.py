"""Held-out sets, opened: that of data.eval, and those of eval.sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gspo_megatron.base.batches import Sampling
from gspo_megatron.base.errors import ConfigError, DataError, did_you_mean
from gspo_megatron.build.data import opened, sources_of
from gspo_megatron.build.rewards import RunRewards, own_rewards
from gspo_megatron.build.set_specs import DEFAULT, SetSpec, seed_of
from gspo_megatron.config.sections import Config
from gspo_megatron.data.sources import PromptSource
from gspo_megatron.data.token_ids import Tokenizer
from gspo_megatron.run.evaluation import EvalSet


def default_set(config: Config, prompts: PromptSource, rewards: RunRewards, name: str = "") -> EvalSet:
    """The most likely response to each prompt of data.eval, up to data.eval_size."""
    r = config.rollout
    sampling = Sampling(0.0, r.top_p, r.top_k, r.max_new_tokens, seed_of(config, ""))
    return EvalSet(name, prompts, config.data.eval_size, sampling, rewards)


def open_default(config: Config, tokenizer: Tokenizer, rewards: RunRewards, name: str = "") -> EvalSet:
    """`default_set`, with its prompts and, where it has one of its own, its reward. Raises as `open_sets` does."""
    (source,) = sources_of(config, "eval")
    reward = own_rewards(config, source.reward) if source.reward else rewards
    found = default_set(config, opened(source, config, tokenizer), reward, name)
    _check_answers(config, found)
    return found


def open_sets(config: Config, specs: list[SetSpec], tokenizer: Tokenizer, rewards: RunRewards) -> Iterator[EvalSet]:
    """Their prompts, and their rewards where they have some of their own.

    Raises:
        ConfigError: a source or a reward that cannot be used.
        DataError: the same; or it has no prompts, an answer that its reward cannot read, or no field to split by.
    """
    for spec in specs:
        prompts = opened(spec.source, config, tokenizer)
        if prompts.size is None:
            raise ConfigError(
                f"eval.sets.{spec.name}: {spec.source.spec.source} is endless; give it a size, such as size: 256"
            )
        if not prompts.size:
            raise DataError(f"eval.sets.{spec.name}: {spec.source.spec.source} has no prompts")
        count = min(spec.size or prompts.size, prompts.size)
        if spec.by and not any(spec.by in prompts[i].metadata for i in range(count)):
            raise DataError(
                f"eval.sets.{spec.name}: by={spec.by!r} is a field of none of its {count:,} prompts"
                f"{did_you_mean(spec.by, list(prompts[0].metadata))}"
            )
        reward = own_rewards(config, spec.source.reward) if spec.source.reward else rewards
        found = EvalSet(spec.name, prompts, spec.size, spec.sampling, reward, spec.n, spec.k, spec.by)
        _check_answers(config, found)
        yield found


def _check_answers(config: Config, of: EvalSet) -> None:
    """Whether rewards by rule can read them: a step that stops for one would do so after a warm start."""
    if config.reward.on_error == "stop":
        for i in range(of.num_prompts):
            of.reward.check_answer(of.prompts[i])


def setting_of(each: EvalSet) -> str:
    """The setting that describes it, for messages."""
    return "data.eval" if each.name in ("", DEFAULT) else f"eval.sets.{each.name}"


def rewards_in(rewards: RunRewards, sets: Iterable[EvalSet]) -> list[Any]:
    """Those of a run, and those that sets have of their own: `RunRewards` to start and to close."""
    return [rewards, *(each.reward for each in sets if each.reward is not rewards)]
