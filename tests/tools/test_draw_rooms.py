"""The picture of the rooms in docs/architecture.md is what the code says."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from draw_rooms import PICTURE, draw, read_rooms, without_implied

from gspo_megatron.testing.rooms import LAYERS, package_files


def test_the_committed_picture_is_that_of_the_code() -> None:
    assert PICTURE.read_text() == draw(package_files()), "docs/images/rooms.svg is out of date; run `make docs`"


def test_the_picture_has_every_room_once() -> None:
    svg = ElementTree.fromstring(PICTURE.read_text())
    drawn = [text.text.removesuffix("/").removesuffix(".py") for text in svg.iterfind(".//{*}g/{*}text[1]")]
    rooms = {path.split("/")[0].removesuffix(".py") for path in package_files()} - {"__init__"}
    assert sorted(drawn) == sorted(rooms)
    assert rooms <= {room for floor in LAYERS for room in floor}


def test_an_import_across_rooms_moves_the_picture(tmp_path: Path) -> None:
    """One file gets an import that its room did not have."""
    files = package_files()
    changed = tmp_path / "kl.py"
    changed.write_text(files["objective/kl.py"].read_text() + "\nfrom gspo_megatron.models import counts\n")
    assert draw({**files, "objective/kl.py": changed}) != draw(files)
    assert "models" in read_rooms({**files, "objective/kl.py": changed})[1]["objective"]


def test_an_edge_that_a_longer_path_implies_is_left_out() -> None:
    edges = {"run": {"rollout", "base"}, "rollout": {"base"}, "base": set[str]()}
    assert without_implied(edges) == {"run": {"rollout"}, "rollout": {"base"}, "base": set()}
