"""What a part of `make gpu-hour` measures, in this process: python -m benchmarks.gpu_hour.measure NAME --output FILE.

All but `decode` use one small model with real head sizes, and the same packed sequences of random tokens. With
--rehearse the model is tiny, on the CPU, and both sides are local layers: the same code runs, and its numbers mean
nothing.

Errors are root mean squares; of gradients, over all parameters and relative to the size of the gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_hour.parts import SMALLER, UPDATE
from benchmarks.reports import machine, versions
from gspo_megatron.base.batches import MicroBatch, Prompt, UpdateBatch
from gspo_megatron.base.batches import Sequence as Tokens
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import DTYPES, Device, open_device
from gspo_megatron.device.own import this_process
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.rollout.native.stopping import Stops
from gspo_megatron.run.algorithm import Algorithm

MODEL = (
    "model.num_layers=4",
    "model.hidden_size=1024",
    "model.num_attention_heads=16",
    "model.num_query_groups=4",
    "model.head_dim=128",
    "model.num_experts=32",
    "model.experts_per_token=4",
    "model.expert_ffn_size=512",
    "model.vocab_size=32768",
    "model.max_sequence_length=1024",
    "train.tokens_per_micro_batch=4096",
    "rollout.max_new_tokens=64",
    "precision.dtype=bf16",
)
FIXED = ("optimizer.distributed=false", "optimizer.overlap=off", "optimizer.clip_grad=1e9")
PROMPT = 8
"""Tokens of a sequence that are not trained on."""
ROWS, PROMPT_TOKENS, NEW_TOKENS = 256, 128, 64
"""Of `decode`."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton")


@dataclass(frozen=True)
class Bench:
    """The device, the settings, and packed sequences, for policies that are built in turn."""

    config: Config
    device: Device
    groups: Any
    rehearse: bool
    te: bool
    """Whether what is measured is built from Transformer Engine's layers."""

    @classmethod
    def open(cls, options: argparse.Namespace, model: Sequence[str] = MODEL, file: Path | None = None) -> Bench:
        """Opens the device, joins a group of one process, and imports Megatron-Core."""
        fp8 = "none" if options.rehearse else options.fp8
        overrides = [*model, *FIXED, f"precision.fp8={fp8}", f"precision.deterministic={options.deterministic}".lower()]
        config = load_config(file and str(file), [*overrides, *(SMALLER if options.rehearse else ())])
        p = config.precision
        if options.te:
            import_module("transformer_engine")  # a run on the CPU hides it, unless it was imported before
        device = open_device(p.device, p.dtype, fp8=p.fp8, deterministic=p.deterministic)
        # Only now: Megatron-Core imports Transformer Engine, which reads its variables at once.
        from gspo_megatron.mcore import compat
        from gspo_megatron.mcore.groups import Groups

        device.start_processes(600.0)
        groups = Groups(check_config(config, 1), device.torch_device)
        compat.apply_patches(device.on_cpu)
        te = options.te if options.rehearse else this_process().transformer_engine.works
        if te:
            compat.check_transformer_engine()
        return cls(config, device, groups, options.rehearse, te)

    def policy(self, *, te: bool, dtype: str = "bf16", fp8: str = "none") -> Any:
        """A policy whose weights depend on the seed alone."""
        from gspo_megatron.mcore.policy import MegatronPolicy

        precision = replace(self.config.precision, dtype=dtype, fp8="none" if self.rehearse else fp8)
        config = replace(self.config, precision=precision)
        device = replace(self.device, dtype=DTYPES[dtype])
        return MegatronPolicy(config, self.groups, device, te and self.te, Algorithm.of(config).scoring)

    def batch(self, lengths: Sequence[int]) -> UpdateBatch:
        generator = torch.Generator().manual_seed(0)
        vocab_size, most = self.config.model.vocab_size or 0, self.config.model.max_sequence_length
        lengths = [min(n, most) for n in lengths]
        drawn = [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]
        sequences = [Tokens.after_prompt(tokens, min(PROMPT, len(tokens) - 1)) for tokens in drawn]
        sequences = [replace(s, advantage=(-1.0) ** i) for i, s in enumerate(sequences)]
        max_tokens = self.config.train.tokens_per_micro_batch
        micro_batches = pack(sequences, pad_id=0, max_tokens=max_tokens, rules=packing_rules(self.config))
        return UpdateBatch(micro_batches, len(sequences), sum(len(m.sequence_R) for m in micro_batches))

    @property
    def lengths(self) -> list[int]:
        return [37 + 61 * i % 980 for i in range(24)]


