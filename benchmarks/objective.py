"""What a row of the objective costs: every algorithm and every correction in an update of one small model.

    python -m benchmarks.objective --output benchmarks/results/objective.json --markdown docs/benchmarks.md

One policy and one batch; an update (with a learning rate of 0) with each row, in turns. The smaller the model, the
larger the share of the objective, and this one is tiny. Next to it the objective alone, forward and backward, on 65,536
tokens. Times are the processor's, since other work would show in those of the clock; ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.policies import alone
from benchmarks.reports import keep, machine, median_ratio, table, versions
from gspo_megatron.base.batches import Sequence, UpdateBatch
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.objective import VARIANTS, PolicyObjective, Segments, Variant, resolve_variant
from gspo_megatron.objective.corrections import CORRECTIONS
from gspo_megatron.run.stages import PolicyLoss

SETTINGS = (
    "model.preset=tiny_moe",
    "model.vocab_size=4096",
    "model.max_sequence_length=256",
    "precision.device=cpu",
    "precision.dtype=fp32",
    "rollout.max_new_tokens=192",
    # A row that clips more would save the work of more tokens.
    "train.skip_zero_gradient=false",
)
SEQUENCES, PROMPT, RESPONSE = 16, 64, 192
TOKENS, LONGEST = 65536, 4096
FIRST = "gspo"


def rows() -> dict[str, Variant]:
    """Every algorithm, and GSPO with every correction."""
    found = dict(VARIANTS)
    for name in CORRECTIONS:
        # The mask has no threshold by itself.
        dials = {"correction.delta": 0.1} if name == "off_policy_mask" else None
        found[f"{FIRST}, {name}"] = resolve_variant(FIRST, correction=name, dials=dials)
    return found


def updates_of(overrides: list[str]) -> tuple[Callable[[Variant], None], dict[str, Any]]:
    """An update with a row, and what it runs on."""
    config = load_config(None, [*SETTINGS, *overrides])
    device, groups, policy, _ = alone(config)
    assert config.model.vocab_size is not None
    draws = torch.Generator().manual_seed(1)
    length = PROMPT + RESPONSE
    sequences = [
        Sequence.after_prompt(
            torch.randint(config.model.vocab_size, (length,), generator=draws).tolist(), PROMPT, 1.0 - 2 * (i % 2)
        )
        for i in range(SEQUENCES)
    ]
    micro_batches = pack(sequences, pad_id=0, max_tokens=4 * length, rules=packing_rules(config))
    for m, log_probs_R in zip(micro_batches, policy.log_probs(micro_batches), strict=True):
        for column in ("old_log_probs", "sampler_log_probs"):
            m.columns[column] = log_probs_R + 1e-4 * torch.randn(len(log_probs_R), generator=draws)
    batch = UpdateBatch(micro_batches, SEQUENCES, sum(s.num_trained for s in sequences))

    def update(row: Variant) -> None:
        policy.update(batch, PolicyLoss(PolicyObjective(row, kl_coef=0.0), groups, False), lr=0.0)

    parameters = sum(p.numel() for chunk in policy.model for p in chunk.parameters())
    return update, {"parameters": parameters, "tokens": batch.num_tokens, "machine": machine(device, 1)}


def objective_alone() -> Callable[[Variant], None]:
    """Forward and backward of a row, on responses of 1 to LONGEST tokens."""
    draws = torch.Generator().manual_seed(0)
    lengths, left = [], TOKENS
    while left:
        lengths.append(min(int(torch.randint(1, LONGEST, (1,), generator=draws)), left))
        left -= lengths[-1]
    old_R = -torch.rand(TOKENS, generator=draws)
    new_R = (old_R + 0.05 * torch.randn(TOKENS, generator=draws)).requires_grad_()
    sampler_R = old_R + 0.05 * torch.randn(TOKENS, generator=draws)
    advantages_S, segments = torch.randn(len(lengths), generator=draws), Segments.from_lengths(torch.tensor(lengths))

    def work(row: Variant) -> None:
        sampler = sampler_R if row.correction.acts else None
        loss, _ = PolicyObjective(row, kl_coef=0.0)(new_R, old_R, advantages_S, segments, sampler_log_probs_T=sampler)
        torch.autograd.grad(loss, new_R)

    return work


def in_turns(work: Callable[[Variant], None], turns: int) -> dict[str, list[float]]:
    """Seconds of the processor, by row."""
    seconds: dict[str, list[float]] = {name: [] for name in rows()}
    for turn in range(turns + 1):
        for name, row in rows().items():
            start = time.process_time()
            work(row)
            if turn:  # the first one fills caches
                seconds[name].append(time.process_time() - start)
    return seconds


def measure(turns: int, overrides: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    update, about = updates_of(overrides)
    by_update, by_itself = in_turns(update, turns), in_turns(objective_alone(), turns)
    return {
        "rows": {
            name: {
                "update_s": statistics.median(by_update[name]),
                "update_to_gspo": median_ratio(by_update[name], by_update[FIRST]),
                "objective_ns_per_token": statistics.median(by_itself[name]) / TOKENS * 1e9,
            }
            for name in by_update
        },
        "turns": turns,
        "settings": [*SETTINGS, *overrides],
        "versions": versions(["torch", "megatron-core"]),
        "command": f"python -m benchmarks.objective {' '.join(sys.argv[1:])}",
        **about,
    }


def report(found: dict[str, Any]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        [f"`{name}`", f"{row['update_to_gspo']:.3f}", f"{row['objective_ns_per_token']:.0f}"]
        for name, row in found["rows"].items()
    ]
    return (
        f"`{found['command']}`\n\n{found['parameters']:,} parameters, {found['tokens']:,} trained tokens; the update "
        f"with `{FIRST}` takes {found['rows'][FIRST]['update_s']:.2f} s of the processor; {found['machine']}.\n\n"
        + table(["row", f"update / that of `{FIRST}`", "objective alone, ns a token"], lines)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="page whose table is replaced")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    found = measure(options.turns, options.overrides)
    print(report(found))
    keep(found, report(found), "objective", output=options.output, markdown=options.markdown)


if __name__ == "__main__":
    main()
