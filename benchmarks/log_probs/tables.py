"""Markdown tables, the ratio first, and a plot of the results of benchmarks/log_probs/run.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.log_probs.methods import METHODS, REFERENCE
from benchmarks.reports import table

WANTED = ("H200, (32768, 2048, 151936), bf16", "H200, (32768, 4096, 151936), bf16")
"""Listed in the tables as not yet measured until they are."""

Result = dict[str, Any]


def tables(results: Sequence[Result]) -> str:
    """The tables of all results, one machine after another."""
    parts = []
    for result in results:
        parts.append(f"{origin(result)}\n")
        if "scaling" in result:
            parts.append(scaling_table(result["scaling"]))
        for alike in by_shape(result.get("cases", [])):
            parts += [part for part in (method_table(alike), share_table(alike), collective_table(alike)) if part]
    measured = {label(result, entry["case"]) for result in results for entry in result.get("cases", [])}
    missing = [wanted for wanted in WANTED if wanted not in measured]
    if missing:
        parts.append(table(["not yet measured", ""], [[wanted, "not yet measured"] for wanted in missing]))
    return "\n".join(parts)


def origin(result: Result) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"`{result['command']}`: {result['machine']}; {versions}."


def label(result: Result, case: Result) -> str:
    name = re.search(r"\bH\d00\b", result["machine"])
    return f"{name[0] if name else case['device']}, {shape(case)}, {case['dtype']}"


def shape(case: Result) -> str:
    return f"({case['rows']}, {case['hidden']}, {case['vocab']})"


def by_shape(entries: Sequence[Result]) -> Iterator[list[Result]]:
    for name in dict.fromkeys(shape(entry["case"]) for entry in entries):
        yield [entry for entry in entries if shape(entry["case"]) == name]


def method_table(entries: Sequence[Result]) -> str:
    """All methods, on one process, where every row belongs to a response and has a gradient."""
    found = [x for x in entries if x["case"]["ranks"] == 1 and every_row_counts(x["case"])]
    if not found:
        return ""
    case, methods = found[0]["case"], found[0]["methods"]
    rows = []
    for name, x in methods.items():
        if x["status"] != "ok":
            rows.append([name, x["status"]])
            continue
        errors = x.get("mean_log_ratio_error", {})
        cells = [ratio(x, "time_ratio"), seconds(x["seconds_median"]), ratio(x, "memory_ratio")]
        cells += [f"{x['peak_extra_mib']:,.0f}", *(f"{errors[dtype]:.0e}" for dtype in errors)]
        rows.append([bold(name), *cells])
    head = [f"{shape(case)}, {case['dtype']}", "time / native", "time", "extra memory / native", "MiB"]
    formats = methods[REFERENCE].get("mean_log_ratio_error", {})
    return table([*head, *(f"error of a mean log-ratio, {dtype} weights" for dtype in formats)], rows)


def share_table(entries: Sequence[Result]) -> str:
    """Ours and the reference where prompts and sequences without gradient take part."""
    found = [x for x in entries if x["case"]["ranks"] == 1]
    if len(found) < 2:
        return ""
    mine = [name for name in found[0]["methods"] if METHODS[name].is_ours]
    rows = []
    for x in found:
        case, methods = x["case"], x["methods"]
        cells = [
            f"{ratio(methods[name], 'time_ratio')} ({seconds(methods[name]['seconds_median'])}), "
            f"{ratio(methods[name], 'memory_ratio')}"
            for name in mine
        ]
        rows.append([f"{case['response_share']:g}", f"{case['dead_share']:g}", *cells])
    what = "time / native (time), extra memory / native"
    return table(["response share", "sequences without gradient", *(f"{name}: {what}" for name in mine)], rows)


def collective_table(entries: Sequence[Result]) -> str:
    """Calls and bytes on one rank, for cases of several ranks only."""
    rows = []
    for x in entries:
        case = x["case"]
        for name, method in x["methods"].items():
            if case["ranks"] > 1 and method["status"] == "ok":
                place = [str(case["ranks"]), f"{case['response_share']:g}", f"{case['dead_share']:g}", bold(name)]
                ways = [calls(method["collectives"][way]) for way in ("forward", "backward")]
                rows.append([*place, *(cell for way in ways for cell in way)])
    head = ["tp", "response share", "sequences without gradient", "method", "forward", "MiB", "backward", "MiB"]
    return table(head, rows) if rows else ""


def scaling_table(entries: Sequence[Result]) -> str:
    rows = []
    for x in entries:
        mine, native = x["methods"]["ours, recompute"], x["methods"][REFERENCE]
        cells = [ratio(mine, "time_ratio"), seconds(mine["seconds_median"])]
        memory = [f"{method['peak_extra_mib']:,.0f}" for method in (mine, native)]
        rows.append([f"{x['case']['rows']:,}", f"{x['case']['vocab']:,}", *cells, *memory])
    head = ["response tokens", "vocabulary", "time / native", "time", "ours, recompute: extra MiB", "native: extra MiB"]
    return f"{table(head, rows)}\n{linearity(entries)}\n"


def linearity(entries: Sequence[Result]) -> str:
    """How far our times are from proportional to the number of tokens, and how far memory varies."""
    tokens, times, _ = over(entries, "rows", "ours, recompute")
    memory = [x["methods"]["ours, recompute"]["peak_extra_mib"] for x in entries]
    slope = sum(n * t for n, t in zip(tokens, times, strict=True)) / sum(n * n for n in tokens)
    off = max(abs(t / (slope * n) - 1) for n, t in zip(tokens, times, strict=True))
    return (
        f"Time is {1e3 * slope:.3g} ms a token, within {percent(off)} at every length; extra memory lies between "
        f"{min(memory):,.0f} and {max(memory):,.0f} MiB."
    )


def over(entries: Sequence[Result], axis: str, name: str) -> tuple[list[int], list[float], list[float]]:
    """(values of the axis, seconds, MiB) of a method, at the most frequent value of the other axis."""
    other = {"rows": "vocab", "vocab": "rows"}[axis]
    values = [x["case"][other] for x in entries]
    usual = max(values, key=values.count)
    found = sorted((x for x in entries if x["case"][other] == usual), key=lambda x: x["case"][axis])
    methods = [x["methods"][name] for x in found]
    mib = [method["peak_extra_mib"] for method in methods]
    return [x["case"][axis] for x in found], [method["seconds_median"] for method in methods], mib


def plot(entries: Sequence[Result], path: Path) -> None:
    """Time over tokens; memory over tokens and over the vocabulary. Needs the extra `plot`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, by_tokens, by_vocab) = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for name in ("ours, recompute", REFERENCE):
        tokens, seconds, mib = over(entries, "rows", name)
        times.plot(tokens, seconds, marker="o", label=name)
        by_tokens.plot(tokens, mib, marker="o", label=name)
        vocab, _, mib = over(entries, "vocab", name)
        by_vocab.plot(vocab, mib, marker="o", label=name)
    case = entries[0]["case"]
    for axis, title, unit in (
        (times, f"forward + backward, s (V = {case['vocab']:,})", "response tokens"),
        (by_tokens, f"peak extra memory, MiB (V = {case['vocab']:,})", "response tokens"),
        (by_vocab, "peak extra memory, MiB", "vocabulary"),
    ):
        axis.set_title(title)
        axis.set_xlabel(unit)
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)


# --- cells ---


def every_row_counts(case: Result) -> bool:
    return case["response_share"] == 1 and case["dead_share"] == 0


def bold(name: str) -> str:
    return f"**{name}**" if METHODS[name].is_ours else name


def ratio(method: Result, name: str) -> str:
    """Empty if the reference itself could not run."""
    return f"{method[name]:.2f}" if name in method else ""


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def calls(seen: dict[str, int]) -> tuple[str, str]:
    """("2 allgather, 1 allreduce", "12.5")"""
    names = ", ".join(f"{count} {name}" for name, count in seen.items() if name != "bytes")
    return names or "none", f"{seen.get('bytes', 0) / 2**20:.3g}"
