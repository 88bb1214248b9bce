"""The loss functions of TRL and verl, as installed in .venv-trl, on padded batches.

TRL's are methods that are called with an object that has what they ask for. verl's modules import Ray and others that
it does not need for arithmetic, so its functions are compiled from the installed source, alone.
"""

from __future__ import annotations

import ast
import math
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Padded(NamedTuple):
    """Responses as peers want them: [S, longest], with a mask of the tokens."""

    new: Tensor
    old: Tensor
    ref: Tensor
    sampler: Tensor
    mask: Tensor
    advantages: Tensor


def padded(values_R: Tensor, lengths: list[int]) -> Tensor:
    """[R] -> [S, longest], zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(values_R.split(lengths), batch_first=True)


# --- verl ---


def _lifted(file: str, names: set[str], known: dict[str, Any]) -> dict[str, Any]:
    """The functions and constants `names` of a file of verl, without what decorates or annotates them."""
    found = find_spec("verl")
    assert found is not None and found.submodule_search_locations
    path = Path(found.submodule_search_locations[0], file)
    kept = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list, node.returns = [], None
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            kept.append(node)
        elif isinstance(node, ast.Assign) and {t.id for t in node.targets if isinstance(t, ast.Name)} & names:
            kept.append(node)
    exec(compile(ast.Module(kept, []), str(path), "exec"), known)
    assert names <= known.keys(), names - known.keys()
    return known


class ActorConfig(SimpleNamespace):
    """verl's settings of a policy loss; `get` as its own has it."""

    global_batch_info: ClassVar[dict[str, Any]] = {}

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def verl() -> SimpleNamespace:
    """verl's policy losses by name, and its advantages, KL estimates and correction weights."""
    sums = _lifted(
        "utils/torch_functional.py", {"masked_sum", "masked_mean", "masked_var", "masked_whiten"}, {"torch": torch}
    )
    common = {
        "torch": torch,
        "np": np,
        "math": math,
        "Any": Any,
        "defaultdict": defaultdict,
        "verl_F": SimpleNamespace(**sums),
        "ActorConfig": ActorConfig,
        "AlgoConfig": type(None),
        "Optional": Any,
    }
    losses = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "geo_mean", "cispo", "dro")
    advantages = ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
    core = _lifted(
        "trainer/ppo/core_algos.py",
        {
            *(f"compute_policy_loss_{name}" for name in losses),
            *(f"compute_{name}_outcome_advantage" for name in advantages),
            *("agg_loss", "kl_penalty", "kl_penalty_forward"),
        },
        common,
    )
    correction = _lifted(
        "trainer/ppo/rollout_corr_helper.py",
        {"SAFETY_BOUND", "_parse_rollout_is_threshold", "compute_rollout_correction_weights", "compute_is_metrics"},
        dict(common),
    )
    return SimpleNamespace(
        losses={name: core[f"compute_policy_loss_{name}"] for name in losses},
        advantages={name: core[f"compute_{name}_outcome_advantage"] for name in advantages},
        kl_penalty=core["kl_penalty"],
        correction=correction["compute_rollout_correction_weights"],
    )


# --- TRL ---


class OneProcess:
    """TRL's accelerator, of one process."""

    num_processes = 1

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


class TrlArgs(SimpleNamespace):
    delta = None
    use_bias_correction_kl = False
    sapo_temperature_pos, sapo_temperature_neg = 1.0, 1.05
    vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg = 2.0, 3.0, 3.0, 2.0
    steps_per_generation = 1


def trl_loss(batch: Padded, loss_type: str, *, trainer: Callable[[], type] | None = None, **settings: Any) -> Tensor:
    """`GRPOTrainer._compute_loss` of one batch in one step. `settings`: attributes of the trainer or of its args."""
    from trl import GRPOTrainer

    kind = trainer() if trainer else GRPOTrainer
    of_args = {name: settings.pop(name) for name in list(settings) if hasattr(TrlArgs, name)}
    me = SimpleNamespace(
        loss_type=loss_type,
        args=TrlArgs(**of_args),
        accelerator=OneProcess(),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.new, torch.zeros_like(batch.new), None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        **{
            **{"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0},
            **{"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False},
            **{"vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1},
            **{"max_completion_length": 3000, "_entropy_bonus_enabled": False, "aux_loss_enabled": False},
            **settings,
        },
    )
    ids = torch.zeros(batch.new.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "old_logps": (batch.old * batch.mask).sum(1),
        "ref_per_token_logps": batch.ref,
        "sampling_per_token_logps": batch.sampler,
        "num_items_in_batch": batch.mask.sum(),
    }
    return kind._compute_loss(me, None, inputs)
