"""Asks a service over HTTP: again where it may help, no longer where it does not.

    status or fault                                    what happens
    2xx with JSON                                      the answer
    3xx, 401, 403, 404, 405, 407                       the settings are wrong: the run stops
    408, 425, 429, 5xx, no connection, no answer       again, `retries` times; then the rollouts lose their rewards
    anything else                                      an error of these rollouts, for reward.on_error

A wait doubles from try to try, and is drawn between half of that and all of it, so that processes do not come back at
the same moment. A service that names a time (Retry-After, RFC 9110 section 10.2.3) is not asked before. After
`failures` requests in a row were given up, none is sent for `pause_s`; then one is tried (a circuit breaker).
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import uuid
import weakref
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards.functions import Outcome
from gspo_megatron.rewards.parameters import number
from gspo_megatron.rewards.user_code import described, plain

try:
    import httpx
except ImportError as error:
    raise ImportError("it needs the package httpx: pip install 'httpx', or '.[remote]' here") from error

WRONG_SETTINGS = {401, 403, 404, 405, 407}
TRANSIENT = {408, 425, 429}
MOST_REPLY = 2**24
"""Bytes of an answer."""
SHOWN = 300
"""Characters of an answer that a message shows."""
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a service is, and how it is asked.

    Attributes:
        token_variable: the environment variable that holds the token, sent as `Authorization: Bearer`. The token
            itself is written nowhere.
        concurrency: requests at once, by each rank that scores.
        timeout_s: of one try, from connecting to the last byte.
        retries: further tries.
        backoff_s: before the first of them.
        max_wait_s: the longest wait, also where the service asks for more: then the request is given up.
        failures, pause_s: of the circuit breaker.

    Raises:
        ConfigError: `url` is not an address.
    """

    url: str
    token_variable: str | None = None
    concurrency: int = number(8, least=1)
    timeout_s: float = number(60.0, above=0)
    retries: int = number(4, least=0)
    backoff_s: float = number(0.5, least=0)
    max_wait_s: float = number(60.0, least=0)
    failures: int = number(5, least=1)
    pause_s: float = number(30.0, least=0)

    @property
    def longest_s(self) -> float:
        """The most that a request may take with its further tries and the waits before them."""
        return (self.retries + 1) * self.timeout_s + self.retries * self.max_wait_s

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"url={self.url!r} is not an address ({error})") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"url={self.url!r} must be an address such as http://host:8000/score")
        if url.userinfo:
            raise ConfigError("url holds a password, which config.yaml would show; use token_variable")


class Failure(Exception):
    """No answer. `lost`: it says nothing about later rollouts; `stops`: no later one can succeed."""

    def __init__(self, text: str, *, lost: bool = False, stops: bool = False) -> None:
        super().__init__(text)
        self.outcome = Outcome({}, text, lost, stops)


class _Again(Exception):
    """A try that failed; another may not. `after_s`: not before."""

    def __init__(self, text: str, after_s: float = 0.0) -> None:
        super().__init__(text)
        self.after_s = after_s


