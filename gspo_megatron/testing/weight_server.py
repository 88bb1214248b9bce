"""A server with vLLM's routes for weight updates and the receivers of a worker, but no model: it keeps the tensors.

python -m gspo_megatron.testing.weight_server PORT      # prints a line when it listens
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.rollout.weight_receivers import Receiver
from gspo_megatron.rollout.weight_stream import Bucket, Unpacker


class WeightServer:
    """
    Attributes:
        workers: receivers, as many as the engine has workers.
        tensors: of the last update, of each worker.
        routes: asked for, in order.
        fail: called with (route, body) before a request is served; what it raises is the answer, with status 500.
        damage: changes a bucket between receiving and checking it.
    """

    def __init__(self, num_workers: int = 1, port: int = 0) -> None:
        self.workers = [Receiver(torch.device("cpu")) for _ in range(num_workers)]
        self.tensors: list[dict[str, Tensor]] = [{} for _ in self.workers]
        self.unpackers: list[Unpacker] = []
        self.version, self.paused = "default", True
        self.routes: list[str] = []
        self.fail: Callable[[str, dict[str, Any]], None] = lambda route, body: None
        self.damage: Callable[[Bucket], Bucket] = lambda bucket: bucket
        self._update = threading.Lock()
        """As in vLLM, whose workers do one thing at a time: an update that failed elsewhere may still be read here."""
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler_of(self))
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        for worker in self.workers:
            worker.leave()

    def answer(self, route: str, body: dict[str, Any]) -> Any:
        self.routes.append(route)
        self.fail(route, body)
        if route == "/is_paused":
            return {"is_paused": self.paused}
        if route == "/get_world_size":
            return {"world_size": len(self.workers)}
        if route == "/weight_info":
            return {"weight_version": self.version}
        if route == "/collective_rpc":
            return {"results": [worker.session for worker in self.workers]}
        if route == "/init_weight_transfer_engine":
            info = body["init_info"]
            first = info.pop("first_rank")
            return self._on_all(lambda i: self.workers[i].join(rank=first + i, **info))
        with self._update:
            return self._updated(route, body)

    def _updated(self, route: str, body: dict[str, Any]) -> Any:
        if route == "/start_weight_update":
            self.unpackers = [Unpacker() for _ in self.workers]
            self.tensors = [{} for _ in self.workers]
        elif route == "/update_weights":
            return self._on_all(lambda i: self._load(i, body["update_info"]))
        elif route == "/finish_weight_update":
            assert all(unpacker.complete for unpacker in self.unpackers)
            self.version = body["weight_version"]
            for worker in self.workers:
                worker.release()
        return {}

    def _load(self, i: int, order: dict[str, Any]) -> None:
        for bucket in self.workers[i].buckets(**order):
            self.tensors[i].update(self.unpackers[i].tensors(self.damage(bucket)))

    def _on_all(self, call: Callable[[int], None]) -> dict[str, Any]:
        with ThreadPoolExecutor(len(self.workers)) as threads:
            list(threads.map(call, range(len(self.workers))))
        return {}


def _handler_of(server: WeightServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length) or b"{}")
            try:
                status, content = 200, json.dumps(server.answer(self.path, body))
            except Exception as error:
                status, content = 500, json.dumps({"error": {"message": str(error)}})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content.encode())

        do_GET = do_POST

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


if __name__ == "__main__":
    WeightServer(port=int(sys.argv[1]))
    print("listening", flush=True)
    time.sleep(600)
