"""A door in front of all routes of vLLM's server: vLLM's own asks for the token in front of some of them only, and lets
two runs change the weights of one engine.

--middleware gspo_megatron.rollout.vllm_guard.Guard
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from vllm import envs

from gspo_megatron.rollout.lease import LEASE, RUN

OPEN = ("/health",)
LOOK_S, BEAT_S = 0.5, 30.0
"""Seconds between two looks whether the server ends, and between two signs of life to the run."""


class Guard:
    """ASGI middleware: status 401 without the token of the environment, where there is one; and the engine's lease."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._expected = f"Bearer {envs.VLLM_API_KEY}".encode() if envs.VLLM_API_KEY else b""
        self._run = ""
        """That has the engine."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            headers = dict(scope["headers"])
            if self._expected and not secrets.compare_digest(headers.get(b"authorization", b""), self._expected):
                await _refuse(send, 401, "Unauthorized")
                return
            if scope["path"] == LEASE:
                await self._lend(headers.get(RUN.lower().encode(), b"?").decode(), scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _lend(self, run: str, scope: Any, receive: Any, send: Any) -> None:
        """Answers as long as the connection lasts: the engine is this run's until then, however the run ends. Status
        409 to another one meanwhile."""
        if self._run:
            await _refuse(send, 409, self._run)
            return
        self._run, left = run, asyncio.ensure_future(_disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            beats = 0.0
            # A server that ends waits for its connections.
            while not left.done() and not scope["app"].state.server.should_exit:
                if beats <= 0:  # without them, a machine that lost its power would keep the engine
                    await send({"type": "http.response.body", "body": b"\n", "more_body": True})
                    beats = BEAT_S
                await asyncio.wait({left}, timeout=LOOK_S)
                beats -= LOOK_S
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._run = ""
            left.cancel()


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(send: Any, status: int, message: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps({"error": {"message": message}}).encode()})
