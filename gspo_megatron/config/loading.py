"""Settings from YAML, presets and overrides: read strictly, every value checked on its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gspo_megatron.base.errors import ConfigError, did_you_mean, shortened
from gspo_megatron.config.declarations import Setting, settings_of
from gspo_megatron.config.hugging_face import check_agreement, folder_settings
from gspo_megatron.config.model import ModelConfig
from gspo_megatron.config.sections import Config
from gspo_megatron.models.presets import PRESETS

SETTINGS = settings_of(Config)
SECTIONS = tuple(dict.fromkeys(key.partition(".")[0] for key in SETTINGS))

RENAMED = {"train.skip_dead": "train.skip_zero_gradient"}
"""Old names of keys, and their new names."""

REMOVED = {"rollout.backend": "it had no effect; the training model itself samples"}
"""Removed keys, and why."""

REFUSED = {
    "precision.fp8=delayed": "its scales change with every training forward and are in no checkpoint, so old log-probs "
    "and the update would be computed with different ones; use blockwise",
    "precision.dtype=fp16": "float16 needs loss scaling, which this trainer does not have; use bf16",
}
"""Values that users of other trainers know and that cannot work here, and what to use."""

PATHS = ("run.dir", "run.cache", "model.hf", "data.train", "data.eval", "data.tokenizer", "checkpoint.load")
"""Settings that may be a path, in which a leading ~ is the home folder."""
SOURCES_BY_NAME = ("eval.sets",)
"""Settings that map names to sources."""
PATH_IN = {"source": "data.train", "prompt_template": "data.prompt_template"}
"""Names of a source's own settings that are read like these."""
LITERAL = ("data.prompt_template",)
"""Settings in which ${...} is text, not one of OmegaConf's references."""
LONGEST_NAME = 255
"""Of a file, in bytes; file systems allow no more."""

Values = dict[str, dict[str, Any]]
"""Values by section and key."""


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, hf: str | None = None) -> Config:
    """Defaults < preset or Hugging Face folder < YAML file < `section.key=value` overrides, every value checked on its
    own.

    A mapping (`reward.functions`, `algorithm.dials`, `data.task`) replaces the one of a lower layer;
    `reward.functions.NAME=weight`, where NAME may contain dots, adds an entry to it. With `hf`, the model is that of
    the folder, whatever sizes the file names.

    Raises:
        ConfigError: a missing file, an unknown section or key (suggests the closest name), a value of the wrong type or
            out of range, or one that contradicts the folder.
    """
    asked: Values = {}
    for section, values in (_read_yaml(Path(path)) if path is not None else {}).items():
        asked[section] = {key: _meant(_declared(section, key), value) for key, value in values.items()}
    if hf is not None:
        asked["model"] = _without_sizes(asked.get("model", {}), folder_settings(hf)) | {"hf": hf}
    for override in overrides:
        section, key, name, value = _read_override(override)
        keys = asked.setdefault(section, {})
        keys[key] = value if name is None else {**keys.get(key, {}), name: value}

    base = _base_model(_typed(asked).model, asked.get("model", {}))
    # null stands for the tokenizer's vocabulary, but a folder has its own.
    own = {key: value for key, value in asked.get("model", {}).items() if value is not None or key not in base}
    config = _typed({"model": base}, {**asked, "model": own})
    check_values(config)
    return config


