"""What run.py measures for one case, in one process or as one rank of several: times and collectives, memory, errors of
a mean log-ratio. Each function is passed to `run_distributed`, so that every measurement starts in a fresh process.

Shape suffixes as in methods.py; S sequences, b some of the rows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.log_probs.methods import METHODS, Inputs, LogProbs
from gspo_megatron.base.batches import IGNORED
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.device import Device, open_device

SEQUENCES = 32
RESPONSE_TOKENS = 1000
LOGIT_STD = 3.5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest |x - x64| / |x64|, vector norms, by the coarsest format on the way."""
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Case:
    rows: int
    hidden: int
    vocab: int
    device: str
    dtype: str
    threads: int
    ranks: int = 1
    response_share: float = 1.0
    dead_share: float = 0.0

    @property
    def every_row_counts(self) -> bool:
        return self.response_share == 1 and self.dead_share == 0

    def check(self) -> None:
        if self.rows % SEQUENCES or self.rows % self.ranks or self.vocab % self.ranks:
            raise ConfigError(
                f"{self.rows} rows and a vocabulary of {self.vocab} must divide over {self.ranks} ranks, "
                f"the rows over {SEQUENCES} sequences too"
            )
        if self.ranks > 1 and self.device != "cpu":
            raise ConfigError(
                f"--tp {self.ranks} needs --device cpu, which counts collectives and does not compare speed"
            )


def open_case(case: Case) -> tuple[Device, Inputs]:
    torch.set_num_threads(case.threads)
    device = open_device(case.device, case.dtype)
    device.start_processes(TIMEOUT_S)
    return device, make_inputs(case, device)


