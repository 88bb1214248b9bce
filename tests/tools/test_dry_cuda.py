"""What surrounds a dry construction: which ranks it builds, what it compares, what it writes. The construction itself
is in tests/testing/test_dry_build.py; on a CUDA build of torch it is `make dry-cuda`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dry_cuda
import pytest
import torch

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.config.loading import load_config
from gspo_megatron.layout.layout import Layout

RESULT: dict[str, Any] = {
    "config": "examples/some_gspo.yaml",
    "ranks": "all",
    "overrides": ["precision.fp8=none"],
    "layers": "Transformer Engine",
    "num_layers": 2,
    "precision": "bf16",
    "layout": "16 processes",
    "num_ranks": 16,
    "tensors_written_once": 1587,
    "names": {"compared_with": "transformers", "equal": 789},
    "gib": {"weights": [1.0, 1.0], "gradients": [2.0, 2.0], "optimizer": [3.0, 3.001]},
    "worst_difference": 0.00033,
    "build_s": 3.0,
    "check_s": 1.0,
}


@pytest.mark.parametrize(
    ("asked", "ranks"),
    [("all", list(range(16))), ("15,0,15", [0, 15]), ("3", [3]), ("stages", [0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15])],
)
def test_the_ranks_that_are_built(asked: str, ranks: list[int]) -> None:
    assert dry_cuda.chosen(asked, Layout(16, tp=2, pp=4)) == ranks


@pytest.mark.parametrize("asked", ["16", "-1", "first", "", "1,"])
def test_ranks_that_do_not_exist_are_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match="write all, stages, or ranks from 0 to 15"):
        dry_cuda.chosen(asked, Layout(16, tp=2, pp=4))


def test_a_layout_has_a_smallest_number_of_processes() -> None:
    p = load_config(None, ["parallel.tp=2", "parallel.pp=3", "parallel.cp=2", "parallel.ep=8"]).parallel
    assert dry_cuda.fewest_processes(p) == 24  # tp cp pp = 12 and ep pp = 24 divide it


@pytest.mark.skipif(torch.version.cuda is not None, reason="a build of torch for CUDA")
def test_a_torch_for_cpus_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_cuda.main(["--ranks", "0", "model.vocab_size=100"]) == 2
    assert "is a build for CPUs; make venv-cuda installs one for CUDA" in capsys.readouterr().err


def test_names_and_sizes_that_transformers_does_not_have_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"a": (2, 3), "b": (4,), "c": (5,)}
    monkeypatch.setattr(dry_cuda, "names_of_transformers", lambda shape: theirs)
    monkeypatch.setattr(dry_cuda, "version", lambda package: "5")
    shape = load_config(None, ["model.vocab_size=100"]).model.shape
    faults: list[str] = []
    assert dry_cuda.equal_names(dict(theirs), shape, faults)["equal"] == 3 and faults == []
    assert dry_cuda.equal_names({"a": (3, 2), "b": (4,), "d": (5,)}, shape, faults)["equal"] == 1
    [fault] = faults
    assert fault.startswith(
        "3 names or sizes differ from those of transformers, such as a (3, 2) / (2, 3), c None / (5,)"
    )


def test_a_build_replaces_its_earlier_result(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for result in (RESULT, RESULT | {"overrides": ["precision.fp8=blockwise"]}, RESULT | {"build_s": 9.0}):
        dry_cuda.record(path, result)
    found = json.loads(path.read_text())
    assert [(row["overrides"], row["build_s"]) for row in found] == [
        (["precision.fp8=blockwise"], 3.0),
        (["precision.fp8=none"], 9.0),
    ]


def test_the_table_has_a_line_for_each_build(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- dry_cuda -->\nold\n<!-- end of dry_cuda -->\nafter\n")
    dry_cuda.write_table(page, [RESULT, RESULT | {"names": None, "tensors_written_once": None}])
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after") and "old" not in lines
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 4
    assert "| some_gspo | 2 | bf16, Transformer Engine | 16 processes | 16 | 1,587 tensors | 789 |" in table[2]
    assert "| 3.00 (3.00) | 0.033% | 4 |" in table[2]
