"""Packages that only some sources of data need."""

from __future__ import annotations

import importlib
from typing import Any

from gspo_megatron.base.errors import ConfigError


def needed(package: str, for_what: str) -> Any:
    """The imported package.

    Raises:
        ConfigError: it is not installed. Names the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ConfigError(
            f"{for_what} needs the package {name} ({error}); install it with `pip install {name}`"
        ) from error
