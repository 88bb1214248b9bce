"""Markdown tables of the results of benchmarks/step.py, one for each kind of comparison, the ratio first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.reports import table

PARTS = ("rollout", "log_probs", "update", "step")
Result = dict[str, Any]


def tables(results: Mapping[str, Result]) -> dict[str, str]:
    """Tables by kind, from results by the name of their run."""
    makers = {"step": parts_table, "step-trl": trl_table, "step-pretraining": pretraining_table}
    found = {}
    for kind, make in makers.items():
        alike = {name: result for name, result in results.items() if result["kind"] == kind}
        if alike:
            origins = "".join(f"- {name}: `{x['command']}`; {x['machine']}\n" for name, x in alike.items())
            found[kind] = f"{make(alike)}\n{origins}"
    return found


def parts_table(results: Mapping[str, Result]) -> str:
    rows = []
    for name, x in results.items():
        seconds = x["seconds"]
        cells = [f"{seconds['rollout'] / seconds['update']:.2f}", str(x["processes"]), f"{x['tokens_per_step']:,.0f}"]
        cells += [f"{seconds[part]:.3f}" for part in PARTS]
        rows.append([name, *cells, f"{x['tokens_per_second']['step']:,.0f}", f"{x['peak_memory_gib']:.2f}"])
    head = ["run", "rollout / updates", "processes", "tokens a step"]
    head += ["rollout, s", "old log-probs, s", "updates, s", "step, s"]
    return table([*head, "tokens/s", "GiB a process"], rows)


def trl_table(results: Mapping[str, Result]) -> str:
    rows = []
    for name, x in results.items():
        cells = [f"{x[column][of]:.3f}" for column in ("seconds", "cpu_seconds") for of in ("ours", "trl")]
        cells += [f"{x['tokens'][of]:,.0f}" for of in ("ours", "trl")]
        rows.append([name, f"{x['ratio']:.2f}", *cells, str(len(x["seconds_all"]["ours"]))])
    head = ["run", "ours / TRL", "ours, s", "TRL, s", "ours, processor s", "TRL, processor s"]
    return table([*head, "ours, tokens", "TRL, tokens", "steps"], rows)


def pretraining_table(results: Mapping[str, Result]) -> str:
    works = ("update", "update_every_token", "pretraining")
    rows = []
    for name, x in results.items():
        cells = [f"{x['ratio']:.3f}", f"{x['ratio_every_token']:.3f}", *(f"{x['seconds'][work]:.4f}" for work in works)]
        rows.append([name, *cells, f"{x['tokens']['update']:,}", str(len(x["seconds_all"]["update"]))])
    head = ["run", "update / plain step", "every token scored / plain step"]
    return table([*head, "update, s", "every token scored, s", "plain step, s", "tokens", "steps"], rows)
