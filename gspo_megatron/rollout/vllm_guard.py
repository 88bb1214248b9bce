"""A door in front of all routes of vLLM's server: vLLM's own asks for the token in front of some of them only.

--middleware gspo_megatron.rollout.vllm_guard.Guard
"""

from __future__ import annotations

import secrets
from typing import Any

from vllm import envs

OPEN = ("/health",)


class Guard:
    """ASGI middleware: status 401 without the token of the environment, where there is one."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._expected = f"Bearer {envs.VLLM_API_KEY}".encode() if envs.VLLM_API_KEY else b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._expected and scope["type"] == "http" and scope["path"] not in OPEN:
            said = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(said, self._expected):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b'{"error": {"message": "Unauthorized"}}'})
                return
        await self._app(scope, receive, send)
