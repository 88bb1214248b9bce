"""precision.deterministic on a GPU: torch raises there at operations that have no deterministic form. None is used.

The list is that of `torch.use_deterministic_algorithms`, for CUDA tensors. A CPU has deterministic forms of most, so a
run on the CPU shows which operations are called, and not whether a GPU would refuse them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.train import main

REFUSED = {
    *("histc", "bincount", "median", "put_", "nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward"),
    *("_ctc_loss_backward", "grid_sampler_2d_backward", "_embedding_bag", "max_unpool2d", "avg_pool3d_backward"),
}
REFUSED_OF_FLOATS = {"cumsum", "cumsum_"}


class Recorder(TorchDispatchMode):
    """The names of the operations that run inside, and whether their first tensor is of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        floats = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        self.seen.add((func.overloadpacket.__name__, floats))
        return func(*args, **kwargs or {})


def refused(seen: set[tuple[str, bool]]) -> set[str]:
    return {name for name, floats in seen if name in REFUSED or (floats and name in REFUSED_OF_FLOATS)}


def recorded_run(arguments: list[str]) -> set[tuple[str, bool]]:
    with Recorder() as recorder:
        assert main(arguments) == 0
    return recorder.seen


@pytest.mark.parametrize(
    "settings",
    [
        ("rollout.top_p=0.9", "rollout.top_k=5", "algorithm.kl_coef=0.01", "train.warm_start_steps=1"),
        ("algorithm.entropy_coef=0.01", "precision.dtype=bf16", "parallel.recompute=full"),
    ],
)
def test_no_operation_of_a_run_is_one_that_a_gpu_refuses(settings: tuple[str, ...], tmp_path: Path) -> None:
    tiny = [
        *("precision.device=cpu", f"run.dir={tmp_path}", "model.num_layers=1", "model.hidden_size=16"),
        *("model.num_experts=4", "model.expert_ffn_size=16", "model.max_sequence_length=32", "train.steps=1"),
        *("data.eval_size=4", "rollout.prompts_per_step=4", "rollout.group_size=2", "logging.tensorboard=false"),
        *("rollout.max_new_tokens=8", "data.task.max_length=3", "precision.deterministic=true"),
    ]
    [seen] = run_distributed(recorded_run, 1, [*tiny, *settings], like_torchrun=True)
    assert {("mm", True), ("index_copy", True), ("cumsum", False)} <= seen, "the recorder sees little of the run"
    assert refused(seen) == set()


def test_the_recorder_sees_what_would_be_refused() -> None:
    with Recorder() as recorder:
        x = torch.rand(5, requires_grad=True)
        x.cumsum(0).sum().backward()
        x.detach().histc(3)
        torch.arange(3).cumsum(0)
    assert refused(recorder.seen) == {"cumsum", "histc"}
