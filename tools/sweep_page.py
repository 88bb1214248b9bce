"""The page of a sweep's results: one HTML file that needs no other, without scripts. Curves are inline SVG.

For the documentation, the same as a table in Markdown and as a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from gspo_megatron.base.errors import plural

Found = Mapping[str, Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5C00", "#4B4B4B")
"""Okabe and Ito's, apart from each other with every kind of colour blindness; the last two darkened to be read on
white. Lines also differ in their dashes."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2 1 2 1 2", "1 2")
WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 28, 34
STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1280px; margin: 2em auto;
       padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1em }
figure { margin: 0 } svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #333 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { padding: .3em .7em; border-bottom: 1px solid #ccc; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left } th small, td small { color: #555; font-weight: normal }
.found { background: #fff4e5; border-left: 4px solid #b35900; padding: .5em 1em }
code, pre { font: 13px ui-monospace, monospace; background: #f4f4f4 } pre { padding: .6em; overflow-x: auto }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3em 1.5em }
"""


def page(found: Found) -> str:
    """The page of what `sweep_results.results` found."""
    look = _look(found)
    parts = [
        f"<h1>{escape(found['title'])}</h1>",
        f"<p>{escape(found['about'])}</p>",
        f"<p>{escape(found['machine'])}; {_versions(found)}; {escape(found['made'])}.</p>",
        _legend(look),
        _failures(found),
    ]
    if len(found["points"]) > 1:
        parts += [f"<h2>Against {escape(found['axis'] or 'points')}</h2>", _panels(_against(found, look))]
    for point in found["points"]:
        title = f"{found['axis']} {point}".strip() if point else "Over steps"
        parts += [f"<h2>{escape(title)}</h2>", _panels(_over_steps(found, point, look))]
    parts += [_bars(found, look), "<h2>Numbers</h2>", _numbers(found), "<h2>Commands</h2>", _commands(found)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
        f'content="width=device-width, initial-scale=1">\n<title>{escape(found["title"])}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def markdown(found: Found) -> str:
    """The numbers as tables for a Markdown page, one for each point: a line a measure, a column a row of the sweep."""
    names = ", ".join(" ".join(version) for version in found["versions"].items())
    first = found["curves"][0]["against"]["row"]
    text = (
        f"`{found['command']}`, {found['machine']}; {names}; {found['made']}. In brackets: {found['interval']}. Second "
        f"line: the difference to `{first}`, seed by seed.\n"
    )
    for point in found["points"]:
        curves = [curve for curve in found["curves"] if curve["point"] == point]
        heads = " | ".join(f"`{curve['name']}`, {_seeds(curve)} seeds" for curve in curves)
        text += f"\n| | {heads} |\n| --- |{' ---: |' * len(curves)}\n"
        for key, measure in found["measures"].items():
            cells = [f"{measure['title']}; {measure['number']}"]
            for curve in curves:
                difference = curve["against"][key]
                change = f"<br>{_interval(difference, signed=True)}" if difference else ""
                cells.append(_interval(curve["measures"][key]["interval"]) + change)
            text += f"| {' | '.join(cells)} |\n"
    return text


def picture(found: Found) -> str:
    """The curves, or with several points the values at each, three panels in a row, as one SVG file."""
    look = _look(found)
    panels = list(_against(found, look) if len(found["points"]) > 1 else _over_steps(found, found["points"][0], look))
    size = (3 * WIDTH, HEIGHT * -(-len(panels) // 3) + 24)
    parts = [f'<rect width="{size[0]}" height="{size[1]}" fill="#fff"/>']
    for i, (row, (colour, dash)) in enumerate(look.items()):
        line = f'<path d="M{LEFT + 200 * i} 12h36" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/>'
        parts.append(f'{line}<text x="{LEFT + 200 * i + 42}" y="16">{escape(row)}</text>')
    for i, panel in enumerate(panels):
        inner = panel.removeprefix("<figure><svg").removesuffix("</figure>")
        place = f'x="{i % 3 * WIDTH}" y="{24 + i // 3 * HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        parts.append(f"<svg {place}{inner}")
    style = "<style>text { font: 11px system-ui, sans-serif; fill: #333 }</style>"
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" role="img"'
    return f'{frame} aria-label="{escape(found["title"], quote=True)}">{style}{"".join(parts)}</svg>\n'


# --- text and tables ---


def _look(found: Found) -> dict[str, tuple[str, str]]:
    """Colour and dashes of every row."""
    rows = dict.fromkeys(curve["row"] for curve in found["curves"])
    return {row: (COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i, row in enumerate(rows)}


def _seeds(curve: Found) -> str:
    done = sum(run["state"] in ("finished", "stopped by a guard") for run in curve["runs"])
    return f"{done} of {len(curve['runs'])}"


def _versions(found: Found) -> str:
    return escape(", ".join(f"{name} {number}" for name, number in found["versions"].items()))


def _legend(look: Mapping[str, tuple[str, str]]) -> str:
    items = [
        f'<li><svg style="width:36px;height:10px" viewBox="0 0 36 10" aria-hidden="true"><path d="M0 5H36" '
        f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/></svg> {escape(row)}</li>'
        for row, (colour, dash) in look.items()
    ]
    return (
        f'<ul class="legend">{"".join(items)}</ul>\n<p>A line is the mean over seeds, its band the 95&nbsp;% '
        "confidence interval of that mean (Student's t). Thin lines are single seeds. Mean and band end where "
        "the first seed ends. Axes span the seeds: a band that reaches further is cut off.</p>"
    )


def _failures(found: Found) -> str:
    """What did not go as a run should, run by run; nothing where all have finished."""
    items = []
    for curve in found["curves"]:
        for run in curve["runs"]:
            if run["state"] == "not run":
                continue
            words = [] if run["state"] == "finished" else [f"{run['state']} after {plural(run['steps'], 'step')}"]
            if words and run["status"] not in (0, None):
                words.append(f"status {run['status']}")
            if run["collapsed"]:
                words.append("collapsed: its last held-out accuracy is below half of its highest")
            if words:
                said = f"<pre>{escape(run['said'])}</pre>" if run["said"] and run["state"] != "unfinished" else ""
                items.append(f"<li>{escape(curve['name'])}, seed {run['seed']}: {escape('; '.join(words))}{said}</li>")
    runs = [run for curve in found["curves"] for run in curve["runs"]]
    total, waiting = len(runs), sum(run["state"] == "not run" for run in runs)
    if waiting:
        items.append(f"<li>{plural(waiting, 'run')} not started yet</li>")
    if not items:
        return f"<p>All {total} runs have finished; none collapsed.</p>"
    return f'<div class="found"><p>Of {total} runs:</p><ul>{"".join(items)}</ul></div>'


def _numbers(found: Found) -> str:
    head = "".join(
        f'<th scope="col">{escape(measure["title"])}<br><small>{escape(measure["number"])}</small></th>'
        for measure in found["measures"].values()
    )
    rows = []
    for curve in found["curves"]:
        cells = [f'<th scope="row">{escape(curve["name"])}</th>', f"<td>{_seeds(curve)}</td>"]
        for key, measure in curve["measures"].items():
            difference = curve["against"][key]
            text = _interval(measure["interval"])
            if difference:
                text += f"<br><small>{escape(curve['against']['row'])}: {_interval(difference, signed=True)}</small>"
            cells.append(f"<td>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        "<p>Mean over seeds and 95&nbsp;% interval. Small: the difference to the sweep's first row at the same point, "
        "seed by seed, and its interval. A run that a guard stopped counts with what it had reached.</p>\n"
        f'<div class="wide"><table><thead><tr><th scope="col">row</th><th scope="col">seeds</th>{head}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _interval(interval: Found | None, signed: bool = False) -> str:
    if interval is None:
        return "&ndash;"
    mean = f"{interval['mean']:{'+' if signed else ''}.3g}"
    return mean if interval["low"] is None else f"{mean} [{interval['low']:.3g}, {interval['high']:.3g}]"


def _commands(found: Found) -> str:
    parts = [f"<p>All of it, or what is left of it:</p><pre>{escape(found['command'])}</pre>"]
    for curve in found["curves"]:
        runs = "\n".join(run["command"] for run in curve["runs"])
        parts.append(
            f"<details><summary>{escape(curve['name'])}</summary><p>The curve:</p><pre>{escape(curve['repeat'])}</pre>"
            f"<p>Its runs:</p><pre>{escape(runs)}</pre></details>"
        )
    return "\n".join(parts)


# --- pictures ---


def _panels(figures: Iterator[str]) -> str:
    return f'<div class="panels">{"".join(figures)}</div>'


def _over_steps(found: Found, point: str, look: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    curves = [curve for curve in found["curves"] if curve["point"] == point]
    for key, measure in found["measures"].items():
        drawn = [(curve, curve["measures"][key]) for curve in curves if measure["drawn"]]
        plot = Plot(measure["title"], "step")
        for curve, values in drawn:
            colour, dash = look[curve["row"]]
            for seed in values["seeds"].values():
                plot.line(seed["steps"], seed["values"], colour, "", thin=True)
            plot.band(values["steps"], values["low"], values["high"], colour)
            plot.line(values["steps"], values["mean"], colour, dash)
        if not plot.empty:
            yield plot.figure(", ".join(curve["name"] for curve, _ in drawn))


def _against(found: Found, look: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """Final values at each point; the points stand at equal distances."""
    for key, measure in found["measures"].items():
        plot = Plot(f"{measure['title']}, {measure['number']}", found["axis"], names=found["points"])
        for i, (row, (colour, dash)) in enumerate(look.items()):
            shift = 0.06 * (i - (len(look) - 1) / 2)
            places, intervals = [], []
            for curve in found["curves"]:
                if curve["row"] == row and curve["measures"][key]["interval"]:
                    places.append(found["points"].index(curve["point"]) + shift)
                    intervals.append(curve["measures"][key]["interval"])
            plot.line(places, [interval["mean"] for interval in intervals], colour, dash)
            for place, interval in zip(places, intervals, strict=True):
                plot.line([place] * 2, [interval["low"], interval["high"]], colour, "")
        if not plot.empty:
            yield plot.figure(", ".join(look))


def _bars(found: Found, look: Mapping[str, tuple[str, str]]) -> str:
    """Clip fractions of the whole run on a logarithmic axis, in which two orders of magnitude can be seen."""
    shown = [
        (curve, interval)
        for curve in found["curves"]
        if (interval := curve["measures"]["clip_fraction"]["interval"]) and interval["mean"] > 0
    ]
    if not shown:
        return ""
    least = math.floor(math.log10(min(interval["mean"] for _, interval in shown)))
    scale, height = 90.0, 26
    parts = []
    for decade in range(least, 1):
        x = 150 + scale * (decade - least)
        parts.append(f'<path d="M{x:g} 0V{height * len(shown)}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:g}" y="{height * len(shown) + 14}" text-anchor="middle">{10.0**decade:g}</text>')
    for i, (curve, interval) in enumerate(shown):

        def place(value: float) -> float:
            return 150 + scale * max(0.0, math.log10(max(value, 1e-30)) - least)

        colour, y = look[curve["row"]][0], height * i
        width = place(interval["mean"]) - 150
        parts.append(f'<rect x="150" y="{y + 4}" width="{width:.1f}" height="{height - 8}" fill="{colour}"/>')
        parts.append(f'<text x="144" y="{y + 17}" text-anchor="end">{escape(curve["name"])}</text>')
        if interval["low"] is not None:
            line = f"M{place(interval['low']):.1f} {y + height / 2}H{place(interval['high']):.1f}"
            parts.append(f'<path d="{line}" stroke="#000" stroke-width="1.5"/>')
        end = place(interval["high"] if interval["high"] is not None else interval["mean"])
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 17}">{interval["mean"]:.2g}</text>')
    size = (210 + scale * -least, height * len(shown) + 20)
    return (
        "<h2>Clip fraction, mean of all steps</h2>"
        f'<svg role="img" aria-label="Clip fraction of each row, logarithmic" style="max-width:{size[0]:g}px" '
        f'viewBox="0 0 {size[0]:g} {size[1]}">{"".join(parts)}</svg>'
    )


class Plot:
    """Lines and bands over x, as SVG. The axes span the lines; a band that reaches further is cut off, since that of
    two or three seeds would leave no room for anything else.

    Args:
        names: of the places 0, 1, ... on x; none: x is a number.
    """

    def __init__(self, title: str, axis: str, names: Sequence[str] = ()) -> None:
        self.title, self.axis, self.names = title, axis, names
        self._drawn: list[Callable[[], str]] = []
        self._xs: list[float] = [0.0, len(names) - 1.0] if names else []
        self._ys: list[float] = []

    @property
    def empty(self) -> bool:
        return not self._ys

    def line(
        self, xs: Sequence[float], ys: Sequence[float | None], colour: str, dash: str, *, thin: bool = False
    ) -> None:
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
        width, opacity = (0.8, 0.35) if thin else (2, 1)
        self._add(points, f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"', opacity)

    def band(self, xs: Sequence[float], low: Sequence[float | None], high: Sequence[float | None], colour: str) -> None:
        edges = [(x, a, b) for x, a, b in zip(xs, low, high, strict=True) if a is not None and b is not None]
        points = [*((x, b) for x, _, b in edges), *((x, a) for x, a, _ in reversed(edges))]
        self._add(points, f'fill="{colour}" stroke="none"', 0.15, in_full=False)

    def _add(self, points: Sequence[tuple[float, float]], style: str, opacity: float, *, in_full: bool = True) -> None:
        if points:
            if in_full:
                self._xs += [x for x, _ in points]
                self._ys += [y for _, y in points]
            self._drawn.append(lambda: f'<path d="{self._path(points)}" {style} opacity="{opacity}"/>')

    def _path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self._x(x):.1f} {self._y(y):.1f}" for x, y in points)

    def _x(self, x: float) -> float:
        low, high = min(self._xs), max(self._xs)
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - low) / ((high - low) or 1)

    def _y(self, y: float) -> float:
        low, high = min(self._ys), max(self._ys)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (min(max(y, low), high) - low) / ((high - low) or 1)

    def figure(self, described: str) -> str:
        low, high = min(self._ys), max(self._ys)
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [f'<text x="{LEFT}" y="16" style="font-weight:600;font-size:13px">{escape(self.title)}</text>']
        for tick in ticks(low, high):
            y = self._y(tick)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e3e3e3"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        places: dict[float, str] = {float(i): name for i, name in enumerate(self.names)}
        for x, name in (places or {tick: f"{tick:g}" for tick in ticks(min(self._xs), max(self._xs))}).items():
            parts.append(f'<text x="{self._x(x):.1f}" y="{bottom + 15}" text-anchor="middle">{escape(name)}</text>')
        parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#777"/>')
        middle = (LEFT + right) / 2
        parts.append(f'<text x="{middle:g}" y="{HEIGHT - 3}" text-anchor="middle">{escape(self.axis)}</text>')
        parts += [draw() for draw in self._drawn]
        label = escape(f"{self.title} over {self.axis}: {described}; from {low:.3g} to {high:.3g}", quote=True)
        frame = f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        return f"<figure>{frame}{''.join(parts)}</svg></figure>"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about)
    digits = 2 - math.floor(math.log10(step))  # those beyond are the rounding of i * step
    return [round(i * step, digits) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
