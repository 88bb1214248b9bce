"""A reward as a service, for the reward `remote`: change `judge`, and run it where its model, compiler or data are.

pip install fastapi uvicorn
REWARD_TOKEN=... uvicorn server:app --host 0.0.0.0 --port 8000 --workers 4
"""

from __future__ import annotations

import hmac
import os
from typing import Any

from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel


class Rollout(BaseModel):
    """What the run sends of a response: the `fields` of its reward."""

    id: int
    prompt: str
    response: str
    answer: str = ""
    metadata: dict[str, Any] = {}
    truncated: bool = False


class Request(BaseModel):
    """No rollouts: the run asks whether there is a service."""

    rollouts: list[Rollout]


def judge(rollout: Rollout) -> float | dict[str, float]:
    """A number, or a dict with a "score" and others that become metrics. The run reports an exception."""
    if not rollout.answer:
        raise ValueError("there is no answer to compare with")
    words = rollout.response.lower().split()
    found = rollout.answer.lower() in words
    return {"score": float(found) - 0.5 * rollout.truncated, "words": len(words)}


app = FastAPI()
TOKEN = os.environ.get("REWARD_TOKEN", "")
"""Empty: everyone may ask."""


@app.post("/score")
def score(request: Request, authorization: str = Header("")) -> dict[str, list[Any]]:
    """FastAPI calls it in a thread, so that requests do not wait for each other."""
    if TOKEN and not hmac.compare_digest(authorization.encode(), f"Bearer {TOKEN}".encode()):
        raise HTTPException(401, "wrong token")
    return {"scores": [judged(rollout) for rollout in request.rollouts]}


def judged(rollout: Rollout) -> float | dict[str, Any]:
    """One rollout that cannot be judged does not cost the others their scores."""
    try:
        return judge(rollout)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