class Client:
    """Sends the requests of one term, in an event loop with a thread of its own. Any thread may call `start`.

    The random numbers of waits are its own: those of the process belong to the run.
    """

    def __init__(self, endpoint: Endpoint, environment: Mapping[str, str]) -> None:
        self._endpoint, self._token = endpoint, environment.get(endpoint.token_variable or "", "").strip()
        self._random = random.Random()
        self._not_before = 0.0
        self._given_up, self._open_until = 0, 0.0
        self._stopped: Failure | None = None
        if endpoint.token_variable and not (self._token.isascii() and self._token.isprintable() and self._token):
            wrong = "holds what no token can be" if self._token else "is not set"
            self._stopped = Failure(
                f"the environment variable {endpoint.token_variable}, which token_variable names, {wrong}", stops=True
            )
        self._loop = asyncio.new_event_loop()
        self._http = httpx.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {self._token}"} if self._token and not self._stopped else {}),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=endpoint.concurrency),
            timeout=None,  # `_once` is given its time as a whole
        )
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward service", daemon=True)
        self._end = weakref.finalize(self, _end, self._loop, self._http, self._thread)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Runs a coroutine that calls `post`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancels what is under way."""
        self._end()

    async def post(self, url: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the service answers with.

        Raises:
            Failure: it does not.
        """
        request_id = uuid.uuid4().hex  # the same in every try: a service may keep its answer
        # Half a surrogate pair, which some servers refuse, becomes a question mark.
        content = json.dumps(body, default=str, ensure_ascii=False).encode(errors="replace")
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        async with self._slots:
            self._refuse_while_open()
            try:
                answer = await self._tried(url, content, headers)
            except Failure as failure:
                if failure.outcome.lost:
                    self._count()
                else:  # a refusal is an answer, too
                    self._given_up = 0
                if failure.outcome.stops:
                    self._stopped = failure
                raise
            self._given_up = 0
            return self._parsed(answer, request_id)

    async def _tried(self, url: str, content: bytes, headers: Mapping[str, str]) -> bytearray:
        e = self._endpoint
        for attempt in range(e.retries + 1):
            # Others may have been told to wait, too, or that nothing helps.
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            if self._stopped:
                raise self._stopped
            try:
                return await asyncio.wait_for(self._once(url, content, headers), e.timeout_s)
            except (asyncio.TimeoutError, TimeoutError):
                again = _Again(f"no answer within timeout_s={e.timeout_s:g} s")
            except (httpx.HTTPError, httpx.StreamError, OSError) as error:
                again = _Again(described(error))
            except _Again as error:
                again = error
            if again.after_s > e.max_wait_s:
                break
            if again.after_s:
                self._not_before = max(self._not_before, time.monotonic() + again.after_s)
            if attempt < e.retries:
                wait = min(e.max_wait_s, e.backoff_s * 2**attempt)
                await asyncio.sleep(max(again.after_s, wait * self._random.uniform(0.5, 1.0)))
        said = f"{url}: {again} (try {attempt + 1} of {e.retries + 1}, request {headers['X-Request-Id']})"
        if again.after_s > e.max_wait_s:
            said += f"; it asks to wait {again.after_s:g} s, more than max_wait_s={e.max_wait_s:g}"
        raise Failure(said, lost=True)

    async def _once(self, url: str, content: bytes, headers: Mapping[str, str]) -> bytearray:
        async with self._http.stream("POST", url, content=content, headers=headers) as response:
            received = bytearray()
            async for chunk in response.aiter_bytes():
                received += chunk
                if len(received) > MOST_REPLY:
                    raise Failure(f"{url}: an answer of more than {MOST_REPLY:,} bytes")
        status, said = response.status_code, f"HTTP {response.status_code}: {self._shown(received)}"
        if 200 <= status < 300:
            return received
        if status in TRANSIENT or status >= 500:
            raise _Again(said, _retry_after(response.headers.get("Retry-After", "")))
        if 300 <= status < 400:
            said = f"HTTP {status}: it sends to {response.headers.get('Location', 'nowhere')!r}; set url to where it is"
        if status in WRONG_SETTINGS or 300 <= status < 400:
            token = self._endpoint.token_variable
            has = f"the token of environment variable {token}" if token else "no token (token_variable)"
            raise Failure(f"{url}: {said}; correct the settings; the request had {has}", stops=True)
        raise Failure(f"{url}: {said} (request {headers['X-Request-Id']})")

    def _parsed(self, answer: bytearray, request_id: str) -> Any:
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            shown = self._shown(answer)
            raise Failure(f"{self._endpoint.url}: {shown!r} is not JSON (request {request_id})") from None

    def _shown(self, answer: bytearray) -> str:
        """Part of an answer; a service may repeat the token."""
        text = answer[: 2 * SHOWN].decode(errors="replace").strip()
        return plain(text.replace(self._token, "[token]") if self._token else text, SHOWN) or "(empty)"

    def _refuse_while_open(self) -> None:
        if self._given_up < self._endpoint.failures:
            return
        left = self._open_until - time.monotonic()
        if left > 0:
            raise Failure(
                f"{self._endpoint.url}: not asked: the last {self._given_up} requests failed; again in {left:.0f} s",
                lost=True,
            )
        self._open_until = time.monotonic() + self._endpoint.pause_s  # this request tries for all

    def _count(self) -> None:
        self._given_up += 1
        if self._given_up >= self._endpoint.failures:
            self._open_until = time.monotonic() + self._endpoint.pause_s


def _retry_after(text: str) -> float:
    """Seconds that a Retry-After header asks for: a number of them, or a date. 0: none."""
    if text.strip().isdecimal():
        return float(text)
    with suppress(ValueError, TypeError, OverflowError):
        moment = parsedate_to_datetime(text)
        now = datetime.now(timezone.utc if moment.tzinfo else None)
        return max(0.0, (moment - now).total_seconds())
    return 0.0


def _end(loop: asyncio.AbstractEventLoop, http: httpx.AsyncClient, thread: threading.Thread) -> None:
    async def leave() -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await http.aclose()
        loop.call_soon(loop.stop)

    if not loop.is_closed() and thread.is_alive():
        asyncio.run_coroutine_threadsafe(leave(), loop)
        if thread is not threading.current_thread():
            thread.join(timeout=5)
            if not thread.is_alive():
                loop.close()