@dataclass(frozen=True)
class Found:
    """What a policy makes of a batch: log-probs before the update and in its forward, and the gradient."""

    old: list[Tensor]
    new: list[Tensor]
    gradients: dict[str, Tensor]


def look(policy: Any, batch: UpdateBatch) -> Found:
    """Scores the batch as the trainer does before its updates, then makes the first update without stepping."""
    old = [x.float() for x in policy.log_probs(batch.micro_batches)]
    new: list[Tensor] = []

    def loss(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
        new.append(log_probs_R.detach().float())
        lengths_S = torch.tensor(m.trained_lengths, device=log_probs_R.device)
        weight_R = (m.advantages_S / lengths_S)[m.sequence_R]
        return LossTerms(-(log_probs_R * weight_R).sum() / batch.num_sequences, {})

    policy.update(batch, loss, lr=0.0, accept=lambda norm, fine: False)
    gradients = {place.name: gradient.clone() for place, gradient in policy.gradients()}
    return Found(old, new, gradients)


def rms(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    difference = torch.cat([(a - b).double() for a, b in zip(x, y, strict=True)])
    return float(difference.square().mean().sqrt())


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return norm({name: g - theirs[name] for name, g in ours.items()}) / norm(theirs)


def cosine(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    product = sum(float((g.double() * theirs[name].double()).sum()) for name, g in ours.items())
    return product / (norm(ours) * norm(theirs))


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The five gradients with the largest relative error."""
    errors = {n: float((g - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-30)) for n, g in ours.items()}
    return dict(sorted(errors.items(), key=lambda each: -each[1])[:5])


def ratio_noise(batch: UpdateBatch, found: Found) -> float:
    """max over sequences |exp(mean of new - old) - 1|: GSPO's ratio where nothing has been learned yet."""
    noise = 0.0
    for m, old_R, new_R in zip(batch.micro_batches, found.old, found.new, strict=True):
        sums_S = torch.zeros(len(m.trained_lengths), dtype=torch.float64)
        sums_S.index_add_(0, m.sequence_R.cpu(), (new_R - old_R).double().cpu())
        noise = max(noise, float((sums_S / torch.tensor(m.trained_lengths)).expm1().abs().max()))
    return noise


# --- the parts ---


def te_against_local(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """The error of each against float32 with the same, bf16, weights: no format decides which of the two is right."""
    from gspo_megatron.mcore.parameters import named_parameters

    batch = bench.batch(bench.lengths)
    local = bench.policy(te=False)
    found = {"local": look(local, batch)}
    reference = bench.policy(te=False, dtype="fp32")
    shape = bench.config.model.shape
    with torch.no_grad():
        for ours, theirs in zip(reference.model, local.model, strict=True):
            weights = dict(named_parameters(theirs, shape, bench.groups))
            for place, parameter in named_parameters(ours, shape, bench.groups):
                parameter.copy_(weights[place])
    del local
    found["fp32"] = look(reference, batch)
    del reference
    found["te"] = look(bench.policy(te=True), batch)
    errors = {name: rms(found[name].old, found["fp32"].old) for name in ("local", "te")}
    gradient_errors = {name: relative_error(found[name].gradients, found["fp32"].gradients) for name in errors}
    return {
        "log_prob_error_local": errors["local"],
        "log_prob_error_te": errors["te"],
        "log_prob_error_ratio": errors["te"] / errors["local"],
        "gradient_error_local": gradient_errors["local"],
        "gradient_error_te": gradient_errors["te"],
        "gradient_error_ratio": gradient_errors["te"] / gradient_errors["local"],
        "worst_gradients": worst(found["te"].gradients, found["local"].gradients),
    }


def same_forward_twice(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    batch, policy = bench.batch(bench.lengths), bench.policy(te=True)
    first, second = look(policy, batch), look(policy, batch)
    pairs = list(zip(first.old, second.old, strict=True))
    unequal = [name for name, gradient in first.gradients.items() if not torch.equal(gradient, second.gradients[name])]
    return {
        "log_probs": sum(a.numel() for a, _ in pairs),
        "log_probs_that_differ": sum(int((a != b).sum()) for a, b in pairs),
        "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
        "gradients": len(first.gradients),
        "gradients_that_differ": len(unequal),
        "gradient_difference": relative_error(first.gradients, second.gradients),
        "which": unequal[:10],
    }


def first_ratio(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    batch = bench.batch(bench.lengths)
    found = {name: look(bench.policy(te=name == "te"), batch) for name in ("local", "te")}
    pairs = list(zip(found["te"].old, found["te"].new, strict=True))
    return {
        "ratio_noise": ratio_noise(batch, found["te"]),
        "ratio_noise_local": ratio_noise(batch, found["local"]),
        "sequences": batch.num_sequences,
        "log_probs": sum(old.numel() for old, _ in pairs),
        "log_probs_that_differ": sum(int((old != new).sum()) for old, new in pairs),
    }


def fp8(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    batch = bench.batch(bench.lengths)
    wide = look(bench.policy(te=True), batch)
    narrow = look(bench.policy(te=True, fp8=options.fp8), batch)
    return {
        "gradient_cosine": cosine(narrow.gradients, wide.gradients),
        "log_prob_error": rms(narrow.old, wide.old),
        "ratio_noise": ratio_noise(batch, narrow),
        "ratio_noise_bf16": ratio_noise(batch, wide),
        "worst_gradients": worst(narrow.gradients, wide.gradients),
    }


def empty_expert(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """One sequence of three tokens: most experts get none. With expert parallel it is a rank that gets none, which
    needs two GPUs: `context_parallel` is the part for those."""
    batch = bench.batch([3])
    local = look(bench.policy(te=False), batch)
    found = look(bench.policy(te=True, fp8=options.fp8), batch)
    finite = all(bool(g.isfinite().all()) for g in found.gradients.values())
    experts = [g for name, g in found.gradients.items() if ".experts." in name]
    return {
        "finite": finite and all(bool(x.isfinite().all()) for x in found.old),
        "expert_matrices": len(experts),
        "expert_matrices_without_tokens": sum(not bool(g.any()) for g in experts),
        "gradient_cosine": cosine(found.gradients, local.gradients) if finite else math.nan,
        "log_prob_error": rms(found.old, local.old),
    }


def decode(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    from gspo_megatron.mcore.sampler import MegatronSampler

    policy = bench.policy(te=True, fp8=options.fp8)
    # No token ends a response: every row decodes to its limit.
    sampler = MegatronSampler(policy, stops=Stops((-1,)), pad_id=0)
    rows, length = (4, 4) if bench.rehearse else (ROWS, PROMPT_TOKENS)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(i, "", tuple(torch.randint(1, 99, (length,), generator=generator).tolist()), "") for i in range(rows)
    ]
    seconds = []
    for turn in range(3):
        start = time.perf_counter()
        rollouts = sampler.generate(prompts, [turn * rows + i for i in range(rows)])
        bench.device.synchronize()
        seconds.append(time.perf_counter() - start)
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    return {
        "tokens_per_second": tokens / min(seconds[1:]),
        "seconds": seconds,
        "rows": rows,
        "new_tokens": tokens // rows,
        "peak_memory_gib": bench.device.peak_memory_gib(),
    }


MEASURES: dict[str, Callable[[Bench, argparse.Namespace], dict[str, Any]]] = {
    measure.__name__: measure
    for measure in (te_against_local, same_forward_twice, first_ratio, fp8, empty_expert, decode)
}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("name", choices=sorted(MEASURES))
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--fp8", default="none", help="value of precision.fp8")
    options.add_argument("--deterministic", action="store_true", help="with precision.deterministic")
    options.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, with local layers")
    options.add_argument("--te", action="store_true", help="with --rehearse: its layers, behind tests/te/stand_in")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parser().parse_args(argv)
    if options.name == "decode":
        sizes = ("model.num_layers=2", f"rollout.max_batch={ROWS}", f"model.max_sequence_length={2 * PROMPT_TOKENS}")
        bench = Bench.open(options, (*sizes, f"rollout.max_new_tokens={NEW_TOKENS}"), UPDATE)
    else:
        bench = Bench.open(options)
    values = MEASURES[options.name](bench, options)
    result = {
        "values": values,
        "layers": "Transformer Engine" if bench.te else "local",
        "machine": machine(bench.device, torch.get_num_threads()),
        "versions": versions(PACKAGES),
        "command": shlex.join(["python", "-m", "benchmarks.gpu_hour.measure", *argv]),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
