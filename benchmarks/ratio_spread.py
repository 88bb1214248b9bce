"""How the ratio of a response spreads with its length: of one small model, and of it after one update.

    python -m benchmarks.ratio_spread --output benchmarks/results/ratio_spread.json --markdown docs/study.md

A model is trained on a random language and samples responses. One GSPO update, Adam's first, is made with half of them;
their reward is the share of tokens from the lower half of the vocabulary. The other half is scored before and after, as
the second update of a step would find it. With d_t = log p_new(y_t) - log p_old(y_t) of the first n tokens, the log
of the sequence ratio is

    sum      sum_t d_t                        the tutorial chapter's GSPO, `gspo_sum`
    product  sum_t log clip(exp(d_t), 0.8, 1.2)      the chapter's GRPO: a product of clipped token ratios
    mean     (1 / n) sum_t d_t                the paper's GSPO, `gspo`

The spread is its standard deviation over responses, and the slope that of log spread over log n. Everything is done
again for each seed: the language, the weights, the responses. Intervals are Student's t over seeds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import numerics
from benchmarks.numerics import PROMPT, SETTINGS, MegatronPolicy, Scored, Size, opened
from benchmarks.reports import keep, table, versions
from gspo_megatron.base.batches import Sequence as Trained
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.data.responses import Response
from gspo_megatron.models.families import family_of
from gspo_megatron.monitor.console import Console
from gspo_megatron.objective.variants import VARIANTS
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.scoring import Scorer
from gspo_megatron.run.stages import PolicyLoss
from gspo_megatron.testing.intervals import Interval
from gspo_megatron.testing.local_ranks import run_distributed

Array = NDArray[np.float64]

LENGTHS = (16, 64, 256, 1024)
LEARNING_RATES = (1e-5, 1e-4, 1e-3)
TOKEN_BAND = (0.2, 0.2)
BANDS = {
    name: tuple(VARIANTS[name].clip.parameters()[side] for side in ("low", "high")) for name in ("gspo_sum", "gspo")
}
"""How far below and above 1 each clips."""


@dataclass(frozen=True)
class Whole:
    """A tensor in memory as `Sliceable`."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        return self.tensor[part]


def update_and_score(config: Config, learnt: Sequence[Trained], held_out: Sequence[Response]) -> tuple[Scored, Scored]:
    """The log-probs of `held_out` before and after one update with `learnt`, on a rank."""
    with opened(config) as (policy, checkpoints, packer):
        checkpoints.load("latest", lambda about, shares: None)
        # Adam's moments would be those of the training before; a run that starts from a published model has none.
        algorithm, rules = Algorithm.of(config), family_of(config.model.shape).rules
        weights = {name: Whole(tensor.clone()) for name, tensor in policy.weights(rules)}
        fresh = MegatronPolicy(config, policy.groups, policy.device, False, algorithm.scoring)
        fresh.load_weights(weights.__getitem__, rules)
        scorer = Scorer(fresh, packer.ranks, packer, Console(on=False))
        before = scorer.log_probs(held_out)
        batch = packer.update_batch(learnt)
        fresh.update(batch, PolicyLoss(algorithm.objective, packer.ranks, False), lr=config.optimizer.lr)
        return before, scorer.log_probs(held_out)


