"""ENVIRONMENTS: the table, and what rollout.environment names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gspo_megatron.base.errors import ConfigError, did_you_mean
from gspo_megatron.environments.environment import Environment
from gspo_megatron.environments.python import PythonTool, Ran
from gspo_megatron.environments.single_turn import SingleTurn
from gspo_megatron.environments.tools import Calculator

ENVIRONMENTS: dict[str, Callable[..., Environment]] = {
    "single_turn": SingleTurn,
    "calculator": Calculator,
    "python": PythonTool,
}


def runs_programs(name: str) -> bool:
    """Whether the environment of that name takes `run`."""
    return name in ENVIRONMENTS and "run" in inspect.signature(ENVIRONMENTS[name]).parameters


def find_environment(name: str, parameters: Mapping[str, Any], run: Callable[[str], Ran] | None = None) -> Environment:
    """The environment of that name. `run`: runs a program, for those that need it.

    Raises:
        ConfigError: unknown name, or parameters that it does not take.
    """
    if name not in ENVIRONMENTS:
        raise ConfigError(
            f"rollout.environment={name!r} is unknown{did_you_mean(name, ENVIRONMENTS) or '.'} Known: "
            f"{', '.join(ENVIRONMENTS)}, and your own as 'module:function'"
        )
    try:
        own = {"run": run} if runs_programs(name) else {}
        return ENVIRONMENTS[name](**own, **parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"rollout.environment_arguments={dict(parameters)} does not suit rollout.environment={name}: {error}"
        ) from error
