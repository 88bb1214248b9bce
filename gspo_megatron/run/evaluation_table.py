"""The results of an evaluation as a table, in JSON and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from gspo_megatron.run.estimates import CONFIDENCE, Estimate
from gspo_megatron.run.evaluation import Answered

SHARES = ("accuracy", "pass@", "maj@", "truncated_fraction", "unscored_fraction")
"""Beginnings of the names of metrics that are shares, printed in percent."""


def table_of(weights: str, results: Seq[tuple[Answered, float]]) -> dict[str, Any]:
    """`results`: each set with its responses, and the seconds that they took."""
    return {
        "weights": weights,
        "confidence": CONFIDENCE,
        "sets": {answered.of.name: _set(answered, seconds) for answered, seconds in results},
    }


def _set(answered: Answered, seconds: float) -> dict[str, Any]:
    asked = answered.of
    return {
        "prompts": len(answered.groups),
        "n": asked.n,
        **asked.sampling._asdict(),
        "seconds": round(seconds, 3),
        "metrics": _estimates(answered),
        "split_by": asked.by,
        "by": {
            value: {"prompts": len(part.groups), "metrics": _estimates(part)}
            for value, part in answered.parts().items()
        },
        "by_response_length": _by_length(answered),
    }


def _estimates(answered: Answered) -> dict[str, dict[str, Any]]:
    return {name: each._asdict() for name, each in answered.estimates().items()}


def _by_length(answered: Answered) -> list[dict[str, Any]]:
    """Responses of 0, 1, 2, 3 to 4, 5 to 8, ... tokens: how many, and the share that is correct."""
    found: dict[int, list[float]] = {}
    for group, correct in zip(answered.groups, answered.correct, strict=True):
        for rollout, is_correct in zip(group.rollouts, correct, strict=True):
            size = len(rollout.tokens)
            found.setdefault((size - 1).bit_length() if size else -1, []).append(is_correct)
    return [
        {
            "from": 0 if power < 0 else (1 << power >> 1) + 1 if power else 1,
            "to": 0 if power < 0 else 1 << power,
            "responses": len(correct),
            "accuracy": sum(correct) / len(correct),
        }
        for power, correct in sorted(found.items())
    ]


def markdown(table: Mapping[str, Any]) -> str:
    """The table for people: a row for each set, then each set by its field and by length."""
    sets: Mapping[str, Any] = table["sets"]
    return "\n".join(
        [f"# Evaluation of {table['weights']}", "", *_overview(sets, table["confidence"]), *_details(sets)]
    )


def _overview(sets: Mapping[str, Any], confidence: float) -> Iterator[str]:
    names = list(dict.fromkeys(name for each in sets.values() for name in each["metrics"]))
    yield from _rows(
        ["set", "prompts", "n", "temperature", *names],
        [
            [name, f"{each['prompts']:,}", str(each["n"]), f"{each['temperature']:g}", *_cells(each["metrics"], names)]
            for name, each in sets.items()
        ],
    )
    kinds = {metric["interval"] for each in sets.values() for metric in each["metrics"].values()}
    how = {"wilson": "Wilson's where every value is 0 or 1", "bootstrap": "bootstrap over prompts"}
    yield f"In brackets: {confidence:.0%} intervals ({', else '.join(how[k] for k in how if k in kinds)})."
    yield ""


def _details(sets: Mapping[str, Any]) -> Iterator[str]:
    for name, each in sets.items():
        if each["by"]:
            names = list(each["metrics"])
            yield from (f"## {name} by {each['split_by']}", "")
            yield from _rows(
                ["value", "prompts", *names],
                [[v, f"{p['prompts']:,}", *_cells(p["metrics"], names)] for v, p in each["by"].items()],
            )
        yield from (f"## {name} by length of the response", "")
        yield from _rows(
            ["tokens", "responses", "accuracy"],
            [
                [_range(b["from"], b["to"]), f"{b['responses']:,}", f"{b['accuracy']:.1%}"]
                for b in each["by_response_length"]
            ],
        )


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _rows(head: Seq[str], rows: Seq[Seq[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    yield ""


def _cells(metrics: Mapping[str, Mapping[str, Any]], names: Seq[str]) -> Iterator[str]:
    for name in names:
        yield _cell(name, Estimate(**metrics[name])) if name in metrics else ""


def _cell(name: str, of: Estimate) -> str:
    if name.startswith(SHARES):
        return f"{of.value:.1%} [{100 * of.low:.1f}, {100 * of.high:.1f}]"
    return f"{of.value:.4g} [{of.low:.4g}, {of.high:.4g}]"
