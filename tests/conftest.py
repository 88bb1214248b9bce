"""The option of `make test-next`."""

from __future__ import annotations

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
