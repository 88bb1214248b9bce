"""HTTP to an engine, with what can go wrong named: one call, or many streams of server-sent events at once."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gspo_megatron.base.errors import EngineError, Refused, shortened

LONGEST_LINE = 1 << 26
"""Bytes of an event: a probe of a long sequence is one."""
DONE = "[DONE]"
NOTHING_KNOWN = "the engine's log{log} says more; what it was asked is lost, and nothing was trained on it"

NOT_TO_BE_REPEATED = (
    "the engine is well, and would refuse the same again; correct what its message names, in the settings, the data or "
    "the version of vLLM (docs/engines.md)"
)
BUSY = (408, 425, 429)
"""Statuses between 400 and 500 that tell of the engine and not of what it was asked."""


@dataclass(frozen=True)
class Address:
    """Where an engine listens.

    Attributes:
        name: of the engine, for messages.
        token: sent as `Authorization: Bearer`; empty: none.
        log: what the engine prints, where this machine has it.
    """

    name: str
    host: str
    port: int
    token: str = field(default="", repr=False)
    log: str = field(default="", repr=False, compare=False)

    @classmethod
    def of(cls, name: str, url: str, token: str = "") -> Address:
        """
        Raises:
            EngineError: not http://HOST:PORT.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme != "http" or not parts.hostname or port is None or parts.path not in ("", "/"):
            raise EngineError(f"{name}: {url!r} is not an address of an engine; write it as http://HOST:PORT")
        return cls(name, parts.hostname, port, token)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        authorized = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return {"Content-Type": "application/json", **authorized}

    def error(self, what: str, advice: str = "") -> EngineError:
        """What to raise about this engine."""
        advice = advice or NOTHING_KNOWN.format(log=f", {self.log}," if self.log else "")
        return EngineError(f"{self.name} ({self.url}) {what}; {advice}")

    def unreachable(self, error: BaseException) -> EngineError:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return self.error(f"does not answer ({reason})")

    def refused(self, path: str, status: int, body: bytes) -> EngineError:
        what = f"answered {path} with status {status}: {said(body)}"
        if 400 <= status < 500 and status not in BUSY:
            return Refused(str(self.error(what, NOT_TO_BE_REPEATED)))
        return self.error(what)


def call(address: Address, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float) -> Any:
    """The JSON that the engine answers; None for an empty answer.

    Raises:
        Refused: a status from 400 to 499.
        EngineError: no answer in `timeout_s` seconds, another status than 200, or something that is not JSON.
    """
    status, received = exchange(address, method, path, body, timeout_s=timeout_s)
    if status != 200:
        raise address.refused(path, status, received)
    try:
        return json.loads(received) if received.strip() else None
    except ValueError as error:
        raise address.error(f"answered {path} with what is not JSON: {said(received)}") from error


def exchange(
    address: Address, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
) -> tuple[int, bytes]:
    """Status and content of what the engine answers.

    Raises:
        EngineError: no answer in `timeout_s` seconds.
    """
    connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    try:
        content = json.dumps(body).encode() if body is not None else None
        connection.request(method, path, content, address.headers)
        answer = connection.getresponse()
        received = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise address.unreachable(error) from error
    finally:
        connection.close()
    return answer.status, received


async def events(address: Address, path: str, body: Mapping[str, Any]) -> AsyncIterator[Any]:
    """The JSON of each event of a stream, up to its `[DONE]`.

    Raises:
        Refused: a status from 400 to 499.
        EngineError: the connection breaks, the stream ends early, another status than 200, or something else than
            events.
    """
    writer = None
    try:
        reader, writer = await asyncio.open_connection(address.host, address.port, limit=LONGEST_LINE)
        content = json.dumps(body).encode()
        headers = {"Host": f"{address.host}:{address.port}", "Content-Length": len(content), "Connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in {**headers, **address.headers}.items())
        writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content)
        status, chunked = await _head(reader)
        if status != 200:
            raise address.refused(path, status, await reader.read(1 << 16))
        async for line in _lines(reader, chunked):
            if not line.startswith(b"data:"):
                if line:
                    raise address.error(f"streams what is not an event: {said(line)}")
                continue
            data = line.removeprefix(b"data:").strip()
            if data == DONE.encode():
                return
            try:
                yield json.loads(data)
            except ValueError as error:
                raise address.error(f"streams what is not JSON: {said(data)}") from error
        raise address.error("ended a stream in the middle of a response")
    except (OSError, EOFError, ValueError) as error:
        raise address.unreachable(error) from error
    finally:
        if writer is not None:
            writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """(status, whether the body comes in chunks)."""
    first = await reader.readline()
    if not first.startswith(b"HTTP/") or len(first.split()) < 2:
        raise ValueError("not HTTP")
    chunked = False
    while header := (await reader.readline()).strip().lower():
        name, _, value = header.partition(b":")
        chunked |= name == b"transfer-encoding" and b"chunked" in value
    return int(first.split()[1]), chunked


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """Lines of the body, without their ends. Chunks may cut a line anywhere."""
    rest = b""
    while True:
        if chunked:
            size = int(await reader.readuntil(b"\n"), 16)
            part = await reader.readexactly(size)
            await reader.readexactly(2)
        else:
            part = await reader.read(1 << 16)
        if not part:
            return
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")


def said(body: bytes) -> str:
    """What an answer says, in a line: the message of an error where it has one."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return shortened(str(json.loads(body)["error"]["message"]))
    return shortened(repr(body.decode(errors="replace")))
