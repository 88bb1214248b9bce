"""Numerical noise of a whole model: the log-probs of the same tokens, computed in two ways, next to GSPO's clip band.

    python -m benchmarks.numerics --output benchmarks/results/numerics.json --markdown docs/numerics.md

A model is trained for a few hundred updates on a random language, so that its distribution has an entropy, and samples
responses, in each number format. Each layout scores these responses, with the same weights. With
d_t = log p(y_t) - log p'(y_t) of a response token between the two ways, the table has max |d_t|, the mean and the root
mean square of d_t over all tokens, and of the mean log-ratio of a response's first n tokens, (1/n) sum_t d_t, what GSPO
clips: root mean square and maximum over the responses, and the share of them outside the clip band.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.reports import keep, machine, table, versions
from gspo_megatron.base.batches import MicroBatch, Position, Prompt, UpdateBatch
from gspo_megatron.base.batches import Sequence as Trained
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.data.responses import Response
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.models.counts import count_parameters, sequence_cost
from gspo_megatron.monitor.console import Console
from gspo_megatron.objective import LikelihoodObjective
from gspo_megatron.objective.variants import VARIANTS
from gspo_megatron.rollout.native.stopping import Stops
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.scoring import Scorer
from gspo_megatron.run.stages import Packer, segments_of
from gspo_megatron.testing.fakes import PlainState
from gspo_megatron.testing.local_ranks import run_distributed

with warnings.catch_warnings():
    # Megatron-Core warns about every optional package it does without.
    warnings.simplefilter("ignore")
    from gspo_megatron.mcore import compat
    from gspo_megatron.mcore.groups import Groups
    from gspo_megatron.mcore.policy import MegatronPolicy
    from gspo_megatron.mcore.sampler import MegatronSampler
    from gspo_megatron.mcore.saving import MegatronCheckpoints

MODELS: dict[str, tuple[str, ...]] = {
    "tiny_moe": ("model.preset=tiny_moe",),
    "12 layers": (
        "model.num_layers=12",
        "model.hidden_size=128",
        "model.num_attention_heads=8",
        "model.num_experts=16",
        "model.experts_per_token=4",
        "model.expert_ffn_size=64",
    ),
}
SETTINGS = ("precision.device=cpu", "optimizer.distributed=false", "model.init_std=0.05")
LAYOUTS = ("tp=2", "ep=2", "pp=2", "cp=2")
PROMPT = 8
"""Tokens of a prompt."""
LEARNT = 128
SUCCESSORS = (0.7, 0.2, 0.07, 0.03)
"""Probabilities of the tokens that may follow a token in the language."""
CLIP = VARIANTS["gspo"].clip
AGAIN, SHUFFLED, ALONE, SAMPLER = (
    "scored again, same micro-batches",
    "other micro-batches: shuffled",
    "other micro-batches: each response alone",
    "the sampler",
)


class Size(NamedTuple):
    """How much is measured."""

    responses: int
    tokens: int
    """Of a response."""
    vocab_size: int
    updates: int
    """That train the model."""
    learnt: int = LEARNT
    """Tokens of a text that the model is trained on."""

    @property
    def lengths(self) -> list[int]:
        """The first n tokens of responses, for which their mean log-ratio is reported."""
        return [n for n in (16, 128, 1024) if n < self.tokens] + [self.tokens]


Scored = list[list[float]]
"""Of every response, its tokens' log-probs."""


# --- on a rank ---


