"""data.train and data.eval as sources, each with its own settings, and the prompts that they open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gspo_megatron.base.errors import ConfigError, did_you_mean, plural, shortened
from gspo_megatron.config.loading import replaced
from gspo_megatron.config.sections import Config
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.mixture import Mixture, Part
from gspo_megatron.data.prompts import RowPrompts, counted
from gspo_megatron.data.sources import SOURCES, DataSpec, PromptSource, open_source
from gspo_megatron.data.token_ids import Tokenizer

OWN = ("source", "name", "weight", "reward")
"""What only an entry of a list of sources has."""
SETTINGS = tuple(sorted(frozenset[str]().union(*(source.reads for source in SOURCES.values())) - {"chat_date"}))
"""Settings of section `data` that an entry may have for itself."""


class NamedSource(NamedTuple):
    """A source of a run.

    Attributes:
        own: the settings that it has for itself, by name.
        reward: functions of its rollouts' reward with their weights; None: those of the run.
    """

    spec: DataSpec
    own: Mapping[str, Any]
    name: str = ""
    weight: float = 1.0
    reward: Mapping[str, float] | None = None


def sources_of(config: Config, split: str) -> list[NamedSource]:
    """The sources of data.train, or of data.eval.

    Raises:
        ConfigError: an entry that is not a source, or a setting of one that cannot be used.
    """
    d = config.data
    key, value = ("data.train", d.train) if split == "train" or d.eval is None else ("data.eval", d.eval)
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise ConfigError(f"{key} is an empty list; name a source")
    found = [source_of(config, split, f"{key}[{i}]" if value is entries else key, e) for i, e in enumerate(entries)]
    if split == "eval" and len(found) > 1:
        raise ConfigError(f"{key} has {len(found)} sources; set data.eval to one, and name others in eval.sets")
    names = [source.name for source in found]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{key} has two sources called {repeated!r}; give each a name of its own with name: ...")
    if len(found) == 1:
        return [found[0]._replace(weight=1.0)]
    if not sum(source.weight for source in found):
        raise ConfigError(f"{key}: the weights of all sources are 0; give those to train on a weight above 0")
    return [source for source in found if source.weight]


def open_training(config: Config, tokenizer: Tokenizer) -> PromptSource:
    """The prompts of data.train; of several sources, and of one with a name, their mixture. Raises as `opened` does."""
    named = sources_of(config, "train")
    found = [opened(source, config, tokenizer) for source in named]
    if len(found) == 1 and not named[0].name:
        return found[0]
    return Mixture([Part(s.name, s.weight, prompts) for s, prompts in zip(named, found, strict=True)])


def opened(source: NamedSource, config: Config, tokenizer: Tokenizer) -> PromptSource:
    """The prompts of one source.

    Raises:
        ConfigError: a setting that cannot be used.
        DataError: a source that cannot be used.
    """
    # data.chat_date is that of the sources with a chat template; without any, it is refused.
    spec = source.spec if is_chat(source) else replace(source.spec, chat_date=None)
    return open_source(spec, tokenizer, seed=config.run.seed)


def is_chat(source: NamedSource) -> bool:
    """Whether a chat template writes its prompts."""
    return source.spec.chat or source.spec.messages_field is not None


def left_out(key: str, prompts: PromptSource) -> Iterator[str]:
    """What of the data is not trained on, or twice, in words."""
    if isinstance(prompts, Mixture):
        for part in prompts.parts:
            yield from left_out(f"{key}, {part.name}", part.prompts)
    elif isinstance(prompts, RowPrompts):
        if prompts.dropped:
            (first, *_), *_ = prompts.about["places"].values()
            yield f"{key}: rows left out: {counted(prompts.dropped)}; the first of them: {first}"
        if prompts.duplicates:
            again = f"{plural(prompts.duplicates, 'prompt')} with the text of an earlier one"
            yield f"{key}: {again}; data.duplicates=drop leaves them out"


def shown(sources: Any) -> str:
    """data.train or data.eval, for messages: the sources' names."""
    entries = sources if isinstance(sources, list) else [sources]
    return shortened(", ".join(str(e.get("source")) if isinstance(e, Mapping) else str(e) for e in entries))


def source_of(
    config: Config, split: str, place: str, entry: Any, *, longest_response: int | None = None
) -> NamedSource:
    """The source that `entry` of the setting `place` describes.

    Raises:
        ConfigError: it is not a source, or a setting of it cannot be used.
    """
    entry = {"source": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("source"), str) or not entry["source"]:
        raise ConfigError(
            f"{place} is {shortened(repr(entry))}; expected a source, such as train.jsonl, or {{source: train.jsonl, "
            "weight: 2}"
        )
    for key in entry:
        if key not in (*OWN, *SETTINGS):
            near = did_you_mean(str(key), (*OWN, *SETTINGS)) or "."
            raise ConfigError(f"{place} has an unknown key {key!r}{near} Keys: {', '.join((*OWN, *SETTINGS))}")
    own = {key: value for key, value in entry.items() if key in SETTINGS}
    d = replaced(config, {f"data.{key}": value for key, value in own.items()}).data if own else config.data
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ConfigError(f"{place}: weight {weight!r} must be a number of 0 or more")
    has_own_name = place.endswith("]") or "reward" in entry
    name = str(entry.get("name") or (_name_of(entry["source"]) if has_own_name else ""))
    spec = DataSpec(
        source=entry["source"],
        split=split,
        size=None if split == "train" else d.eval_size,
        max_prompt_tokens=prompt_limit(config, longest_response),
        **{key: getattr(d, key) for key in (*SETTINGS, "chat_date")},
        cache=Cache(Path(config.run.cache)) if config.run.cache else Cache(),
    )
    return NamedSource(spec, own, name, float(weight), _reward_of(entry, place))


def _reward_of(entry: Mapping[str, Any], place: str) -> Mapping[str, float] | None:
    """`reward: NAME`, or a mapping of names to weights."""
    reward = entry.get("reward")
    if reward is None:
        return None
    functions = {reward: 1.0} if isinstance(reward, str) else reward
    if not isinstance(functions, Mapping) or not functions:
        raise ConfigError(
            f"{place}: reward {shortened(repr(reward))} is neither the name of one nor a mapping to weights"
        )
    for name, weight in functions.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ConfigError(f"{place}: the weight {weight!r} of reward {name!r} must be a number")
    return {str(name): float(weight) for name, weight in functions.items()}


def _name_of(source: str) -> str:
    """`math` of data/math.jsonl.gz or task:math."""
    return Path(source.rstrip("/").rpartition(":")[2]).name.split(".")[0]


def prompt_limit(config: Config, longest_response: int | None = None) -> int:
    """Longest prompt in tokens that leaves room for a response, by default of rollout.max_new_tokens."""
    room = config.model.max_sequence_length - (longest_response or config.rollout.max_new_tokens)
    return min(room, config.data.max_prompt_tokens or room)
