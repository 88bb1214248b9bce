"""Starts a command, by default `gspo_megatron.train`, on several processes of this machine; reads what a run leaves.

torchrun(2, ["--config", ...])      the real command, in processes of its own: 6 s of imports each
forked(2, ["--config", ...])        what torchrun would start, on ranks that are forked with everything imported
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gspo_megatron.mcore.sampler
import gspo_megatron.mcore.saving  # noqa: F401  (both for the forked ranks)
from gspo_megatron.monitor.catalogue import OF_THE_MACHINE
from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.testing.time_limits import time_factor
from gspo_megatron.train import main

Command = Callable[[Sequence[str]], int]
"""`main` of a command."""


def torchrun(num_processes: int, arguments: Sequence[str], timeout_s: float = 180) -> tuple[int, str]:
    """(exit status, output) of `torchrun --nproc_per_node N -m gspo_megatron.train`; of the plain command for N = 1."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), "-m", "gspo_megatron.train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    limit_s = timeout_s * time_factor()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)
    return done.returncode, done.stdout + done.stderr


def forked(
    num_processes: int, arguments: Sequence[str], timeout_s: float = 120, command: Command = main
) -> list[tuple[int, str]]:
    """(exit status, what it printed as an error) of every rank's command."""
    return run_distributed(_rank, num_processes, command, list(arguments), timeout_s=timeout_s, like_torchrun=True)


def _rank(command: Command, arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        status = command(arguments)
    return status, errors.getvalue()


def metrics(run: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a run, without what the clock measured."""
    return [{k: v for k, v in row.items() if not k.startswith(OF_THE_MACHINE)} for row in _json_lines(run / file)]


def rollouts(run: Path) -> list[list[dict[str, Any]]]:
    """The rollouts of every step."""
    return [_json_lines(path) for path in sorted((run / "rollouts").glob("step_*.jsonl"))]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
