"""Rewards that other programs compute, over the network or with a model of their own: how `Rewards` asks them.

They wait, and need none of the processes that call functions (`workers.py`): a group waits in a thread of its own while
others are sampled.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards.functions import Arguments, Outcome
from gspo_megatron.rewards.rules import SERVICES


class Service(Protocol):
    """A row of SERVICES: a class, called with the parameters of a term and the environment variables of the run.

    Attributes:
        takes: the names in `functions.ARGUMENTS` that it asks for.
        groups_at_once: how many groups may wait for it at once.
        longest_s: the most that it may take for a rollout, once it is asked.
    """

    takes: tuple[str, ...]
    groups_at_once: int
    longest_s: float

    def submit(self, items: Sequence[Arguments], ids: Sequence[int]) -> list[Future[list[Outcome]]]:
        """One outcome for each rollout, in order, over all futures; no exception but that of being closed."""

    def check(self) -> None:
        """Asks for a trial, before the run begins.

        Raises:
            ConfigError: it cannot be reached, or gives nothing that is a score.
        """

    def close(self) -> None:
        """Who waits for outcomes gets a CancelledError."""


def open_service(name: str, parameters: Mapping[str, Any], environment: Mapping[str, str]) -> Service:
    """The row `name` of SERVICES, with these parameters.

    Raises:
        ConfigError: a package is missing, or a parameter cannot be used.
    """
    module, _, attribute = SERVICES[name].partition(":")
    try:
        service: Service = getattr(importlib.import_module(module), attribute)(parameters, environment)
    except (ImportError, ConfigError) as error:
        raise ConfigError(f"reward {name!r} cannot be used: {error}") from error
    return service
