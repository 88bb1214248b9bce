"""How far the trainer's log-probs are from the sampler's, with the trainer's own experts and with the sampler's (R3).

    python -m benchmarks.sampler_routing --output benchmarks/results/sampler_routing.json --markdown docs/stability.md

Models are trained for some updates on a random language (benchmarks/numerics.py), and sample responses in each number
format. The pass that scores old log-probs then scores them twice with the same weights. With
d_t = log pi_old(y_t) - log mu(y_t) of a response token, the table has the share of token-layers whose experts the
scoring routers would choose differently, and max |d_t|, mean |d_t| and the share of |d_t| > ln 2, without and with R3.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.numerics import PROMPT, SETTINGS, Size, opened, train
from benchmarks.reports import keep, table, versions
from gspo_megatron.base.batches import MicroBatch, Prompt
from gspo_megatron.base.batches import Sequence as Trained
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.mcore.sampler import MegatronSampler
from gspo_megatron.objective.corrections import FAR
from gspo_megatron.rollout.native.stopping import Stops
from gspo_megatron.run.sampled_experts import SampledExperts
from gspo_megatron.testing.local_ranks import run_distributed

MODEL = (
    "model.num_layers=6",
    "model.hidden_size=128",
    "model.num_attention_heads=8",
    "model.num_experts=32",
    "model.experts_per_token=4",
    "model.expert_ffn_size=64",
    "algorithm.routing_replay=R3",
)
CASES = [("bf16", ()), ("bf16", ("parallel.ep=2", "parallel.token_dispatcher=allgather")), ("fp32", ())]


def compare(config: Config, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """On a rank."""
    with opened(config) as (policy, checkpoints, packer):
        checkpoints.load("latest", lambda about, shares: None)
        asked = [Prompt(i, "", tuple(tokens), "") for i, tokens in enumerate(prompts)]
        rollouts = MegatronSampler(policy, stops=Stops(()), pad_id=0).generate(asked, range(len(asked)))
        sequences = [
            Trained.after_prompt(
                [*r.prompt.tokens, *r.tokens], PROMPT, 1.0, {"sampler_log_probs": torch.tensor(r.log_probs)}
            )
            for r in rollouts
        ]
        experts = SampledExperts.of(rollouts, config.model.shape, packer.ranks, needed=True)
        assert experts is not None
        planned = partial(experts.deliver, members=range(len(sequences)), sequences=sequences)
        micro_batches = packer.update_batch(sequences, planned=planned).micro_batches
        ranks = packer.ranks
        gaps = {
            "without": distance(ranks.gather(_gaps(policy.log_probs(micro_batches), micro_batches))),
            "R3": distance(ranks.gather(_gaps(policy.log_probs(micro_batches, as_old=True), micro_batches))),
        }
        drift = policy.routing.metrics().values()
        changed, known = sum(m.total for m in drift), sum(m.weight for m in drift)
        return {"changed": changed / known, "token_layers": known, **gaps}


def _gaps(scored: Sequence[Tensor], micro_batches: Sequence[MicroBatch]) -> list[float]:
    pairs = zip(scored, micro_batches, strict=True)
    return [x for own, m in pairs for x in (own.double() - m.columns["sampler_log_probs"].double()).tolist()]


def distance(gaps: Sequence[float]) -> dict[str, float]:
    gap_R = torch.tensor(gaps, dtype=torch.float64).abs()
    return {
        "tokens": len(gaps),
        "max": float(gap_R.max()),
        "mean": float(gap_R.mean()),
        "far": float((gap_R > FAR).double().mean()),
    }


def measure(sizes: Sequence[Size], folder: str) -> dict[str, Any]:
    """Models that differ in how long they were trained."""
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    for size in sizes:
        found, of_model = _measure(size, f"{folder}/{size.updates}")
        of_size = {"updates": size.updates, "loss": of_model.pop("loss")}
        rows += [{**of_size, **row} for row in found]
        about = of_model
    return {
        **about,
        "rows": rows,
        "sizes": [size._asdict() for size in sizes],
        "settings": [*SETTINGS, *MODEL],
        "versions": versions(["torch", "megatron-core"]),
        "command": f"python -m benchmarks.sampler_routing {' '.join(sys.argv[1:])}",
    }


def _measure(size: Size, folder: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    settings = [
        *SETTINGS,
        *MODEL,
        f"run.dir={folder}",
        f"model.vocab_size={size.vocab_size}",
        f"model.max_sequence_length={max(PROMPT + size.tokens, size.learnt)}",
        f"rollout.max_new_tokens={size.tokens}",
        f"train.tokens_per_micro_batch={4 * max(PROMPT + size.tokens, size.learnt)}",
        "optimizer.lr=3e-3",
    ]

    def on(processes: int, work: Any, *arguments: Any, overrides: Sequence[str] = ()) -> Any:
        config = load_config(None, [*settings, *overrides])
        return run_distributed(work, processes, config, *arguments, timeout_s=600.0, like_torchrun=True)[0]

    about = on(1, train, size)
    prompts = about.pop("prompts")
    rows = []
    for dtype, layout in CASES:
        found = on(2 if layout else 1, compare, prompts, overrides=[f"precision.dtype={dtype}", *layout])
        rows.append({"format": dtype, "layout": " ".join(layout).replace("parallel.", "") or "one process", **found})
    return rows, about


def report(found: dict[str, Any]) -> str:
    """The table of docs/stability.md."""
    rows = [
        [
            f"{row['format']}, {row['layout']}, {row['updates']} updates",
            f"{100 * row['changed']:.2f} %",
            *(f"{row[how][what]:.2g}" for what in ("max", "mean") for how in ("without", "R3")),
        ]
        for row in found["rows"]
    ]
    head = ["", "other experts", "largest gap, without", "with R3", "mean gap, without", "with R3"]
    tokens = found["rows"][0]["without"]["tokens"]
    return (
        f"`{found['command']}`\n\n6 layers, 32 experts, 4 of a token, {found['parameters']:,} parameters, "
        f"{tokens:,} response tokens; {found['machine']}.\n\n{table(head, rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--updates", type=int, nargs="+", default=[20, 300], help="that train the models")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = [Size(options.responses, options.tokens, 512, updates) for updates in options.updates]
        found = measure(sizes, folder)
    print(report(found))
    keep(found, report(found), "sampler_routing", output=options.output, markdown=options.markdown)


if __name__ == "__main__":
    main()
