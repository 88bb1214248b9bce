"""A real HTTP server on this machine that answers as a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """`body`: JSON, or bytes as they are. `wait_s` before the first byte; `drip`: a byte at a time, for ever."""

    body: Any
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012
    wait_s: float = 0.0
    drip: bool = False


@dataclass
class Service:
    """`answer` is asked with the request's JSON and its number; what it returns is sent."""

    answer: Callable[[Any, int], Answer]
    url: str = ""
    requests: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(answer: Callable[[Any, int], Answer]) -> Iterator[Service]:
    service = Service(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with service.lock:
                number = len(service.requests)
                service.requests.append(request)
                service.headers.append(dict(self.headers))
                service.times.append(time.monotonic())
                service.at_once += 1
                service.most_at_once = max(service.most_at_once, service.at_once)
            found = service.answer(request, number)
            service.over.wait(found.wait_s)
            with service.lock:
                service.at_once -= 1
            body = found.body if isinstance(found.body, bytes) else json.dumps(found.body).encode()
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) + (1000 if found.drip else 0)))
            self.end_headers()
            self.wfile.write(body)
            while found.drip and not service.over.wait(0.05):
                self.wfile.write(b" ")

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that hangs up is part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}/score"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
