"""The parts of `make gpu-hour` that compare Transformer Engine's layers: they run with its own Python layers, and the
mistake that they are there for turns them red."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_hour import measure
from gspo_megatron.testing.local_ranks import run_distributed

pytestmark = pytest.mark.te


def values(name: str, output: Path, *arguments: str, rotated_twice: bool = False) -> dict[str, Any]:
    given = [name, "--output", str(output), "--rehearse", "--te", *arguments]
    assert run_distributed(rotating if rotated_twice else measure.main, 1, given, like_torchrun=True) == [0]
    result = json.loads(output.read_text())
    assert result["layers"] == "Transformer Engine"
    return dict(result["values"])


def rotating(given: list[str]) -> int:
    """Queries and keys of Transformer Engine's layers are rotated once more than they should be, as they were when all
    layers of a stage shared one spec."""
    from gspo_megatron.mcore import attention

    forward = attention.PackedAttention.forward

    def twice(self: Any, query: Any, key: Any, *args: Any, packed_seq_params: Any, **kwargs: Any) -> Any:
        if self.fused is not None:
            query, key = (attention.rotate(x, packed_seq_params) for x in (query, key))
        return forward(self, query, key, *args, packed_seq_params=packed_seq_params, **kwargs)

    attention.PackedAttention.forward = twice  # type: ignore[method-assign]
    return measure.main(given)


def test_it_is_as_near_to_float32_as_the_local_layers(tmp_path: Path) -> None:
    found = values("te_against_local", tmp_path / "out.json")
    assert 0 < found["log_prob_error_ratio"] < 2 and 0 < found["gradient_error_ratio"] < 2
    # They do not round alike, so these are two sets of layers.
    assert found["log_prob_error_te"] != found["log_prob_error_local"]


def test_a_rotation_too_many_is_found(tmp_path: Path) -> None:
    found = values("te_against_local", tmp_path / "out.json", rotated_twice=True)
    assert found["log_prob_error_ratio"] > 5 and found["gradient_error_ratio"] > 5


@pytest.mark.parametrize("name", ["same_forward_twice", "first_ratio", "empty_expert", "decode"])
def test_the_other_parts_run(name: str, tmp_path: Path) -> None:
    found = values(name, tmp_path / "out.json")
    assert found.get("log_probs_that_differ", 0) == 0
    assert found.get("ratio_noise", 0) <= 1e-6
    assert found.get("gradient_cosine", 1) > 0.95
