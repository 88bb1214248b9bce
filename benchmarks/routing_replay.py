"""What recording and replaying the routers' choice costs, on one process.

    python -m benchmarks.routing_replay --output benchmarks/results/routing_replay.json --markdown docs/stability.md

One policy and one batch; updates (with a learning rate of 0), scoring passes and sampling with and without, in turns.
Times are the processor's, since other work would show in those of the clock; ratios are medians over the turns, with
quartiles.
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

from benchmarks.policies import alone
from benchmarks.reports import keep, machine, median_ratio, spread_ratio, table, versions
from gspo_megatron.base.batches import Prompt, Sequence, UpdateBatch
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.mcore.sampler import MegatronSampler
from gspo_megatron.rollout.native.stopping import Stops
from gspo_megatron.run.stages import PolicyLoss

SETTINGS = (
    "model.preset=tiny_moe",
    "model.num_layers=6",
    "model.hidden_size=128",
    "model.num_experts=64",
    "model.experts_per_token=8",
    "model.expert_ffn_size=64",
    "model.vocab_size=4096",
    "model.max_sequence_length=512",
    "precision.device=cpu",
    "precision.dtype=fp32",
    "rollout.max_new_tokens=64",
    "algorithm.routing_replay=R2",
)


WITH = {"update": "update, R2", "scoring": "scoring, recorded", "sampling": "sampling, recorded"}


def measure(turns: int, overrides: list[str]) -> dict[str, Any]:
    """Seconds of every turn by name, and the size of the column."""
    config = load_config(None, [*SETTINGS, *overrides])
    device, groups, policy, algorithm = alone(config)
    assert config.model.vocab_size is not None
    draws = torch.Generator().manual_seed(1)
    sequences = [
        Sequence.after_prompt(torch.randint(config.model.vocab_size, (256,), generator=draws).tolist(), 64, 1.0)
        for _ in range(16)
    ]
    micro_batches = pack(sequences, pad_id=0, max_tokens=1024, rules=packing_rules(config))
    for m, log_probs_R in zip(micro_batches, policy.log_probs(micro_batches), strict=True):
        m.columns["old_log_probs"] = log_probs_R
    loss = PolicyLoss(algorithm.objective, groups, False)
    batch = UpdateBatch(micro_batches, len(sequences), sum(s.num_trained for s in sequences))
    policy.log_probs(micro_batches, as_old=True)
    routed = [m.columns["routed_experts"] for m in micro_batches]

    def update(replay: bool) -> None:
        for m, column in zip(micro_batches, routed, strict=True):
            m.columns.pop("routed_experts", None)
            if replay:
                m.columns["routed_experts"] = column
        policy.update(batch, loss, lr=0.0)

    sampler = MegatronSampler(policy, stops=Stops(()), pad_id=0)
    prompts = [Prompt(i, "", tuple(s.tokens[:64].tolist()), "") for i, s in enumerate(sequences)]

    def sample(recorded: bool) -> None:
        sampler.records_experts = recorded
        sampler.generate(prompts, range(len(prompts)))

    works: dict[str, Callable[[], Any]] = {
        "update": lambda: update(False),
        "update, R2": lambda: update(True),
        "scoring": lambda: policy.log_probs(micro_batches),
        "scoring, recorded": lambda: policy.log_probs(micro_batches, as_old=True),
        "sampling": lambda: sample(False),
        "sampling, recorded": lambda: sample(True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if turn:  # the first one fills caches
                seconds[name].append(time.process_time() - start)
    return {
        "seconds": seconds,
        "ratios": {name: median_ratio(seconds[other], seconds[name]) for name, other in WITH.items()},
        "bytes_per_token": routed[0][0].numel() * routed[0].element_size(),
        "settings": [*SETTINGS, *overrides],
        "machine": machine(device, 1),
        "versions": versions(["torch", "megatron-core"]),
        "command": f"python -m benchmarks.routing_replay {' '.join(sys.argv[1:])}",
    }


def report(found: dict[str, Any]) -> str:
    """The table of docs/stability.md."""
    seconds = found["seconds"]
    rows = [
        [name, f"{statistics.median(seconds[name]):.2f} s", spread_ratio(seconds[other], seconds[name])]
        for name, other in WITH.items()
    ]
    return (
        f"`{found['command']}`\n\n6 layers, 64 experts, 8 of a token, {found['bytes_per_token']} bytes a token; "
        f"{found['machine']}.\n\n"
        + table(["", "processor time, without", "with / without (quartiles of the turns)"], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument(
        "--from", dest="known", type=Path, help="measure nothing; show what --output wrote to this file"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="page whose table is replaced")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    found = json.loads(options.known.read_text()) if options.known else measure(options.turns, options.overrides)
    print(report(found))
    keep(found, report(found), "routing_replay", output=options.output, markdown=options.markdown)


if __name__ == "__main__":
    main()
