"""What log-probs among the ids that top-p kept cost, compared with those among all ids, on one process.

    python -m benchmarks.sampling_mask --output benchmarks/results/sampling_mask.json --markdown docs/stability.md

Rows of Gaussian logits over 151,936 ids, once so sharp that top-p keeps some tens of them and once so flat that it
keeps thousands. Scoring (a forward) and an update (forward and backward) with and without, in turns. Times are the
processor's, since other work would show in those of the clock; ratios are medians over the turns, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.reports import keep, machine, median_ratio, spread_ratio, table, versions
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.device import open_device
from gspo_megatron.log_probs import linear_log_probs, vocab_parallel_logits
from gspo_megatron.rollout.native.sampling import Decoding, distribution, draw

LOGIT_STDS = (6.0, 3.5)


def measure(logit_std: float, turns: int, rows: int, hidden: int, vocab: int, top_p: float) -> dict[str, Any]:
    """Seconds of every turn by name, and how many ids are kept."""
    draws = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(rows, hidden, generator=draws)
    weight_VH = torch.randn(vocab, hidden, generator=draws) * (logit_std / hidden**0.5)
    targets, kept = [], []
    for some_bH in hidden_NH.split(32):
        how = Decoding(top_p=top_p)
        log_probs_bV = distribution(vocab_parallel_logits(some_bH, weight_VH), how)
        targets.append(draw(log_probs_bV, torch.rand(len(some_bH), generator=draws, dtype=torch.float64), how)[0])
        kept_bV = log_probs_bV > -torch.inf
        kept.append(Ragged(kept_bV.nonzero()[:, 1].int(), kept_bV.sum(1).int()))
    targets_N, support = torch.cat(targets), Ragged.join(kept)
    for x in (hidden_NH, weight_VH):
        x.requires_grad_()

    @torch.no_grad()
    def score(support: Ragged | None) -> None:
        linear_log_probs(hidden_NH, weight_VH, targets_N, kept_ids=support, validate=False)

    def update(support: Ragged | None) -> None:
        log_probs_N, _ = linear_log_probs(
            hidden_NH, weight_VH, targets_N, kept_ids=support, with_entropy=True, validate=False
        )
        torch.autograd.grad(log_probs_N.sum(), (hidden_NH, weight_VH))

    works: dict[str, Callable[[], Any]] = {
        "scoring": lambda: score(None),
        "scoring, masked": lambda: score(support),
        "update": lambda: update(None),
        "update, masked": lambda: update(support),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if turn:  # the first one fills caches
                seconds[name].append(time.process_time() - start)
    counts = support.counts_R.double()
    return {
        "seconds": seconds,
        "ratios": {name: median_ratio(seconds[f"{name}, masked"], seconds[name]) for name in ("scoring", "update")},
        "kept": {"mean": float(counts.mean()), "max": int(counts.max())},
        "logit_std": logit_std,
    }


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    device = open_device("cpu", "fp32")
    torch.set_num_threads(1)
    sizes = {key: getattr(options, key) for key in ("rows", "hidden", "vocab", "top_p")}
    return {
        "cases": [measure(logit_std, options.turns, **sizes) for logit_std in LOGIT_STDS],
        "sizes": sizes,
        "machine": machine(device, 1),
        "versions": versions(["torch"]),
        "command": f"python -m benchmarks.sampling_mask {' '.join(sys.argv[1:])}",
    }


def report(found: dict[str, Any]) -> str:
    """The table of docs/stability.md."""
    rows = [
        [
            f"{case['kept']['mean']:,.0f} ({case['kept']['max']:,})",
            name,
            f"{statistics.median(case['seconds'][name]):.2f} s",
            spread_ratio(case["seconds"][f"{name}, masked"], case["seconds"][name]),
        ]
        for case in found["cases"]
        for name in case["ratios"]
    ]
    sizes = found["sizes"]
    return (
        f"`{found['command']}`\n\nLog-probs of {sizes['rows']} rows, hidden size {sizes['hidden']}, {sizes['vocab']:,} "
        f"ids, top-p {sizes['top_p']}; {found['machine']}.\n\n"
        + table(["ids kept (at most)", "", "processor time, all ids", "kept ids / all (quartiles of the turns)"], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument(
        "--from", dest="known", type=Path, help="measure nothing; show what --output wrote to this file"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    found = json.loads(options.known.read_text()) if options.known else measure_all(options)
    print(report(found))
    keep(found, report(found), "sampling_mask", output=options.output, markdown=options.markdown)


if __name__ == "__main__":
    main()
