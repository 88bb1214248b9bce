"""A process that calls reward functions for a run. `workers.py` starts it and talks to it in lines of JSON.

Requests come in on descriptor 0, replies go out on a descriptor of their own: what a function prints on 1 and 2 is read
apart from them. The process has a session of its own, a limit to its memory, and ends with the run. Every call starts
in the run's working folder, with random numbers seeded by its rollout, whichever process it lands in.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards.functions import Caller, RewardFunction, find

PR_SET_PDEATHSIG = 1
OF_THE_RUN = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What asks a run to stop (run/stop.py). A scheduler may send it to every process of a job. Here it changes nothing:
the run gets the rewards that it still waits for. The process is started with these signals blocked, so that none of
them ends it before its first line."""


def main() -> None:
    """Arguments: sys.path as JSON, the parent's process id, the descriptor of replies."""
    parent, reply_to = int(sys.argv[2]), int(sys.argv[3])
    for number in OF_THE_RUN:
        # Not SIG_IGN, and no longer blocked: programs that a function starts would inherit either, and not end on TERM.
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_RUN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this
        os._exit(1)
    os.set_inheritable(reply_to, False)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    setup = json.loads(requests.readline())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if setup["memory"]:
        # Of the memory a process may write to: address space alone, which CUDA reserves by the terabyte, is free.
        resource.setrlimit(resource.RLIMIT_DATA, (setup["memory"], setup["memory"]))
    me, folder = os.getpid(), os.getcwd()

    def reply(message: Any) -> None:
        if os.getpid() != me:  # a function forked, and its child came back here
            os._exit(0)
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(reply_to, line) :]

    try:
        asked, returns = setup["functions"], setup["returns"]
        functions = {term: find(name, parameters, returns) for term, (name, parameters) in asked.items()}
    except ConfigError as error:
        reply({"refused": str(error)})
        return
    os.chdir(folder)
    reply({"functions": {term: [f.takes, f.batch, f.is_async] for term, f in functions.items()}})
    call = Caller((BaseException,), setup["timeout_s"])
    for line in requests:
        reply(_called(call, functions, json.loads(line), setup["seed"]))
        os.chdir(folder)


def _called(call: Caller, functions: Mapping[str, RewardFunction], request: Any, seed: int) -> Any:
    seed_generators(f"{seed}:{request['term']}:{request['ids']}")
    return call(functions[request["term"]], request["items"])


def seed_generators(key: str) -> None:
    """Seeds the generators that a function may draw from, those of packages only where it has imported them."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
    random.seed(number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(number)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(number)
