"""What log-probs among the ids that top-p kept cost, compared with those among all ids, on one process.

    python -m benchmarks.sampling_mask --output benchmarks/results/sampling_mask.json --markdown docs/stability.md

One matrix product's worth of rows of a vocabulary of 151,936 ids, whose logits have a spread like a trained model's; the
ids are those that top-p keeps of them. Scoring (forward) and an update (forward and backward) with and without, in turns.
Times are the processor's, since other work would show in those of the clock; ratios are medians over the turns.
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

from benchmarks.reports import machine, median_ratio, table, versions, write_between_marks
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.device import open_device
from gspo_megatron.log_probs import linear_log_probs, vocab_parallel_logits
from gspo_megatron.rollout.native.sampling import Decoding, distribution, draw

LOGIT_STD = 3.5
"""With it, softmax has an entropy of several nats, more than a trained model's: more ids are kept than usual."""


def measure(turns: int, rows: int, hidden: int, vocab: int, top_p: float) -> dict[str, Any]:
    """Seconds of every turn by name, and how many ids are kept."""
    device = open_device("cpu", "fp32")
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(rows, hidden, generator=draws)
    weight_VH = torch.randn(vocab, hidden, generator=draws) * (LOGIT_STD / hidden**0.5)
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
        linear_log_probs(hidden_NH, weight_VH, targets_N, support=support, validate=False)

    def update(support: Ragged | None) -> None:
        log_probs_N, _ = linear_log_probs(
            hidden_NH, weight_VH, targets_N, support=support, with_entropy=True, validate=False
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
        "sizes": {"rows": rows, "hidden": hidden, "vocab": vocab, "top_p": top_p},
        "machine": machine(device, 1),
        "versions": versions(["torch"]),
        "command": f"python -m benchmarks.sampling_mask {' '.join(sys.argv[1:])}",
    }


def report(found: dict[str, Any]) -> str:
    """The table of docs/stability.md."""
    rows = [
        [name, f"{statistics.median(found['seconds'][name]):.2f} s", f"{ratio:.3f}"]
        for name, ratio in found["ratios"].items()
    ]
    sizes, kept = found["sizes"], found["kept"]
    return (
        f"`{found['command']}`\n\nLog-probs of {sizes['rows']} rows, hidden size {sizes['hidden']}, {sizes['vocab']:,} "
        f"ids, of which top-p {sizes['top_p']} keeps {kept['mean']:,.0f} on average and {kept['max']:,} at most; "
        f"{found['machine']}.\n\n{table(['', 'processor time, all ids', 'kept ids / all'], rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    found = measure(options.turns, options.rows, options.hidden, options.vocab, options.top_p)
    print(report(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.markdown:
        write_between_marks(options.markdown, "sampling_mask", report(found))


if __name__ == "__main__":
    main()