def advantages(responses: Sequence[Sequence[int]], vocab_size: int) -> Array:
    """(R - mean) / std, R the share of tokens from the lower half of the vocabulary."""
    rewards = np.array([np.mean(np.array(tokens) < vocab_size // 2) for tokens in responses])
    return np.asarray((rewards - rewards.mean()) / (rewards.std() + 1e-6))


def spreads(before: Scored, after: Scored, advantage: Array, lengths: Sequence[int]) -> dict[str, Any]:
    """Of every length, and the slope of each way to make one ratio of a response.

    Args:
        advantage: of every response, whose sign decides which bound can remove its gradient.
    """
    difference: Array = np.array(after) - np.array(before)  # [responses, tokens]
    bounded = np.log(np.clip(np.exp(difference), 1 - TOKEN_BAND[0], 1 + TOKEN_BAND[1]))
    by_length: list[dict[str, Any]] = []
    for n in lengths:
        logs = {
            "sum": difference[:, :n].sum(axis=1),
            "product": bounded[:, :n].sum(axis=1),
            "mean": difference[:, :n].mean(axis=1),
        }
        by_length.append(
            {
                "tokens": n,
                "spread": {how: float(log.std(ddof=1)) for how, log in logs.items()},
                "largest": {how: float(np.abs(log).max()) for how, log in logs.items()},
                "clipped": {
                    "gspo_sum": clipped(logs["sum"], advantage, BANDS["gspo_sum"]),
                    "gspo": clipped(logs["mean"], advantage, BANDS["gspo"]),
                    "tokens": clipped(difference[:, :n], advantage[:, None], TOKEN_BAND),
                },
            }
        )
    return {
        "by_length": by_length,
        "slopes": {how: slope(lengths, [each["spread"][how] for each in by_length]) for how in by_length[0]["spread"]},
        "token_rms": float(np.sqrt(np.square(difference).mean())),
    }


def clipped(log_ratio: Array, advantage: Array, band: Sequence[float]) -> float:
    """The share whose gradient min(s A, clip(s) A) removes."""
    ratio = np.exp(log_ratio)
    low, high = (advantage < 0) & (ratio < 1 - band[0]), (advantage > 0) & (ratio > 1 + band[1])
    return float((low | high).mean())


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Of the least-squares line of log value over log length."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def measure(size: Size, lengths: Sequence[int], folder: str, seed: int) -> dict[str, Any]:
    """What one seed shows."""
    started = time.perf_counter()
    longest = max(PROMPT + size.tokens, size.learnt)
    settings = [
        *SETTINGS,
        *numerics.MODELS["tiny_moe"],
        f"run.dir={folder}",
        f"model.vocab_size={size.vocab_size}",
        f"model.max_sequence_length={longest}",
        f"rollout.max_new_tokens={size.tokens}",
        f"train.tokens_per_micro_batch={4 * longest}",
        "algorithm.variant=gspo",
        f"run.seed={seed}",
    ]

    def alone(work: Any, *arguments: Any, lr: float = 3e-3) -> Any:
        config = load_config(None, [*settings, f"optimizer.lr={lr}"])
        return run_distributed(work, 1, config, *arguments, timeout_s=1200.0, like_torchrun=True)[0]

    about = alone(numerics.train, size, seed)
    prompts = about.pop("prompts")
    drawn = [tokens for tokens, _ in alone(numerics.sample, prompts)]
    half = len(drawn) // 2
    learnt = [
        Trained.after_prompt([*prompt, *tokens], PROMPT, float(advantage))
        for prompt, tokens, advantage in zip(
            prompts, drawn[:half], advantages(drawn[:half], size.vocab_size), strict=False
        )
    ]
    held_out = [
        Response("", {}, [*prompt, *tokens], PROMPT)
        for prompt, tokens in zip(prompts[half:], drawn[half:], strict=True)
    ]
    updates = []
    for lr in LEARNING_RATES:
        before, after = alone(update_and_score, learnt, held_out, lr=lr)
        updates.append({"lr": lr, **spreads(before, after, advantages(drawn[half:], size.vocab_size), lengths)})
        print(f"seed {seed}, lr {lr:g}: slopes {updates[-1]['slopes']}", flush=True)
    return {
        "seed": seed,
        "model": {**about, "-log p": -float(np.mean(before))},
        "updates": updates,
        "seconds": time.perf_counter() - started,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """One table: a row for each learning rate and length, and one of slopes."""
    size, seeds = result["size"], result["seeds"]
    names = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    losses = [seed["model"]["-log p"] for seed in seeds]
    text = (
        f"`{result['command']}` took {sum(seed['seconds'] for seed in seeds):,.0f} s: tiny_moe, "
        f"{seeds[0]['model']['parameters']:,} parameters, trained for {size['updates']} updates; mean -log p of its "
        f"own tokens {min(losses):.2f} to {max(losses):.2f} nats. {size['responses']} responses of {size['tokens']:,} "
        f"tokens, vocabulary {size['vocab_size']:,}; {len(seeds)} seeds; {seeds[0]['model']['machine']}; {names}.\n\n"
    )
    head = [
        "lr, tokens",
        "sum",
        "product",
        "mean",
        "largest \\|sum\\|",
        "`gspo_sum` clips",
        "`gspo` clips",
        "of tokens, at 0.2",
    ]
    rows = []
    for updates in zip(*(seed["updates"] for seed in seeds), strict=True):
        lr = updates[0]["lr"]
        for lengths in zip(*(update["by_length"] for update in updates), strict=True):
            shares = (_over([of["clipped"][how] for of in lengths], ".1%") for how in ("gspo_sum", "gspo", "tokens"))
            spread = (_over([of["spread"][how] for of in lengths], ".2e") for how in ("sum", "product", "mean"))
            largest = max(of["largest"]["sum"] for of in lengths)
            rows.append([f"{lr:g}, {lengths[0]['tokens']:,}", *spread, f"{largest:.2e}", *shares])
        slopes = (_over([update["slopes"][how] for update in updates], "+.2f") for how in ("sum", "product", "mean"))
        rows.append([f"{lr:g}, slope", *(f"**{each}**" for each in slopes)])
    return text + table(head, rows)


def _over(values: Sequence[float], form: str) -> str:
    """The mean over seeds, and its interval where there are several."""
    found = Interval.of(values)
    if found.low is None or found.high is None:
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--responses", type=int, default=64, help="half of them for the update")
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--updates", type=int, default=150, help="that train the model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--markdown", type=Path, help="page whose table is replaced")
    options = parser.parse_args(argv)
    if len(options.lengths) < 2 or options.responses < 4 or min(options.lengths) < 1:
        parser.error("a slope needs two lengths of 1 or more, and a spread 4 or more responses")
    tokens = max(options.lengths)
    learnt = min(PROMPT + tokens, 512)
    size = Size(options.responses, tokens, options.vocab_size, options.updates, learnt)
    result: dict[str, Any] = {
        "size": size._asdict(),
        "lengths": sorted(options.lengths),
        "bands": {"product": TOKEN_BAND, **BANDS},
        "seeds": [],
        "versions": versions(("torch", "megatron-core")),
        "command": f"python -m benchmarks.ratio_spread {' '.join(sys.argv[1:] if argv is None else argv)}",
    }
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            result["seeds"].append(measure(size, sorted(options.lengths), folder, seed))
        keep(result, markdown(result), "ratio_spread", output=options.output, markdown=options.markdown)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    # For the process that ranks are forked from, and so for them.
    os.environ["PYTHONWARNINGS"] = "ignore"
    sys.exit(main())
