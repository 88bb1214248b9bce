"""What rewards cost: a call in a process of its own, a step whose rewards take long, and verifications of math.

    python -m benchmarks.rewards --output benchmarks/results/rewards.json

Wall seconds, and CPU seconds of this process where they say what rewards take from the sampler.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.reports import machine
from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.device import open_device
from gspo_megatron.rewards.rewards import Rewards
from gspo_megatron.rollout.group_scores import GroupScores

MODULE = """
import time

def nothing(response): return 1.0
def slow(response):
    time.sleep({seconds})
    return 1.0
"""
GROUP, GROUPS, WORKERS = 8, 8, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one slow reward")
    options = parser.parse_args()
    with user_module(options.seconds):
        found = {
            "machine": machine(open_device("cpu", "fp32"), 1),
            "call": overhead(),
            "slow_rewards": [slow_step(options.seconds, sampling) for sampling in (4.0, 8.0, 16.0)],
            "math": [math_rate(name, pairs) for name, pairs in MATH.items()],
        }
    text = json.dumps(found, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


@contextmanager
def user_module(seconds: float) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "benchmarked_rewards.py").write_text(MODULE.format(seconds=seconds))
        sys.path.insert(0, folder)
        yield
        sys.path.remove(folder)


def rollouts(texts: list[str], answers: list[str]) -> list[Rollout]:
    pairs = zip(texts, answers, strict=True)
    return [Rollout(i, Prompt(i, "", (1,), a), [2], [0.0], False, 0, text=t) for i, (t, a) in enumerate(pairs)]


def overhead() -> dict[str, Any]:
    """A function that does nothing, on responses of 4,000 characters, in one process."""
    rewards, count = Rewards({"benchmarked_rewards:nothing": 1.0}), 2000
    asked = rollouts(["x" * 4000] * count, [""] * count)
    rewards.score(asked[:10])
    wall, cpu = time.perf_counter(), time.process_time()
    rewards.score(asked)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rewards.close()
    return {"rollouts": count, "wall_us": 1e6 * wall / count, "cpu_of_trainer_us": 1e6 * cpu / count}


def slow_step(seconds: float, sampling: float) -> dict[str, Any]:
    """A step of GROUPS groups, which end one after the other over `sampling` seconds, and its rewards."""
    rewards = Rewards({"benchmarked_rewards:slow": 1.0}, workers=WORKERS)
    asked = rollouts([""] * (GROUP * GROUPS), [""] * (GROUP * GROUPS))
    rewards.score(asked[:WORKERS])  # which starts the processes
    start = time.perf_counter()
    with GroupScores(rewards, lambda rollout: None, first_id=0, size=GROUP) as scores:
        for i, rollout in enumerate(asked):
            if i % GROUP == 0:
                time.sleep(sampling / GROUPS)
            scores.add(rollout)
        scores.finish()
    wall = time.perf_counter() - start
    rewards.close()
    least = max(sampling, seconds * len(asked) / WORKERS)
    return {
        "rollouts": len(asked),
        "workers": WORKERS,
        "reward_s": seconds,
        "sampling_s": sampling,
        "step_s": wall,
        "times_the_least": wall / least,
    }


def math_rate(name: str, pairs: tuple[list[str], list[str]]) -> dict[str, Any]:
    """Verifications by one process: of one prompt's group a common answer."""
    rewards = Rewards({"math": 1.0})
    asked = rollouts(*pairs)
    rewards.score(asked[:2])
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    right = sum(score.reward for score in rewards.score(asked))
    wall = time.perf_counter() - wall
    rewards.close()  # only then are the seconds of the process known
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "pairs": name,
        "count": len(asked),
        "right": int(right),
        "wall_s": wall,
        "cpu_s_with_start": cpu,
        "a_minute_on_two_cores": 120 * len(asked) / cpu,
    }


COUNT = 800
MATH = {
    "numbers": ([rf"So it is \boxed{{{i % 97}}}." for i in range(COUNT)], [f"#### {i % 90}" for i in range(COUNT)]),
    "fractions, roots and sums in LaTeX, 8 responses an answer": (
        [
            rf"\boxed{{\frac{{{i % 7 + 1}}}{{{i // 8 % 11 + 2}}}+\sqrt{{{i // 8 % 13 + 2}}}\cdot {i % 3 + 1}}}"
            for i in range(COUNT)
        ],
        [rf"$\sqrt{{{i // 8 % 13 + 2}}}+\frac{{{i // 8 % 7 + 1}}}{{{i // 8 % 11 + 2}}}$" for i in range(COUNT)],
    ),
}


if __name__ == "__main__":
    main()
