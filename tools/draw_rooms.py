"""Draws the rooms of the package and the imports between them into docs/images/rooms.svg (`make docs`).

python tools/draw_rooms.py

Rows are the floors of gspo_megatron/testing/rooms.py. An arrow that a longer path already implies is left out: where
`run` imports `rollout` and `rollout` imports `base`, no arrow goes from `run` to `base`. `testing` may import every
room and has no arrows. Lines of code are given to the nearest hundred, so that a small change leaves the picture as
it is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import fsum
from pathlib import Path
from typing import NamedTuple

from gspo_megatron.testing.rooms import COMMANDS, HEIGHT, LAYERS, imports_of_rooms, package_files, room_of

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "rooms.svg"

WIDTH, MARGIN, TOP = 1100, 24, 58
BOX_WIDTH, BOX_HEIGHT, BEND_WIDTH = 120, 44, 16
GAP, ROW_GAP = 12, 58
COLOURS = ("#b4532a", "#8a6d1b", "#3d7a35", "#23788a", "#3a5fb0", "#7a4fa3", "#666666")
"""Of the arrows that leave a floor, and of its boxes."""

Edges = dict[str, set[str]]


class Bend(NamedTuple):
    """Where an arrow passes a floor in between."""

    start: str
    end: str
    floor: int


Node = str | Bend


@dataclass
class Room:
    """What the code says of a room."""

    files: int = 0
    lines: int = 0
    about: str = ""


def read_rooms(files: Mapping[str, Path]) -> tuple[dict[str, Room], Edges]:
    """The rooms by name, and which others each of them imports."""
    rooms: dict[str, Room] = {}
    edges: Edges = {}
    for file, path in files.items():
        source, name = path.read_text(), room_of(file)
        if name == "__init__":
            continue
        room = rooms.setdefault(name, Room())
        room.files += 1
        room.lines += len(source.splitlines())
        if file in (f"{name}.py", f"{name}/__init__.py"):
            room.about = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].replace("\n", " ")
        edges.setdefault(name, set()).update(other for other, _ in imports_of_rooms(file, source))
    return rooms, edges


def without_implied(edges: Edges) -> Edges:
    """The edges between different floors that no longer path implies."""
    reached: Edges = {}
    for room in sorted(edges, key=lambda room: HEIGHT[room]):
        reached[room] = edges[room].union(*(reached[other] for other in edges[room] if other in reached))
    return {
        room: {b for b in others if not any(b in reached.get(c, ()) for c in others - {b})}
        for room, others in edges.items()
    }


# --- the places of boxes and bends ---


def floors_of(rooms: Iterable[str], edges: Edges) -> tuple[list[list[Node]], list[tuple[Node, Node]]]:
    """What stands on each floor, top to bottom, and the links between neighbouring floors."""
    floors: list[list[Node]] = [[room for room in names if room in rooms] for names in LAYERS]
    links: list[tuple[Node, Node]] = []
    for start in sorted(edges):
        for end in sorted(edges[start]):
            for node in (path := path_of(start, end)):
                if isinstance(node, Bend):
                    floors[node.floor].append(node)
            links += pairwise(path)
    return floors, links


def path_of(start: str, end: str) -> list[Node]:
    """A room, a bend on each floor in between, the other room."""
    return [start, *(Bend(start, end, floor) for floor in range(1 - HEIGHT[start], -HEIGHT[end])), end]


def crossings(floors: list[list[Node]], links: list[tuple[Node, Node]]) -> int:
    place = {node: i for floor in floors for i, node in enumerate(floor)}
    depth = {node: d for d, floor in enumerate(floors) for node in floor}
    pairs: dict[int, list[tuple[int, int]]] = {}
    for upper, lower in links:
        pairs.setdefault(depth[upper], []).append((place[upper], place[lower]))
    return sum(
        (a - c) * (b - d) < 0 for ends in pairs.values() for i, (a, b) in enumerate(ends) for c, d in ends[i + 1 :]
    )


def neighbours(floors: list[list[Node]], links: list[tuple[Node, Node]]) -> dict[Node, list[Node]]:
    linked: dict[Node, list[Node]] = {node: [] for floor in floors for node in floor}
    for upper, lower in links:
        linked[upper].append(lower)
        linked[lower].append(upper)
    return linked


def untangle(floors: list[list[Node]], links: list[tuple[Node, Node]]) -> None:
    """Orders every floor: by the mean place of what its nodes are linked to, down and up in turn, then by exchanging
    two nodes while that leaves fewer crossings."""
    linked = neighbours(floors, links)
    for sweep in range(8):
        for floor in floors if sweep % 2 == 0 else floors[::-1]:
            place = {node: (i + 0.5) / len(f) for f in floors for i, node in enumerate(f)}
            floor.sort(key=lambda node: fsum(place[o] for o in linked[node]) / max(1, len(linked[node])))
    best, improved = crossings(floors, links), True
    while improved:
        improved = False
        for floor in floors:
            for i in range(len(floor)):
                for j in range(i + 1, len(floor)):
                    floor[i], floor[j] = floor[j], floor[i]
                    now = crossings(floors, links)
                    if now < best:
                        best, improved = now, True
                    else:
                        floor[i], floor[j] = floor[j], floor[i]


def width_of(node: Node) -> int:
    return BEND_WIDTH if isinstance(node, Bend) else BOX_WIDTH


def centres(floors: list[list[Node]], links: list[tuple[Node, Node]]) -> dict[Node, float]:
    """x of every node: drawn towards what it is linked to, with a gap to its neighbours."""
    linked = neighbours(floors, links)
    x: dict[Node, float] = {}
    for floor in floors:
        left = (WIDTH - sum(map(width_of, floor)) - GAP * (len(floor) - 1)) / 2
        for node in floor:
            x[node] = left + width_of(node) / 2
            left += width_of(node) + GAP
    for sweep in range(24):
        for floor in floors if sweep % 2 else floors[::-1]:
            wanted = [fsum(x[o] for o in linked[n]) / len(linked[n]) if linked[n] else x[n] for n in floor]
            x.update(zip(floor, _spread(floor, wanted), strict=True))
    return x


def _spread(floor: list[Node], wanted: list[float]) -> list[float]:
    """Places near the wanted ones, in order, without overlap, inside the picture: the mean of a pass that moves nodes
    to the right and of one that moves them to the left."""
    room = [(width_of(a) + width_of(b)) / 2 + GAP for a, b in pairwise(floor)]
    ends = (MARGIN + width_of(floor[0]) / 2, WIDTH - MARGIN - width_of(floor[-1]) / 2) if floor else (0.0, 0.0)
    right, left = list(wanted), list(wanted)
    for i in range(len(floor)):
        right[i] = max(right[i], ends[0] if i == 0 else right[i - 1] + room[i - 1])
    for i in reversed(range(len(floor))):
        left[i] = min(left[i], ends[1] if i == len(floor) - 1 else left[i + 1] - room[i])
    mean = [(a + b) / 2 for a, b in zip(right, left, strict=True)]
    for i in range(len(floor)):
        mean[i] = max(mean[i], ends[0] if i == 0 else mean[i - 1] + room[i - 1])
    for i in reversed(range(len(floor))):
        mean[i] = min(mean[i], ends[1] if i == len(floor) - 1 else mean[i + 1] - room[i])
    return mean


# --- the drawing ---


def draw(files: Mapping[str, Path]) -> str:
    """The picture as SVG; the same for the same code."""
    rooms, edges = read_rooms(files)
    edges = without_implied({room: others for room, others in edges.items() if room != "testing"})
    floors, links = floors_of(rooms, edges)
    untangle(floors, links)
    x = centres(floors, links)
    top = {node: TOP + depth * (BOX_HEIGHT + ROW_GAP) for depth, floor in enumerate(floors) for node in floor}
    height = TOP + len(floors) * (BOX_HEIGHT + ROW_GAP) - ROW_GAP + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, '
            'sans-serif" text-anchor="middle">',
            "<!-- Written by `make docs` from the imports of gspo_megatron. -->",
            "<defs>",
            *(
                f'<marker id="head{i}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0,0.5 L8,4 L0,7.5 z" fill="{colour}"/></marker>'
                for i, colour in enumerate(COLOURS)
            ),
            "</defs>",
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            f'<text x="{MARGIN}" y="30" font-size="13" fill="#444444" text-anchor="start">An arrow: some file of the '
            "room imports the other room. Arrows that a longer path implies are left out; testing may import every "
            "room.</text>",
            *_arrows(edges, links, x, top),
            *(_box(name, room, x[name], top[name]) for name, room in rooms.items()),
            "</svg>\n",
        ]
    )


def _box(name: str, room: Room, x: float, top: int) -> str:
    colour = COLOURS[-HEIGHT[name]]
    lines = max(100, (room.lines + 50) // 100 * 100)
    size = f"{room.files} file{'s' * (room.files > 1)}, {lines:,} lines"
    dashes = ' stroke-dasharray="5 4"' if name == "testing" else ""
    label = f"{name}.py" if name in COMMANDS else f"{name}/"
    return (
        f'<g><title>{escape(room.about)}</title><rect x="{x - BOX_WIDTH / 2:.0f}" y="{top}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="6" fill="#ffffff" stroke="{colour}" stroke-width="1.6"{dashes}/>'
        f'<text x="{x:.0f}" y="{top + 19}" font-size="14" font-weight="bold" fill="#222222">{label}</text>'
        f'<text x="{x:.0f}" y="{top + 35}" font-size="11" fill="#555555">{size}</text></g>'
    )


def _arrows(
    edges: Edges, links: list[tuple[Node, Node]], x: Mapping[Node, float], top: Mapping[Node, int]
) -> Iterator[str]:
    """A curve for each edge, through its bends. The ends at a box are side by side, in the order of where they go."""
    leave = _ports([(a, b) for a, b in links], x)
    enter = _ports([(b, a) for a, b in links], x)
    for start in sorted(edges, key=lambda room: (-HEIGHT[room], room)):
        for end in sorted(edges[start]):
            points = []
            for upper, lower in pairwise(path_of(start, end)):
                x1, y1 = leave[upper, lower], top[upper] + BOX_HEIGHT
                x2, y2 = enter[lower, upper], top[lower]
                middle = (y1 + y2) / 2
                go = "M" if upper == start else "L"
                points.append(f"{go}{x1:.0f},{y1} C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{y2}")
            floor = -HEIGHT[start]
            yield (
                f'<path d="{" ".join(points)}" fill="none" stroke="{COLOURS[floor]}" stroke-opacity="0.75" '
                f'stroke-width="1.6" marker-end="url(#head{floor})"/>'
            )


def _ports(ends: list[tuple[Node, Node]], x: Mapping[Node, float]) -> dict[tuple[Node, Node], float]:
    """x of every end of an arrow: (node, the node at the other end) -> place along the node's border."""
    others: dict[Node, list[Node]] = {}
    for node, other in ends:
        others.setdefault(node, []).append(other)
    ports = {}
    for node, far in others.items():
        far.sort(key=lambda other: x[other])
        step = min(18.0, (width_of(node) - 16) / max(1, len(far) - 1)) if len(far) > 1 else 0.0
        for i, other in enumerate(far):
            ports[node, other] = x[node] + (i - (len(far) - 1) / 2) * step
    return ports


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(package_files()))
