"""Held-out sets: eval.sets, checked and opened, and the one of data.eval."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gspo_megatron.base.batches import Sampling
from gspo_megatron.base.errors import ConfigError, DataError, did_you_mean, shortened
from gspo_megatron.build.data import SETTINGS, NamedSource, opened, source_of, sources_of
from gspo_megatron.build.rewards import RunRewards, own_rewards
from gspo_megatron.config.loading import SETTINGS as DECLARED
from gspo_megatron.config.sections import Config
from gspo_megatron.data.sources import PromptSource
from gspo_megatron.data.token_ids import Tokenizer
from gspo_megatron.run.estimates import MOST_RESPONSES
from gspo_megatron.run.evaluation import EvalSet

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
DEFAULT = "held_out"
"""What the command calls the set of data.eval."""
SAMPLED = ("temperature", "top_p", "top_k", "max_new_tokens")
"""Settings of section `rollout` that a set may have for itself."""
OWN = ("source", "size", "n", "k", *SAMPLED, "reward", "by")
METRICS = ("accuracy", "reward")
"""Metrics of every set of which more is better."""


@dataclass(frozen=True)
class SetSpec:
    """A set as the settings describe it."""

    name: str
    source: NamedSource
    size: int | None
    n: int
    k: tuple[int, ...]
    sampling: Sampling
    by: str | None


def default_set(config: Config, prompts: PromptSource, rewards: RunRewards, name: str = "") -> EvalSet:
    """The most likely response to each prompt of data.eval, up to data.eval_size."""
    r = config.rollout
    sampling = Sampling(0.0, r.top_p, r.top_k, r.max_new_tokens, seed_of(config, ""))
    return EvalSet(name, prompts, config.data.eval_size, sampling, rewards, rewards.judged_by)


def open_default(config: Config, tokenizer: Tokenizer, rewards: RunRewards, name: str = "") -> EvalSet:
    """`default_set`, with its prompts and, where it has one of its own, its reward. Raises as `open_sets` does."""
    (source,) = sources_of(config, "eval")
    reward = own_rewards(config, source.reward) if source.reward else rewards
    found = default_set(config, opened(source, config, tokenizer), reward, name)
    _check_answers(config, found)
    return found


def set_specs(config: Config) -> list[SetSpec]:
    """The sets of eval.sets.

    Raises:
        ConfigError: a name that cannot be one, or a setting of a set that cannot work.
    """
    return [_spec(config, name, entry) for name, entry in config.eval.sets.items()]


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
        found = EvalSet(
            spec.name, prompts, spec.size, spec.sampling, reward, reward.judged_by, n=spec.n, k=spec.k, by=spec.by
        )
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


def metric_names(config: Config) -> list[str]:
    """The metrics of evaluations that can decide something: more of them is better."""
    found = [f"eval/{name}" for name in METRICS]
    for spec in set_specs(config):
        at_k = [f"{kind}@{k}" for k in spec.k for kind in ("pass", "maj")]
        found += [f"eval/{spec.name}/{name}" for name in (*METRICS, *at_k)]
    return found


def seed_of(config: Config, name: str) -> int:
    """Of the random numbers of a set: its own, the same in each evaluation, and those of no training rollout."""
    digest = hashlib.sha256(f"evaluation {name} {config.run.seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _spec(config: Config, name: str, entry: Any) -> SetSpec:
    place = f"eval.sets.{name}"
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in (DEFAULT, *METRICS):
        raise ConfigError(
            f"eval.sets: {shortened(repr(name), 60)} cannot be the name of a set; a name has letters, digits, _ and -, "
            f"because files and metrics are called by it, and is not {', '.join((DEFAULT, *METRICS))}"
        )
    entry = {"source": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{place} is {shortened(repr(entry))}; expected a source, or {{source: test.jsonl, n: 8}}")
    for key in entry:
        if key not in (*OWN, *SETTINGS):
            near = did_you_mean(str(key), (*OWN, *SETTINGS)) or "."
            raise ConfigError(f"{place} has an unknown key {key!r}{near} Keys: {', '.join((*OWN, *SETTINGS))}")
    n = _count(place, "n", entry.get("n", 1), MOST_RESPONSES)
    size = None if entry.get("size") is None else _count(place, "size", entry["size"])
    sampling = _sampling(config, name, entry, n)
    of_source = {key: value for key, value in entry.items() if key in ("source", "reward", *SETTINGS)}
    source = source_of(config, "eval", place, of_source, longest_response=sampling.max_new_tokens)
    spec = replace(source.spec, size=size or (config.data.eval_size if source.spec.is_generated else None))
    by = entry.get("by")
    if by is not None and not isinstance(by, str):
        raise ConfigError(f"{place}: by={by!r} must be the name of a field")
    return SetSpec(name, source._replace(spec=spec), size, n, _ks(place, entry.get("k"), n), sampling, by)


def _sampling(config: Config, name: str, entry: Mapping[str, Any], n: int) -> Sampling:
    """As in training, where the set does not say; one response is greedy, several are not."""
    place, own = f"eval.sets.{name}", {}
    for key in SAMPLED:
        value = entry.get(key)
        if value is None:
            value = 0.0 if key == "temperature" and n == 1 else getattr(config.rollout, key)
        declared = DECLARED[f"rollout.{key}"]
        if isinstance(value, bool) or not isinstance(value, (int, float) if float in declared.kinds else int):
            raise ConfigError(f"{place}: {key}={value!r} must be a number")
        value = declared.kinds[0](value)
        # Temperature 0 is no distribution to train on, but one to evaluate.
        if (key, value) != ("temperature", 0) and (complaint := declared.complaint(value)):
            raise ConfigError(f"{place}: {complaint.removeprefix('rollout.')}")
        own[key] = value
    if n > 1 and own["temperature"] == 0:
        raise ConfigError(
            f"{place}: n={n} with temperature=0 would be {n} times the same response; set temperature above 0, or n=1"
        )
    if own["temperature"] == 0 and {"top_p", "top_k"} & {key for key in entry if entry[key] is not None}:
        raise ConfigError(
            f"{place}: top_p and top_k have no effect at temperature 0, the default of n=1; set temperature, or remove "
            "them"
        )
    if own["max_new_tokens"] >= config.model.max_sequence_length:
        raise ConfigError(
            f"{place}: max_new_tokens={own['max_new_tokens']} leaves no room for a prompt in "
            f"model.max_sequence_length={config.model.max_sequence_length}"
        )
    return Sampling(**own, seed=seed_of(config, name))


def _ks(place: str, value: Any, n: int) -> tuple[int, ...]:
    if value is None:
        return (n,) if n > 1 else ()
    found = tuple(_count(place, "k", k) for k in (value if isinstance(value, list) else [value]))
    if too_large := [k for k in found if k > n]:
        raise ConfigError(f"{place}: k={too_large[0]} needs at least as many responses, and n={n}; raise n or lower k")
    return tuple(dict.fromkeys(found))


def _count(place: str, key: str, value: Any, most: int = 2**20) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{place}: {key}={shortened(repr(value), 60)} must be a whole number from 1 to {most:,}")
    return value
