"""What the tests of engines share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gspo_megatron.rollout.engine_server import CACHE


@pytest.fixture(scope="session", autouse=True)
def one_cache_for_all_engines(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """Else each finds out the same about its model in a process of its own: 7 of the 43 s of a start."""
    of_worker = tmp_path_factory.getbasetemp()
    shared = of_worker if worker_id == "master" else of_worker.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(shared / "vllm_cache"))
        yield
