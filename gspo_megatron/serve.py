"""Starts a vLLM engine for runs on other machines: `python -m gspo_megatron.serve --config FILE [--host HOST]`.

The settings are those of the run that will use it, which names it in engine.addresses; engine.python is the Python that
has vLLM. It starts with random weights of the run's model, gets the run's own from the run, and serves one run after
another. When vLLM dies it is started again. The environment variable GSPO_ENGINE_TOKEN holds the token that requests
must have; without it the engine listens to this machine only. Exit status: 0 ended by SIGTERM or SIGINT; 1 it
does not start, or died too often, or an error in the code; 2 settings cannot work.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from threading import Event

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.command import KNOWN_ERRORS, Parser, reported
from gspo_megatron.build.serving import engine_of, keep_up
from gspo_megatron.config.loading import load_config
from gspo_megatron.device.engine_token import VARIABLE, engine_token
from gspo_megatron.device.private_group import is_loopback
from gspo_megatron.monitor.console import Console
from gspo_megatron.rollout.engine_server import HOST

EXAMPLE = """example, for a run that has engine.addresses=[http://node7:8000]:
  python -m gspo_megatron.serve --config run.yaml engine.tensor_parallel=2 engine.gpus=[0,1] --host node7 --port 8000
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    try:
        options = parsed(argv)
        config = load_config(options.config, options.overrides)
        console, ended = Console(), Event()
        # First: a batch system may end the job at any time. It sends USR1 to all, for runs to save.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if not is_loopback(options.host) and not engine_token():
            raise ConfigError(
                f"--host {options.host} without {VARIABLE}: everyone who reaches it could use the engine, and change "
                f"its weights; set {VARIABLE} to the same text for the engine and for the run"
            )
        server = engine_of(config, options.host, options.port)
        if not engine_token():
            console.warn(
                f"{VARIABLE} is not set: every user of this machine can use the engine, and change its weights"
            )
        if options.host != HOST and options.host != "localhost" and is_loopback(options.host):
            console.warn(f"{options.host} is a name of this machine for itself: no other machine reaches the engine")
        keep_up(server, config.engine.most_starts, ended.is_set, console.say)
        return 0
    except KNOWN_ERRORS as error:
        return reported(error)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="gspo_megatron.serve",
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--host", default=HOST, help="name or address of this machine to listen at (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=0, help="default: engine.port, or a free one, which is printed")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    options = parser.parse_intermixed_args(argv)
    if not 0 <= options.port < 2**16:
        raise ConfigError(f"--port {options.port} is no port; name one from 1 to 65535, or 0 for a free one")
    return options


if __name__ == "__main__":
    sys.exit(main())
