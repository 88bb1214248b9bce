"""Settings from YAML, presets and overrides: read strictly, every value checked by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gspo_megatron.base.errors import ConfigError, did_you_mean
from gspo_megatron.config.sections import CHOICES, MINIMA, POSITIVE, Config
from gspo_megatron.models.presets import PRESETS


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults < preset < YAML file < `section.key=value` overrides, every value checked by itself.

    A mapping (`reward.functions`, `data.task`) replaces the one of a lower layer; `reward.functions.NAME=weight`, where
    NAME may hold dots, adds an entry to it. Raises ConfigError for a missing file, an unknown section or key (with the
    nearest right name), a value of the wrong type or out of range.
    """
    asked: dict[str, dict[str, Any]] = {}
    for section, values in (_read_yaml(Path(path)) if path is not None else {}).items():
        asked[section] = {key: _meant(section, key, value) for key, value in values.items()}
    for override in overrides:
        section, key, name, value = _read_override(override)
        keys = asked.setdefault(section, {})
        keys[key] = value if name is None else {**keys.get(key, {}), name: value}

    schema = OmegaConf.structured(Config)
    try:
        preset = OmegaConf.merge(schema, asked).model.preset
        _check_choice("model.preset", preset)
        merged = OmegaConf.merge(schema, {"model": PRESETS[preset]}, asked)
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error
    check_values(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML; `load_config` of it gives the same Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"config file {str(path)!r} does not exist{did_you_mean(str(path), siblings)}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML parser's own message carries line and column
        raise ConfigError(f"config file {str(path)!r} is not YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config file {str(path)!r} must hold sections ({', '.join(_names(Config))})")
    for section, values in content.items():
        _check_section(str(section))
        if not isinstance(values, dict):
            raise ConfigError(f"config section {section!r} must hold keys, got {values!r}")
    return content  # type: ignore[return-value]


def _read_override(override: str) -> tuple[str, str, str | None, Any]:
    """`section.key=value` or `section.key.name=value` -> (section, key, name of a mapping's entry or None, value)."""
    place, equals, text = override.partition("=")
    section, *rest = place.split(".", 2)
    if not equals or not rest:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    _check_section(section)
    key, name = rest[0], rest[1] if len(rest) > 1 else None
    declared = _declared_type(section, key)
    if name is not None and not declared.startswith("dict"):
        raise ConfigError(f"override {override!r}: {section}.{key} is one value and has no entry {name!r}")
    if declared.startswith("str") and text != "null" and text[:1] not in ("", "'", '"'):
        # Text is meant as it stands, also where YAML would see something else in it: off, 5, {prompt}, a b #c.
        return section, key, name, text
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except Exception as error:
        raise ConfigError(f"override {override!r} is not YAML: {_one_line(error)}") from error
    return section, key, name, value if name is not None else _meant(section, key, value)


def _meant(section: str, key: str, value: Any) -> Any:
    """A value as YAML read it -> as its setting means it. Raises ConfigError for an unknown key, or no mapping for
    one."""
    if _declared_type(section, key).startswith("dict") and not isinstance(value, dict):
        raise ConfigError(f"{section}.{key} must hold names with values, got {value!r}")
    if isinstance(value, bool) and f"{section}.{key}" in CHOICES:
        return "on" if value else "off"  # what a bare on or off is in YAML 1.1
    return value


def _check_section(section: str) -> None:
    if section not in _names(Config):
        near = did_you_mean(str(section), _names(Config)) or "."
        raise ConfigError(f"unknown config section {section!r}{near} Sections: {', '.join(_names(Config))}")


def _declared_type(section: str, key: str) -> str:
    """The annotation of a setting, such as `str | None`. Raises ConfigError for an unknown key, with the nearest
    right one."""
    sections = {f.name: type(getattr(Config(), f.name)) for f in fields(Config)}
    for setting in fields(sections[section]):
        if setting.name == key:
            return str(setting.type)
    elsewhere = [f"{s}.{key}" for s, t in sections.items() if key in _names(t)]
    keys = _names(sections[section])
    near = f"; did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(str(key), keys) or "."
    raise ConfigError(f"unknown config key '{section}.{key}'{near} Keys of {section}: {', '.join(keys)}")


def _names(dataclass_type: type) -> list[str]:
    return [f.name for f in fields(dataclass_type)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _check_choice(key: str, value: Any) -> None:
    if value not in CHOICES[key]:
        raise ConfigError(
            f"{key}={value!r} is not one of {', '.join(CHOICES[key])}{did_you_mean(str(value), CHOICES[key])}"
        )


def check_values(config: Config) -> None:
    """Every value by itself: choices, ranges, finite numbers. Raises ConfigError."""
    for key in CHOICES:
        _check_choice(key, _value(config, key))
    for section in fields(Config):
        for name, value in asdict(getattr(config, section.name)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{section.name}.{name}={value} must be a finite number")
    for key, least in MINIMA.items():
        value = _value(config, key)
        if value is not None and value < least:
            raise ConfigError(f"{key}={value} must be at least {least}")
    for key in POSITIVE:
        if _value(config, key) <= 0:
            raise ConfigError(f"{key}={_value(config, key)} must be above 0")
    for key in ("optimizer.adam_beta1", "optimizer.adam_beta2"):
        if not 0 <= _value(config, key) < 1:
            raise ConfigError(f"{key}={_value(config, key)} must be at least 0 and below 1")
    if config.rollout.top_p > 1:
        raise ConfigError(f"rollout.top_p={config.rollout.top_p} must be at most 1 (1 switches it off)")
    for function, weight in config.reward.functions.items():
        if not isinstance(weight, float) or not math.isfinite(weight):
            raise ConfigError(
                f"reward.functions.{function}={weight} must be a finite number, the weight of that reward"
            )
