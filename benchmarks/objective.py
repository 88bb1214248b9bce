"""Seconds of the objective alone, forward and backward, for every row of the table of algorithms and every correction.

    python -m benchmarks.objective --output benchmarks/results/objective.json

What an update costs beside it (forward and backward of the model) is the same for all rows, and far more: the share of
the objective is given by the time of the log-probs alone, of one micro-batch at a small vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.reports import machine
from gspo_megatron.device import open_device
from gspo_megatron.log_probs import linear_log_probs
from gspo_megatron.objective import VARIANTS, PolicyObjective, Segments, Variant, resolve_variant
from gspo_megatron.objective.corrections import CORRECTIONS

PARAMETERS = {"off_policy_mask": {"correction.delta": 0.1}}


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def batch(num_tokens: int, longest: int) -> tuple[torch.Tensor, ...]:
    """float32 log-probs of responses of 1 to `longest` tokens, and their lengths."""
    draw = torch.Generator().manual_seed(0)
    lengths, left = [], num_tokens
    while left:
        lengths.append(min(int(torch.randint(1, longest, (1,), generator=draw)), left))
        left -= lengths[-1]
    old_R = -torch.rand(num_tokens, generator=draw)
    new_R = (old_R + 0.05 * torch.randn(num_tokens, generator=draw)).requires_grad_()
    sampler_R = old_R + 0.05 * torch.randn(num_tokens, generator=draw)
    return new_R, old_R, sampler_R, torch.randn(len(lengths), generator=draw), torch.tensor(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    new_R, old_R, sampler_R, advantages_S, lengths_S = batch(args.tokens, args.longest)
    segments = Segments.from_lengths(lengths_S)

    def update(variant: Variant) -> None:
        sampler = {"sampler_log_probs_T": sampler_R} if variant.correction.acts else {}
        loss, _ = PolicyObjective(variant, kl_coef=0.0)(new_R, old_R, advantages_S, segments, **sampler)
        torch.autograd.grad(loss, new_R)

    # One small model layer's worth of what comes before: log-probs of the same tokens.
    hidden_NH = torch.randn(args.tokens // 16, 256, requires_grad=True)
    weight_VH = torch.randn(8192, 256, requires_grad=True)
    targets_N = torch.randint(8192, (args.tokens // 16,))

    def log_probs() -> None:
        log_probs_N, _ = linear_log_probs(hidden_NH, weight_VH, targets_N)
        torch.autograd.grad(log_probs_N.sum(), (hidden_NH, weight_VH))

    rows = dict(VARIANTS)
    for name in CORRECTIONS:
        rows[f"gspo, {name}"] = resolve_variant("gspo", correction=name, dials=PARAMETERS.get(name))
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(args.repeats):  # in turn, so that a busy moment meets all of them
        for name, variant in rows.items():
            seconds[name].append(timed(lambda variant=variant: update(variant)))
    of_log_probs = 16 * min(timed(log_probs) for _ in range(5))
    fastest = {name: min(values) for name, values in seconds.items()}
    result = {
        "machine": machine(open_device("cpu", "fp32"), 1),
        "tokens": args.tokens,
        "sequences": len(lengths_S),
        "log_probs": {"hidden": 256, "vocabulary": 8192, "seconds": of_log_probs},
        "rows": {
            name: {
                "seconds": fastest[name],
                "median": statistics.median(seconds[name]),
                "nanoseconds_per_token": fastest[name] / args.tokens * 1e9,
                # With the log-probs of that tiny head, which every row needs, relative to gspo.
                "update_relative_to_gspo": (of_log_probs + fastest[name]) / (of_log_probs + fastest["gspo"]),
            }
            for name in rows
        },
    }
    for name, row in result["rows"].items():
        print(f"{name:32} {row['nanoseconds_per_token']:8.1f} ns a token   {row['update_relative_to_gspo']:.4f}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
