"""The option of `make test-next`; signals between tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.imports import depends_on_megatron

OPTION = "--depends-on-megatron"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        OPTION,
        action="store_true",
        help="leave out test files that never reach Megatron-Core, unless they are named",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    if config.getoption(OPTION) and is_test and not depends_on_megatron(collection_path):
        return True
    return None


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A run that was stopped leaves its process deaf to further signals (run/stop.py). Here the process goes on, and
    the commands that later tests start would inherit that: a shell cannot trap what was ignored when it began."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