@contextmanager
def opened(config: Config) -> Iterator[tuple[MegatronPolicy, MegatronCheckpoints, Packer]]:
    """The policy of this process, its checkpoints in config.run.dir, and what packs sequences for it."""
    device = open_device("cpu", config.precision.dtype)
    device.start_processes(config.parallel.timeout_s)
    groups = Groups(check_config(config, device.world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    policy = MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)
    packer = Packer(
        ranks=groups,
        pad_id=0,
        max_tokens=config.train.tokens_per_micro_batch,
        rules=packing_rules(config),
        cost=sequence_cost(config.model.shape),
        group_size=1,
        updates_per_rollout=1,
        seed=1,
    )
    yield policy, MegatronCheckpoints(policy, CheckpointDirectory(Path(config.run.dir), keep=1), print), packer
    groups.close()


class Language:
    """Every token has as many possible successors as SUCCESSORS has numbers."""

    def __init__(self, vocab_size: int, seed: int = 1) -> None:
        self._draw = np.random.default_rng(seed)
        self._successors = self._draw.integers(0, vocab_size, (vocab_size, len(SUCCESSORS)))

    def text(self, length: int) -> list[int]:
        tokens = [int(self._draw.integers(len(self._successors)))]
        for choice in self._draw.choice(len(SUCCESSORS), length - 1, p=SUCCESSORS):
            tokens.append(int(self._successors[tokens[-1], choice]))
        return tokens


def train(config: Config, size: Size, seed: int = 1) -> dict[str, Any]:
    """Trains a model on one process and saves it; returns what is known of it. `seed`: of its language."""
    language = Language(size.vocab_size, seed)
    with opened(config) as (policy, checkpoints, packer):

        def likelihood(
            log_probs_R: Tensor, entropy_R: Tensor | None, micro_batch: MicroBatch, batch: UpdateBatch
        ) -> LossTerms:
            return LikelihoodObjective()(
                log_probs_R, segments_of(micro_batch, packer.ranks), num_tokens=batch.num_tokens
            )

        loss = float("nan")
        for _ in range(size.updates):
            texts = [Trained.after_prompt(language.text(size.learnt), 1) for _ in range(8)]
            metrics = policy.update(packer.update_batch(texts), likelihood, lr=config.optimizer.lr)
            loss = float(metrics["loss"].total)
        checkpoints.save(Position(0, 1, 0), PlainState({}), wait=True)
        prompts = [language.text(PROMPT) for _ in range(size.responses)]
        return {
            "loss": loss,
            "parameters": count_parameters(config.model.shape).total,
            "machine": machine(policy.device, torch.get_num_threads()),
            "prompts": prompts,
        }


def sample(config: Config, prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], list[float]]]:
    """Of every response, its tokens and the sampler's log-probs. No token ends a response."""
    with opened(config) as (policy, checkpoints, _):
        checkpoints.load("latest", lambda about, shares: None)
        asked = [Prompt(i, "", tuple(tokens), "") for i, tokens in enumerate(prompts)]
        rollouts = MegatronSampler(policy, stops=Stops(()), pad_id=0).generate(asked, range(len(asked)))
        return [(rollout.tokens, rollout.log_probs) for rollout in rollouts]


def score(config: Config, responses: Sequence[Response], repacked: bool) -> dict[str, Scored]:
    """Log-probs by this layout; `repacked`: also once more, and in other micro-batches."""
    with opened(config) as (policy, checkpoints, packer):
        checkpoints.load("latest", lambda about, shares: None)

        def scored(order: Sequence[int], max_tokens: int) -> Scored:
            scorer = Scorer(policy, packer.ranks, replace(packer, max_tokens=max_tokens), Console(on=False))
            found = scorer.log_probs([responses[i] for i in order])
            return [found[place] for place in np.argsort(order)]

        in_order, together = range(len(responses)), packer.max_tokens
        results = {"": scored(in_order, together)}
        if repacked:
            shuffled = random.Random(1).sample(in_order, len(responses))
            results[AGAIN] = scored(in_order, together)
            results[SHUFFLED] = scored(shuffled, together)
            results[ALONE] = scored(in_order, max(len(each.tokens) for each in responses))
        return results


# --- from log-probs to numbers ---


def noise(one: Scored, other: Scored, lengths: Sequence[int]) -> dict[str, Any]:
    """Of d = log p - log p' [responses, tokens]: over all tokens, and of the mean of a response's first n."""
    difference: NDArray[np.float64] = np.array(one) - np.array(other)
    found: dict[str, Any] = {
        "token": {"max": float(np.abs(difference).max()), "mean": float(difference.mean()), "rms": _rms(difference)}
    }
    for n in lengths:
        mean = difference[:, :n].mean(axis=1)
        outside = (np.exp(mean) < 1 - CLIP.parameters()["low"]) | (np.exp(mean) > 1 + CLIP.parameters()["high"])
        found[str(n)] = {"max": float(np.abs(mean).max()), "rms": _rms(mean), "outside": float(outside.mean())}
    return found


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(values).mean()))


