"""The token between engines that were started apart from a run, and the run: never in settings or command lines, which
others can read."""

from __future__ import annotations

import os

VARIABLE = "GSPO_ENGINE_TOKEN"


def engine_token() -> str:
    """Empty: none."""
    return os.environ.get(VARIABLE, "")
