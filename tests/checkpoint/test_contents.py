"""run.json: what it must hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.contents import ABOUT, read_about, saved_sections

WHOLE: dict[str, Any] = {
    "format": 2,
    "state": {"config": {"train": {"steps": 3}}},
    "policy_version": 4,
    "adam_step": 4,
    "has_reference": False,
    "random": [],
    "num_files": 1,
    "model": {},
    "versions": {},
}


def read(path: Path, about: Any) -> dict[str, Any]:
    (path / "run.json").write_text(json.dumps(about))
    return read_about(path)


@pytest.mark.parametrize("name", [name for name in ABOUT if name != "format"])
def test_a_field_that_is_missing_or_something_else_is_named(name: str, tmp_path: Path) -> None:
    assert read(tmp_path, WHOLE) == WHOLE
    with pytest.raises(CheckpointError, match=rf"run\.json: {name} is missing; expected .*; use|{name} is missing"):
        read(tmp_path, {key: value for key, value in WHOLE.items() if key != name})
    for other in (-1, 10**30, "text", [[]] if name != "random" else {}, None):
        with pytest.raises(CheckpointError, match=rf"run\.json: {name} is "):
            read(tmp_path, WHOLE | {name: other})


def test_run_json_itself(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run\.json is \[\], not an object"):
        read(tmp_path, [])
    with pytest.raises(CheckpointError, match=r"run\.json, state: config is .*an object of objects"):
        saved_sections(tmp_path, read(tmp_path, WHOLE | {"state": {"config": {"train": 3}}}))
    assert saved_sections(tmp_path, read(tmp_path, WHOLE)) == {"train": {"steps": 3}}
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read \(RecursionError"):
        read_about(tmp_path)
    (tmp_path / "run.json").unlink()
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(CheckpointError, match=r"run\.json is not a regular file"):
        read_about(tmp_path)
