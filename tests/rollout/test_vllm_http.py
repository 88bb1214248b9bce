"""What comes of a server that answers wrongly: an error with the engine's name, and nothing that could be trained on.

The server says what a test wrote for it, whatever it is asked. A real vLLM is in tests/engine.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from gspo_megatron.base.errors import EngineError, Refused
from gspo_megatron.rollout.engine import Piece, Request, Span
from gspo_megatron.rollout.engine_draws import DrawByCounter
from gspo_megatron.rollout.http import Address
from gspo_megatron.rollout.vllm import VllmEngine
from gspo_megatron.testing.time_limits import time_factor

NUM_IDS = 13
DRAW = DrawByCounter(NUM_IDS, 16)


class Server:
    """Answers every connection with the bytes in `says`, `chunk` of them at a time; then closes it, or `hangs`."""

    def __init__(self) -> None:
        self.says, self.chunk, self.hangs, self.asked = b"", 1 << 20, False, list[bytes]()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()
        self.port: int = self._socket.getsockname()[1]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += connection.recv(1 << 16)
            head, _, body = asked.partition(b"\r\n\r\n")
            length = next((int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-l")), 0)
            while len(body) < length:
                body += connection.recv(1 << 16)
            self.asked.append(head + b"\r\n\r\n" + body)
            for start in range(0, len(self.says), self.chunk):
                connection.sendall(self.says[start : start + self.chunk])
            if self.hangs:
                self._ended.wait()

    def close(self) -> None:
        self._ended.set()
        self._socket.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def engine_at(port: int, timeout_s: float = 60.0) -> VllmEngine:
    address = Address("engine 0", "127.0.0.1", port, token="secret")
    return VllmEngine(address, draw=DRAW, temperature=1.0, timeout_s=timeout_s * time_factor(), stream_interval=4)


def event(tokens: list[int], finish: str | None = None, **changed: Any) -> dict[str, Any]:
    content = [{"token_id": token, "logprob": -0.5 - i, "rank": 1} for i, token in enumerate(tokens)]
    spans = [{"version": "4", "start": 0, "end": 3}] if finish else None
    choice = {"finish_reason": finish, "token_ids": tokens, "logprobs": {"content": content}, "weight_versions": spans}
    return {"request_id": "x", "choices": [choice | changed]}


def stream(*events: object, end: str = "data: [DONE]\n\n") -> bytes:
    """In chunks that end within lines, as a network may cut them."""
    body = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + end
    parts = [body[i : i + 50].encode() for i in range(0, len(body), 50)]
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
        f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in [*parts, b""]
    )


def answer(body: object, status: str = "200 OK") -> bytes:
    content = json.dumps(body).encode() if not isinstance(body, bytes) else body
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


REQUEST = Request(7, (1, 2), (), 5, 0.7, 0.9, 0, 8, (0,))


def test_pieces_have_tokens_log_probs_and_versions(server: Server) -> None:
    server.says, server.chunk = answer({"weight_version": "4"}), 7
    engine = engine_at(server.port)
    assert engine.version() == 4
    server.says = stream(event([3, 4]), event([0], "stop"))
    assert list(engine.generate([REQUEST])) == [
        Piece(7, (3, 4), (-0.5, -1.5), (Span(4, 0, 2),), ""),
        Piece(7, (0,), (-0.5,), (Span(4, 2, 3),), "stop"),
    ]
    head, _, body = server.asked[-1].partition(b"\r\n\r\n")
    assert b"authorization: bearer secret" in head.lower()
    asked = json.loads(body)
    assert asked["token_ids"] == [1, 2]
    drawn = {"seed": 5, "id": 7, "begin": 0, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "num_ids": 13, "forced": []}
    assert asked["sampling_params"]["extra_args"]["gspo_megatron"] == drawn


def test_a_response_goes_on_where_it_was_cut(server: Server) -> None:
    server.says = stream(event([5], "length", weight_versions=[{"version": "default", "start": 0, "end": 1}]))
    cut = replace(REQUEST, response=(3, 4), max_new_tokens=3)
    assert list(engine_at(server.port).generate([cut])) == [Piece(7, (5,), (-0.5,), (Span(-1, 2, 3),), "length")]
    asked = json.loads(server.asked[-1].partition(b"\r\n\r\n")[2])
    params = asked["sampling_params"]
    assert (asked["token_ids"], params["max_tokens"]) == ([1, 2, 3, 4], 1)
    assert params["extra_args"]["gspo_megatron"]["begin"] == 2


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        (answer({"error": {"message": "out of memory"}}, "500 Internal"), "with status 500: out of memory"),
        (answer(b"<html>proxy</html>", "502 Bad"), "with status 502: '<html>proxy</html>'"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer (ValueError: not HTTP)"),
        (b"", "does not answer (ValueError: not HTTP)"),
        (stream(event([3]), end=""), "ended a stream in the middle"),
        (stream(event([3])), "ended a stream in the middle"),
        (stream(event([3]))[:-40], "does not answer (IncompleteReadError"),
        (stream({"error": {"message": "the worker died"}}), "failed while it sampled: {'message': 'the worker died'}"),
        (stream(end="data: {broken\n\n"), "streams what is not JSON"),
        (stream(end="hello\n\n"), "streams what is not an event: 'hello'"),
        (stream({"choices": []}), "streams an event that vLLM does not send"),
        (stream(event([3], "content_filter")), "streams an event that vLLM does not send"),
        (stream(event([3], logprobs=None)), "sent tokens (3,) with log-probs of ()"),
        (stream(event([NUM_IDS])), "sent token 13, but the tokenizer has 13 ids"),
        (stream(event([3, 4, 5]), event([0], "stop")), "sampled tokens of versions"),
        (
            stream(event([3], weight_versions=[{"version": "x", "start": 0, "end": 1}])),
            "streams an event that vLLM does",
        ),
        (stream(event([0, 3, 4], "stop", weight_versions=None), event([5])), "went on with a response that had ended"),
    ],
)
def test_a_wrong_answer_is_an_error_that_names_the_engine(server: Server, says: bytes, complaint: str) -> None:
    server.says = says
    with pytest.raises(EngineError) as caught:
        # A response that ends is followed by another, which does not come.
        list(engine_at(server.port).generate([REQUEST, Request(8, (1,), (), 5, 1.0, 1.0, 0, 8, (0,))]))
    assert str(caught.value).startswith(f"engine 0 (http://127.0.0.1:{server.port}) "), caught.value
    assert complaint in str(caught.value)
    assert "nothing was trained on it" in str(caught.value) or "must have the model of this run" in str(caught.value)


def test_an_engine_that_sends_nothing_is_given_up(server: Server) -> None:
    server.says, server.hangs = stream(event([3]), end="")[:-5], True
    pieces = engine_at(server.port, timeout_s=0.5).generate([REQUEST])
    assert next(pieces).tokens == (3,)
    with pytest.raises(EngineError, match=r"sent no token for [\d.]+ s \(engine.timeout_s\)"):
        next(pieces)


def test_no_time_counts_while_an_engine_is_paused(server: Server) -> None:
    """The trainer may need longer for an update than an engine may be silent."""
    server.says = answer({"weight_version": "4"})
    engine = engine_at(server.port, timeout_s=0.4)
    engine.pause("keep")
    server.says, server.hangs = stream(event([3]), end="")[:-5], True
    pieces = engine.generate([REQUEST])
    assert next(pieces).tokens == (3,)
    heard: list[Exception] = []

    def listen() -> None:
        try:
            next(pieces)
        except EngineError as error:
            heard.append(error)

    listener = threading.Thread(target=listen)
    listener.start()
    listener.join(3 * engine.timeout_s)
    assert not heard and listener.is_alive()
    server.says, server.hangs = answer({"weight_version": "4"}), False
    began = time.monotonic()
    engine.resume()
    listener.join()
    assert "sent no token for" in str(heard[0]) and time.monotonic() - began >= engine.timeout_s


def test_what_an_engine_samples_ends_when_it_is_given_up(server: Server) -> None:
    server.says = answer({"weight_version": "4"})
    engine = engine_at(server.port)
    engine.pause("keep")
    server.says, server.hangs = stream(event([3]), end="")[:-5], True
    pieces = engine.generate([REQUEST])
    next(pieces)
    engine.give_up()
    with pytest.raises(EngineError, match="taken for dead"):
        next(pieces)
    # One that begins after that has a time limit again.
    engine.timeout_s = 0.3
    pieces = engine.generate([REQUEST])
    next(pieces)
    with pytest.raises(EngineError, match="sent no token"):
        next(pieces)


def test_a_large_group_leaves_the_probe_room(server: Server) -> None:
    server.says, server.hangs = stream(event([3]), end="")[:-5], True
    address = Address("engine 0", "127.0.0.1", server.port)
    engine = VllmEngine(address, draw=DRAW, temperature=1.0, timeout_s=60, stream_interval=4, most_streams=2)
    pieces = engine.generate([replace(REQUEST, id=i) for i in range(5)])
    assert {next(pieces).id, next(pieces).id} == {0, 1}
    time.sleep(0.2)
    assert len(server.asked) == 2
    pieces.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("status", "refused"),
    [("400 Bad", True), ("401 No", True), ("404 None", True), ("429 Busy", False), ("503 x", False)],
)
def test_a_refusal_is_told_from_the_fault_of_an_engine(server: Server, status: str, refused: bool) -> None:
    server.says = answer({"error": {"message": "the prompt is too long"}}, status)
    for ask in (lambda engine: engine.version(), lambda engine: list(engine.generate([REQUEST]))):
        with pytest.raises(EngineError, match=rf"status {status[:3]}: the prompt is too long; ") as caught:
            ask(engine_at(server.port))
        assert isinstance(caught.value, Refused) == refused
        assert ("would refuse the same again" in str(caught.value)) == refused


def test_the_token_is_not_shown() -> None:
    address = Address("engine 0", "127.0.0.1", 1, "the secret")
    assert "the secret" not in repr(address) and "127.0.0.1" in repr(address)


def test_a_stream_that_is_left_ends(server: Server) -> None:
    server.says, server.hangs = stream(event([3]), end="")[:-5], True
    before = threading.active_count()
    pieces = engine_at(server.port).generate([REQUEST])
    next(pieces)
    pieces.close()
    assert threading.active_count() <= before + 1  # the server's own


CALLS: tuple[Callable[[VllmEngine], object], ...] = (
    lambda engine: engine.version(),
    lambda engine: engine.pause("keep"),
    lambda engine: engine.resume(),
    lambda engine: engine.probe([1, 2, 3], 1),
)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "says", [answer({"error": {"message": "no"}}, "500 No"), answer(b"{half"), b"", b"no HTTP\r\n"]
)
def test_a_call_that_goes_wrong_is_an_error(server: Server, call: Callable[[VllmEngine], object], says: bytes) -> None:
    server.says = says
    with pytest.raises(EngineError, match=r"^engine 0 \(http://127\.0\.0\.1:\d+\) "):
        call(engine_at(server.port))


def test_a_version_that_is_none_is_an_error(server: Server) -> None:
    server.says = answer({"weight_version": "seven"})
    with pytest.raises(EngineError, match="does not tell the version of its weights"):
        engine_at(server.port).version()


def test_a_probe_of_other_tokens_is_an_error(server: Server) -> None:
    server.says = answer(event([5, 5], "length"))
    with pytest.raises(EngineError, match=r"scored \[\[5\], \[5\]\] where it was asked for \(2, 3\)"):
        engine_at(server.port).probe([1, 2, 3], 1)


def test_alive_never_raises(server: Server) -> None:
    server.says = answer(b"")
    assert engine_at(server.port).alive()
    server.says = answer(b"", "503 Dead")
    assert not engine_at(server.port).alive()
    server.close()
    assert not engine_at(server.port).alive()


@pytest.mark.parametrize("url", ["https://host:1", "host:1", "http://host", "http://host:one", "http://host:1/path"])
def test_an_address_is_a_host_and_a_port(url: str) -> None:
    with pytest.raises(EngineError, match="is not an address of an engine; write it as http://HOST:PORT"):
        Address.of("engine 0", url)
    assert Address.of("engine 0", "http://node-3:8000/").port == 8000