def _without_sizes(model: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of section `model` that do not say which model it is. A shorter max_sequence_length stays."""
    kept = {key: value for key, value in model.items() if key not in ("preset", "hf", *found)}
    length = model.get("max_sequence_length")
    if isinstance(length, int) and length < found["max_sequence_length"]:
        kept["max_sequence_length"] = length
    return kept


def _base_model(model: ModelConfig, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings `asked` of section `model` are laid over: those of a folder, or of a preset. `model` has them
    typed.

    Raises:
        ConfigError: both are named, or a setting contradicts the folder.
    """
    _check(SETTINGS["model.preset"], model.preset)
    if model.hf is None:
        return PRESETS[model.preset]
    if "preset" in asked:
        raise ConfigError(
            f"model.hf={model.hf} and model.preset={model.preset} both give the sizes of the model; leave one of them "
            "out"
        )
    found = folder_settings(model.hf)
    check_agreement({key: getattr(model, key) for key in asked}, found, model.hf)
    return found


def replaced(config: Config, settings: Mapping[str, Any]) -> Config:
    """A copy of `config` with other values, by key: `replaced(config, {"model.vocab_size": 12, "run.dir": "x"})`. A
    mapping is replaced as a whole.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or one that affects other settings only
            while they are loaded: model.preset and model.hf.
    """
    for key in ("model.preset", "model.hf"):
        if key in settings:
            raise ConfigError(f"{key}={settings[key]!r} cannot be replaced after loading; pass it to load_config")
    asked: Values = {}
    for place, value in settings.items():
        section, _, key = place.partition(".")
        _check_section(section)
        asked.setdefault(section, {})[key] = _meant(_declared(section, key), value)
    typed = _typed(asked)
    sections = {
        section: replace(getattr(config, section), **{key: getattr(getattr(typed, section), key) for key in keys})
        for section, keys in asked.items()
    }
    changed = replace(config, **sections)
    check_values(changed)
    return changed


def check_values(config: Config) -> None:
    """Checks every value on its own: choices, ranges, finite numbers.

    Raises:
        ConfigError: the first value that is not allowed.
    """
    for key, setting in SETTINGS.items():
        section, _, name = key.partition(".")
        _check(setting, getattr(getattr(config, section), name))


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML, from which `load_config` makes the same Config."""
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    if config.model.hf:
        del settings["model"]["preset"]  # which would be a second source of sizes
    return OmegaConf.to_yaml(OmegaConf.create(settings))


def changed_yaml(config: Config) -> str:
    """The settings that differ from their defaults, those of model.preset included, as YAML from which `load_config`
    makes the same Config."""
    default = load_config(None, [f"model.preset={config.model.preset}"])
    changed: Values = {}
    for key in SETTINGS:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value != getattr(getattr(default, section), name) or (
            key == "model.preset" and value != Config().model.preset
        ):
            changed.setdefault(section, {})[name] = value
    return OmegaConf.to_yaml(OmegaConf.create(changed))


def saved_setting(path: Path, name: str) -> Any:
    """The value of `section.key` in a config.yaml of a run; None where there is no such value, or none can be read."""
    try:
        return OmegaConf.select(OmegaConf.load(path), name)
    except Exception:  # the YAML parser's own, of many kinds
        return None


def _typed(*layers: Values) -> Config:
    """The defaults under these layers, lowest first.

    Raises:
        ConfigError: a value of the wrong type.
    """
    schema: DictConfig = OmegaConf.structured(Config)
    for section in SECTIONS:
        # OmegaConf marks the sections of frozen dataclasses read-only, and merging must write into them.
        OmegaConf.set_readonly(schema[section], False)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, *layers))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {shortened(str(error).splitlines()[0])}") from error
    except OverflowError as error:
        raise ConfigError(f"a number in the settings is too large ({error})") from error


def _check(setting: Setting, value: Any) -> None:
    if refusal := REFUSED.get(f"{setting.key}={value}"):
        raise ConfigError(f"{setting.key}={value} is not offered: {refusal}")
    if complaint := setting.complaint(value):
        raise ConfigError(complaint)


def _read_yaml(path: Path) -> Values:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"config file {str(path)!r} does not exist{did_you_mean(str(path), siblings)}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML parser's own message carries line and column
        raise ConfigError(f"config file {str(path)!r} is not YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config file {str(path)!r} must contain sections ({', '.join(SECTIONS)})")
    for section, values in content.items():
        _check_section(str(section))
        if not isinstance(values, dict):
            raise ConfigError(f"config section {section!r} must contain keys, got {values!r}")
    return content  # type: ignore[return-value]


def _read_override(override: str) -> tuple[str, str, str | None, Any]:
    """`section.key=value` or `section.key.name=value` -> (section, key, name of a mapping's entry or None, value)."""
    place, equals, text = override.partition("=")
    section, *rest = place.split(".", 2)
    if not equals or not rest:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    _check_section(section)
    key, name = rest[0], rest[1] if len(rest) > 1 else None
    setting = _declared(section, key)
    if name is not None and not setting.is_mapping:
        raise ConfigError(f"override {override!r}: {section}.{key} is a single value and has no entry {name!r}")
    structured = setting.type is Any and text[:1] in ("[", "{")
    if setting.is_text and not structured and text != "null" and text[:1] not in ("", "'", '"'):
        # Text is taken literally, even where YAML would read something else into it: off, 5, {prompt}, a b #c.
        return section, key, name, text if name is not None else _meant(setting, text)
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except Exception as error:
        raise ConfigError(f"override {override!r} is not YAML: {_one_line(error)}") from error
    if name is None:
        return section, key, name, _meant(setting, value)
    return section, key, name, _meant_source(value) if setting.key in SOURCES_BY_NAME else value


def _meant(setting: Setting, value: Any) -> Any:
    """The value that YAML read, as its setting means it.

    Raises:
        ConfigError: the setting is a mapping or a list and the value is not.
    """
    if setting.key in SOURCES_BY_NAME and isinstance(value, Mapping):
        return {name: _meant_source(item) for name, item in value.items()}
    if setting.is_mapping and not isinstance(value, Mapping):
        raise ConfigError(f"{setting.key} must be a mapping of names to values, got {value!r}")
    if setting.is_list and not isinstance(value, list):
        raise ConfigError(f"{setting.key} must be a list, got {value!r}; write {setting.key}=[{value!r}]")
    if value is None:
        _check(setting, value)
    if setting.is_mapping:
        _check_spaces(setting, value)
    if isinstance(value, bool) and setting.choices:
        return "on" if value else "off"  # YAML 1.1 reads a bare on or off as true or false
    if isinstance(value, str):
        return _meant_text(setting.key, value)
    if setting.type is Any and isinstance(value, list):
        return [_meant(setting, item) for item in value]
    if setting.type is Any and isinstance(value, Mapping):
        return _meant_source(value)
    return value


def _check_spaces(setting: Setting, entries: Mapping[Any, Any]) -> None:
    """YAML reads {clip.low:0.1} as a name without a value.

    Raises:
        ConfigError: an entry was written so.
    """
    for entry, value in entries.items():
        name, colon, text = str(entry).rpartition(":")
        if colon and value is None:
            raise ConfigError(
                f"{setting.key}: {entry!r} has no value; write a space after the colon, {{{name}: {text}}}, or "
                f"{setting.key}.{name}={text}"
            )


def _meant_source(value: Any) -> Any:
    """A source, as text or with settings of its own."""
    if isinstance(value, str):
        return _meant_text("data.train", value)
    if isinstance(value, Mapping):
        texts = {name: _meant_text(PATH_IN.get(str(name), ""), v) for name, v in value.items() if isinstance(v, str)}
        return {**value, **texts}
    return value


def _meant_text(key: str, text: str) -> str:
    """Text as it is, and a path with its home folder written out.

    Raises:
        ConfigError: text that stands for nothing or that no file can be called.
    """
    if text == "???":
        raise ConfigError(f"{key}=??? is OmegaConf's mark of a missing value; write the value, or leave the key out")
    if "\0" in text:
        raise ConfigError(f"{key}={shortened(text)!r} has a NUL character; remove it")
    if key in LITERAL:
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    if key not in PATHS or text.startswith("characters"):
        return text
    if too_long := [name for name in text.split("/") if len(name.encode(errors="replace")) > LONGEST_NAME]:
        raise ConfigError(
            f"{key}: {shortened(too_long[0])!r} has more than {LONGEST_NAME} bytes; no file has such a name"
        )
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _check_section(section: str) -> None:
    if section not in SECTIONS:
        near = did_you_mean(str(section), SECTIONS) or "."
        raise ConfigError(f"unknown config section {section!r}{near} Sections: {', '.join(SECTIONS)}")


def _declared(section: str, key: str) -> Setting:
    """The declaration of a setting.

    Raises:
        ConfigError: a key that was renamed or removed, or an unknown one (suggests the closest).
    """
    place = f"{section}.{key}"
    if place in SETTINGS:
        return SETTINGS[place]
    if place in RENAMED:
        raise ConfigError(f"config key {place!r} is now called {RENAMED[place]!r}; use that name")
    if place in REMOVED:
        raise ConfigError(f"config key {place!r} was removed: {REMOVED[place]}; leave it out")
    keys = [k.partition(".")[2] for k in SETTINGS if k.startswith(f"{section}.")]
    elsewhere = [k for k in SETTINGS if k.partition(".")[2] == key]
    near = f"; did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(str(key), keys) or "."
    raise ConfigError(f"unknown config key {place!r}{near} Keys of {section}: {', '.join(keys)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
