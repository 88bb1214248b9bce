"""What the reward `remote` costs the training process: a service on this machine that judges at once.

    python -m benchmarks.reward_service --output benchmarks/results/reward_service.json

The service is examples/reward_server, in a process of its own. Wall seconds, in which it has its part, and CPU seconds
of this process, which the sampler lacks.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.reports import machine
from benchmarks.rewards import rollouts
from gspo_megatron.device import open_device
from gspo_megatron.rewards.rewards import Rewards
from gspo_megatron.rollout.group_scores import GroupScores

SERVER = Path(__file__).parents[1] / "examples/reward_server"
COUNT, LENGTH, START_S = 1024, 4000, 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with served() as url:
        found = {
            "machine": machine(open_device("cpu", "fp32"), 1),
            "characters": LENGTH,
            "groups": [scored(url, size) for size in (1, 8, 16)],
        }
    text = json.dumps(found, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


@contextmanager
def served() -> Iterator[str]:
    """The address of the service, which ends with this."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port), "--log-level", "error"]
    process = subprocess.Popen(command, cwd=SERVER)
    try:
        until = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/score"
    finally:
        process.terminate()
        process.wait()


def scored(url: str, size: int) -> dict[str, Any]:
    """COUNT rollouts in groups of `size`, each group a request, eight requests at once."""
    rewards = Rewards({}, terms=[{"function": "remote", "url": url}])
    rewards.check_services()
    asked = rollouts(["x" * LENGTH] * COUNT, ["x"] * COUNT)
    rewards.score(asked[:64])
    wall, cpu = time.perf_counter(), time.process_time()
    with GroupScores(rewards, lambda rollout: None, first_id=0, size=size) as scores:
        for rollout in asked:
            scores.add(rollout)
        scores.finish()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rewards.close()
    assert not any(rollout.reward_error for rollout in asked)
    return {"size": size, "rollouts": COUNT, "wall_ms": 1e3 * wall / COUNT, "cpu_of_trainer_ms": 1e3 * cpu / COUNT}


if __name__ == "__main__":
    main()
