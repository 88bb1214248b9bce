"""Scores from a service of one's own, over HTTP.

    POST url    {"rollouts": [{"id": 7, "prompt": "...", "response": "...", "answer": "...", ...}, ...]}
    200         {"scores": [1.0, {"score": 0.5, "style": 0.2}, {"error": "does not compile"}, ...]}

in the order of the rollouts. A score is what a function may return (`functions.parts`). No rollouts are answered with
no scores: that is the trial before a run. examples/reward_server is such a service.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from gspo_megatron.base.errors import ConfigError, did_you_mean, plural
from gspo_megatron.rewards.client import Client, Endpoint, Failure
from gspo_megatron.rewards.functions import ARGUMENTS, Arguments, Outcome, outcome_of
from gspo_megatron.rewards.parameters import number, read
from gspo_megatron.rewards.user_code import plain


@dataclass(frozen=True, kw_only=True)
class RemoteParameters(Endpoint):
    """
    Attributes:
        batch_size: the most rollouts of a request; those of a group go together.
        fields: what is sent of a rollout, besides its id.

    Raises:
        ConfigError: as `Endpoint`, or an unknown field.
    """

    batch_size: int = number(16, least=1)
    fields: tuple[str, ...] = ("prompt", "response", "answer", "messages", "metadata", "truncated")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.fields:
            if name not in ARGUMENTS:
                near = did_you_mean(str(name), ARGUMENTS)
                raise ConfigError(f"fields: {name!r} is not one of {', '.join(ARGUMENTS)}{near}")


class Remote:
    """See `Service`."""

    def __init__(self, parameters: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._parameters = read(RemoteParameters, parameters)
        self._client = Client(self._parameters, environment)
        self.takes, self.groups_at_once = tuple(self._parameters.fields), self._parameters.concurrency
        self.longest_s = self._parameters.longest_s

    def submit(self, items: Sequence[Arguments], ids: Sequence[int]) -> list[Future[list[Outcome]]]:
        rollouts = [{"id": id, **item} for id, item in zip(ids, items, strict=True)]
        size = self._parameters.batch_size
        return [self._client.start(self._scored(rollouts[i : i + size])) for i in range(0, len(rollouts), size)]

    async def _scored(self, rollouts: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        try:
            reply = await self._client.post(self._parameters.url, {"rollouts": rollouts})
            return [outcome_of(_complaint(score) or score) for score in _scores(reply, len(rollouts))]
        except Failure as failure:
            return [failure.outcome] * len(rollouts)

    def check(self) -> None:
        (outcome,) = self._client.start(self._trial()).result()
        if outcome.error:
            raise ConfigError(
                f"{outcome.error}; a request without rollouts, {{'rollouts': []}}, is to be answered with "
                "{'scores': []} before the run begins: start the service, or correct url"
            )

    async def _trial(self) -> list[Outcome]:
        try:
            _scores(await self._client.post(self._parameters.url, {"rollouts": []}), 0)
            return [Outcome({})]
        except Failure as failure:
            return [failure.outcome]

    def close(self) -> None:
        self._client.close()


class ServiceError(Exception):
    """What a service says of a rollout that it cannot judge."""


def _scores(reply: Any, count: int) -> list[Any]:
    """The scores of an answer, in order.

    Raises:
        Failure: there are not as many as rollouts.
    """
    scores = reply.get("scores") if isinstance(reply, dict) else None
    if not isinstance(scores, list):
        raise Failure(f"the service answered {plain(repr(reply), 60)}; expected {{'scores': [...]}}")
    if len(scores) != count:
        raise Failure(f"the service answered {plural(len(scores), 'score')} for {plural(count, 'rollout')}")
    return scores


def _complaint(score: Any) -> ServiceError | None:
    if isinstance(score, dict) and score.keys() == {"error"}:
        return ServiceError(str(score["error"]))
    return None
