"""Reads eval.sets: where each held-out set comes from and how it is sampled. Lists all sources of a run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gspo_megatron.base.batches import Sampling
from gspo_megatron.base.errors import ConfigError, did_you_mean, shortened
from gspo_megatron.build.data import SETTINGS, NamedSource, is_chat, source_of, sources_of
from gspo_megatron.config.loading import SETTINGS as DECLARED
from gspo_megatron.config.sections import Config
from gspo_megatron.data.chat import ChatTemplate
from gspo_megatron.data.sources import chat_of
from gspo_megatron.data.token_ids import Tokenizer
from gspo_megatron.run.estimates import MOST_RESPONSES

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
DEFAULT = "held_out"
"""What the command calls the set of data.eval."""
SAMPLED = ("temperature", "top_p", "top_k", "max_new_tokens")
"""Settings of section `rollout` that a set may have for itself."""
OWN = ("source", "size", "n", "k", *SAMPLED, "reward", "by")
METRICS = ("accuracy", "reward")
"""Metrics that every set has; larger is better."""


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


def set_specs(config: Config) -> list[SetSpec]:
    """The sets of eval.sets.

    Raises:
        ConfigError: a name that cannot be one, or a setting of a set that cannot work.
    """
    return [_spec(config, name, entry) for name, entry in config.eval.sets.items()]


def all_sources(config: Config) -> list[NamedSource]:
    """Those of data.train, data.eval and eval.sets. Raises as `sources_of` and `set_specs` do."""
    return [
        *sources_of(config, "train"),
        *sources_of(config, "eval"),
        *(spec.source for spec in set_specs(config)),
    ]


def chat_templates(config: Config, tokenizer: Tokenizer) -> list[ChatTemplate]:
    """The different ones that the sources' conversations are written with; none where all prompts are text."""
    sources = (source for source in all_sources(config) if is_chat(source))
    found = [chat for source in sources if (chat := chat_of(source.spec, tokenizer)) is not None]
    return list({json.dumps(chat.identity, sort_keys=True): chat for chat in found}.values())


def metric_names(config: Config) -> list[str]:
    """The metrics of evaluations that a best checkpoint can be chosen by; larger is better."""
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
    """The set's own settings, and those of training for the rest; a single response is greedy by default."""
    place, own = f"eval.sets.{name}", {}
    for key in SAMPLED:
        value = entry.get(key)
        if value is None:
            value = 0.0 if key == "temperature" and n == 1 else getattr(config.rollout, key)
        declared = DECLARED[f"rollout.{key}"]
        if isinstance(value, bool) or not isinstance(value, (int, float) if float in declared.kinds else int):
            raise ConfigError(f"{place}: {key}={value!r} must be a number")
        value = declared.kinds[0](value)
        # Evaluation may be greedy, training may not.
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