def measure(size: Size, models: Sequence[str], layouts: Sequence[str], folder: str) -> dict[str, Any]:
    started = time.perf_counter()
    known: dict[str, Any] = {}
    rows = []
    for model in models:
        settings = [
            *SETTINGS,
            *MODELS[model],
            f"run.dir={folder}/{model}",
            f"model.vocab_size={size.vocab_size}",
            f"model.max_sequence_length={max(PROMPT + size.tokens, size.learnt)}",
            f"rollout.max_new_tokens={size.tokens}",
            f"train.tokens_per_micro_batch={4 * max(PROMPT + size.tokens, size.learnt)}",
            "optimizer.lr=3e-3",
        ]

        def on(processes: int, work: Any, *arguments: Any, overrides: Sequence[str] = ()) -> Any:
            config = load_config(None, [*settings, *overrides])  # noqa: B023  (called in this turn of the loop)
            return run_distributed(work, processes, config, *arguments, timeout_s=600.0, like_torchrun=True)[0]

        about = known[model] = on(1, train, size)
        prompts = about.pop("prompts")
        for dtype in ("fp32", "bf16"):
            in_format = [f"precision.dtype={dtype}"]
            drawn = on(1, sample, prompts, overrides=in_format)
            responses = [
                Response("", {}, [*prompt, *tokens], PROMPT) for prompt, (tokens, _) in zip(prompts, drawn, strict=True)
            ]
            compared = on(1, score, responses, True, overrides=in_format)
            scored = compared.pop("")
            for layout in layouts:
                overrides = [*in_format, *(f"parallel.{axis}" for axis in layout.split(","))]
                compared[layout] = on(2, score, responses, False, overrides=overrides)[""]
            compared[SAMPLER] = [log_probs for _, log_probs in drawn]
            about[f"-log p, {dtype}"] = -float(np.mean(scored))
            for how, other in compared.items():
                rows.append({"model": model, "dtype": dtype, "how": how, **noise(other, scored, size.lengths)})
                print(f"{model}, {dtype}, {how}: {rows[-1]['token']}", flush=True)
    return {
        "size": size._asdict(),
        "lengths": size.lengths,
        "band": CLIP.parameters(),
        "models": known,
        "rows": rows,
        "seconds": time.perf_counter() - started,
        "versions": versions(("torch", "megatron-core")),
        "command": f"python -m benchmarks.numerics {' '.join(sys.argv[1:])}",
    }


def markdown(result: Mapping[str, Any]) -> str:
    """One table for each model."""
    size, lengths = result["size"], result["lengths"]
    names = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text = (
        f"`{result['command']}` took {result['seconds']:,.0f} s: {size['responses']} responses of {size['tokens']:,} "
        f"tokens, vocabulary {size['vocab_size']:,}; {names}.\n"
    )
    head = ["", "tokens: max", "rms", "mean"]
    for n in lengths:
        head += [f"mean of {n:,}: rms", "max"]
    head += [f"outside the band, {n:,}" for n in lengths]
    for model, about in result["models"].items():
        text += (
            f"\n**{model}**, {about['parameters']:,} parameters, trained for {size['updates']} updates; mean -log p of "
            f"its own tokens {about['-log p, fp32']:.2f} nats. {about['machine']}.\n\n"
        )
        rows = []
        for row in result["rows"]:
            if row["model"] == model:
                cells = [
                    f"{row['dtype']}, {row['how']}",
                    *(_short(row["token"][key]) for key in ("max", "rms", "mean")),
                ]
                for n in lengths:
                    cells += [_short(row[str(n)]["rms"]), _short(row[str(n)]["max"])]
                rows.append([*cells, *(f"{row[str(n)]['outside']:.0%}" for n in lengths)])
        text += table(head, rows)
    return text


def _short(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024, help="of a response")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--updates", type=int, default=200, help="that train the model")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), help="of two processes")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--markdown", type=Path, help="page whose table is replaced")
    options = parser.parse_args(argv)
    size = Size(options.responses, options.tokens, options.vocab_size, options.updates)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(size, options.models, options.layouts, folder)
    print(markdown(result))
    keep(result, markdown(result), "numerics", output=options.output, markdown=options.markdown)
    return 0


if __name__ == "__main__":
    # For the process that ranks are forked from, and so for them.
    os.environ["PYTHONWARNINGS"] = "ignore"
    sys.exit(main())
