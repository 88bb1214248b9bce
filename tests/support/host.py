"""An environment of a user's own."""

from __future__ import annotations

from typing import Any


def host(messages: list[dict[str, Any]]) -> str | None:
    """Answers the first two turns."""
    return "12" if sum(message["role"] == "assistant" for message in messages) < 3 else None