def make_inputs(case: Case, device: Device) -> Inputs:
    """Sequences of equal length; each a prompt, then its response; dead ones spread evenly."""
    assert dist.group.WORLD is not None
    rng = torch.Generator(device.torch_device).manual_seed(0)
    hidden_NH = torch.randn(case.rows, case.hidden, generator=rng, device=device.torch_device).to(device.dtype)
    targets_N = torch.randint(case.vocab, (case.rows,), generator=rng, device=device.torch_device)
    rng.manual_seed(1 + device.rank)
    length = case.rows // SEQUENCES
    is_response_N = (torch.arange(case.rows) % length) >= round((1 - case.response_share) * length)
    num_dead = round(case.dead_share * SEQUENCES)
    is_dead_S = torch.arange(SEQUENCES) * num_dead % SEQUENCES < num_dead
    advantage_S = torch.linspace(-1, 1, SEQUENCES) / is_response_N.sum()
    gradient_N = advantage_S.where(~is_dead_S, 0.0).repeat_interleave(length).where(is_response_N, 0.0)
    return Inputs(
        hidden_mH=hidden_NH.chunk(device.world_size)[device.rank].clone().requires_grad_(),
        weight_VpH=make_weight(case.vocab // device.world_size, case.hidden, device, rng),
        targets_N=targets_N,
        scored_targets_N=targets_N.cpu().where(is_response_N, IGNORED),
        d_log_probs_N=gradient_N.to(device.torch_device),
        group=dist.group.WORLD,
    )


def make_weight(rows: int, hidden: int, device: Device, rng: torch.Generator) -> Any:
    """Logits of hidden states with unit variance get a standard deviation of LOGIT_STD."""
    scale = LOGIT_STD / hidden**0.5
    weight_VpH: Any = torch.randn(rows, hidden, generator=rng, device=device.torch_device).mul_(scale).to(device.dtype)
    # Written to, not only reserved: on the CPU memory counts from its first use.
    weight_VpH.main_grad = torch.empty_like(weight_VpH, dtype=torch.float32).fill_(0)
    weight_VpH.grad_added_to_main_grad = False
    return weight_VpH.requires_grad_()


def backward(inputs: Inputs, log_probs_N: Tensor) -> None:
    """Backward that leaves the gradient of the weight in main_grad, as Megatron's backward hook does."""
    weight_VpH = inputs.weight_VpH
    inputs.hidden_mH.grad, weight_VpH.grad_added_to_main_grad = None, False
    log_probs_N.backward(inputs.d_log_probs_N.to(log_probs_N.dtype))
    if weight_VpH.grad is not None and not weight_VpH.grad_added_to_main_grad:
        weight_VpH.main_grad.add_(weight_VpH.grad)
    weight_VpH.grad = None


class Collectives(TorchDispatchMode):
    """Calls and bytes of what reaches the process group."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen[func._opname.strip("_").removesuffix("_base")] += 1
            self.seen["bytes"] += max(map(_bytes, args))
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.itemsize
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0


def deviations(inputs: Inputs, log_probs: LogProbs) -> dict[str, float]:
    """|x - x64| / |x64| of log-probs and gradients, x64 from log_softmax of the whole logits in float64."""

    def whole(part: Tensor) -> Any:
        parts = [torch.empty_like(part) for _ in range(inputs.group.size())]
        dist.all_gather(parts, part.contiguous(), group=inputs.group)
        return torch.cat(parts).double()

    inputs.weight_VpH.main_grad.zero_()
    log_probs_N = log_probs(inputs)
    backward(inputs, log_probs_N)
    assert inputs.hidden_mH.grad is not None
    d_hidden_NH, d_weight_VH = whole(inputs.hidden_mH.grad), whole(inputs.weight_VpH.main_grad)
    hidden_NH, weight_VH = (whole(x.detach()).requires_grad_() for x in (inputs.hidden_mH, inputs.weight_VpH))
    exact_N = (hidden_NH @ weight_VH.T).log_softmax(-1).gather(1, inputs.targets_N[:, None])[:, 0]
    exact_N.backward(inputs.d_log_probs_N.double())
    is_scored_N = (inputs.scored_targets_N != IGNORED).to(exact_N.device)
    pairs = {
        "log-probs": (log_probs_N.where(is_scored_N, 0.0), exact_N.where(is_scored_N, 0.0)),
        "gradient of hidden": (d_hidden_NH, hidden_NH.grad),
        "gradient of weight": (d_weight_VH, weight_VH.grad),
    }
    return {name: float((x - exact).norm() / exact.norm()) for name, (x, exact) in pairs.items()}


class Unfit(Exception):
    """A method has no numbers here; the message says why."""


def open_method(name: str, case: Case, device: Device, inputs: Inputs) -> LogProbs:
    """Opens a method for these inputs, where it is right on a small shape.

    Raises:
        Unfit: the method cannot run here, or its results are wrong.
    """
    method = METHODS[name]
    missing = method.missing(device.torch_device, case.ranks)
    if missing:
        raise Unfit(missing)
    small = make_inputs(replace(case, rows=min(case.rows, 128), vocab=min(case.vocab, 1024)), device)
    log_probs = method.open(small)
    found = deviations(small, log_probs)
    if max(found.values()) > max(TOLERANCE[dtype] for dtype in (method.gradients, device.dtype)):
        raise Unfit("wrong: " + ", ".join(f"{what} off by {x:.0e}" for what, x in found.items()))
    return method.open(inputs)  # not `log_probs`: what ours keeps is sized by its inputs


def measure_times(case: Case, names: Sequence[str], turns: int) -> dict[str, dict[str, Any]]:
    """By method: status, seconds of each turn, calls and bytes of collectives. On an accelerator also its memory, at
    the second step: kernels are tuned at the first."""
    device, inputs = open_case(case)
    results: dict[str, dict[str, Any]] = {}
    opened: dict[str, LogProbs] = {}
    for name in names:
        try:
            log_probs = open_method(name, case, device, inputs)
            results[name] = {"status": "ok", "seconds": [], "collectives": first_step(inputs, log_probs)}
            if not device.on_cpu:
                results[name]["peak_extra_mib"] = step_memory(device, inputs, log_probs)
            opened[name] = log_probs
        except Exception as error:
            if METHODS[name].is_ours:
                raise
            reason = str(error).split("\n")[0][:120]
            results[name] = {"status": reason if isinstance(error, Unfit) else f"{type(error).__name__}: {reason}"}
    for turn in range(turns):
        order = list(opened)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            dist.barrier()
            device.synchronize()
            start_s = time.perf_counter()
            backward(inputs, opened[name](inputs))
            device.synchronize()
            results[name]["seconds"].append(time.perf_counter() - start_s)
    return results


def first_step(inputs: Inputs, log_probs: LogProbs) -> dict[str, dict[str, int]]:
    """Its collectives. A group of one rank exchanges nothing, though some methods call collectives."""
    with Collectives() as ahead:
        log_probs_N = log_probs(inputs)
    with Collectives() as behind:
        backward(inputs, log_probs_N)
    alone = inputs.group.size() == 1
    return {} if alone else {"forward": dict(ahead.seen), "backward": dict(behind.seen)}


def measure_memory(case: Case, name: str) -> float:
    """`step_memory` in a fresh process, after a tiny step that triggers the libraries' own allocations."""
    device, inputs = open_case(case)
    log_probs = METHODS[name].open(inputs)
    tiny = make_inputs(replace(case, rows=SEQUENCES, hidden=16, vocab=64), device)
    backward(tiny, log_probs(tiny))
    del tiny
    return step_memory(device, inputs, log_probs)


def step_memory(device: Device, inputs: Inputs, log_probs: LogProbs) -> float:
    """Peak MiB of a forward and backward above those in use before."""
    inputs.hidden_mH.grad = None
    device.synchronize()
    device.restart_peak_memory()
    before_gib = device.memory_gib()
    backward(inputs, log_probs(inputs))
    device.synchronize()
    return (device.peak_memory_gib() - before_gib) * 1024


def measure_errors(case: Case, names: Sequence[str], responses: int) -> dict[str, float]:
    """By method: the largest error of a mean log-ratio."""
    device, inputs = open_case(case)
    rng = torch.Generator(device.torch_device).manual_seed(2)
    old_VH = inputs.weight_VpH.detach()
    # Logits move by about 0.02.
    update_VH = torch.randn(old_VH.shape, generator=rng, device=device.torch_device).mul_(0.02 / case.hidden**0.5)
    new_VH = (old_VH + update_VH).to(device.dtype)
    del update_VH
    drawn = [make_response(case, old_VH, rng) for _ in range(responses)]

    def mean_log_ratios(log_probs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        def means(weight_VH: Tensor) -> Tensor:
            return torch.stack([log_probs(hidden, weight_VH, targets).double().mean() for hidden, targets in drawn])

        return means(new_VH) - means(old_VH)

    with torch.no_grad():
        exact = mean_log_ratios(log_probs_in_float64)
        return {name: float((mean_log_ratios(scorer(name, inputs)) - exact).abs().max()) for name in names}


def make_response(case: Case, weight_VH: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states, [RESPONSE_TOKENS, H], and targets whose logits exceed the log-sum-exp of the rest by 0 to 4."""
    device = weight_VH.device
    targets_N = torch.randint(case.vocab, (RESPONSE_TOKENS,), generator=rng, device=device)
    hidden_NH = torch.randn(RESPONSE_TOKENS, case.hidden, generator=rng, device=device)
    lse_of_rest = torch.tensor(case.vocab).log() + LOGIT_STD**2 / 2
    z_y_N = lse_of_rest.to(device) + 4 * torch.rand(RESPONSE_TOKENS, generator=rng, device=device)
    weight_NH = weight_VH[targets_N].float()
    step_N = (z_y_N - (hidden_NH * weight_NH).sum(1)) / weight_NH.square().sum(1)
    return (hidden_NH + step_N[:, None] * weight_NH).to(weight_VH.dtype), targets_N


def log_probs_in_float64(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    weight_VH = weight_VH.double()
    parts = []
    for hidden_bH, targets_b in zip(hidden_NH.split(100), targets_N.split(100), strict=True):
        parts.append((hidden_bH.double() @ weight_VH.T).log_softmax(-1).gather(1, targets_b[:, None])[:, 0])
    return torch.cat(parts)


def scorer(name: str, inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    log_probs = METHODS[name].open(inputs)

    def score(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
        of_response = replace(inputs, hidden_mH=hidden_NH, weight_VpH=weight_VH, targets_N=targets_N)
        return log_probs(replace(of_response, scored_targets_N=targets_N.cpu()))

    return score
