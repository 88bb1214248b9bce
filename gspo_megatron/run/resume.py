"""How a run continues from a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gspo_megatron.base.batches import Position
from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.config.sections import Config


def changed_settings(state: dict[str, Any], config: Config) -> list[str]:
    """`optimizer.lr: 0.001, was 0.003` for every setting that decides the run's future and is not what it was.

    Raises CheckpointError where a step under way was begun with settings that cut its rollouts otherwise.
    """
    changed = []
    for section, was in state["config"].items():
        now = asdict(getattr(config, section))
        if section not in ("run", "parallel", "checkpoint", "logging"):
            changed += [f"{section}.{k}: {now[k]!r}, was {was[k]!r}" for k in now if k in was and was[k] != now[k]]
    if state["config"]["run"]["seed"] != config.run.seed:
        changed.append(f"run.seed: {config.run.seed}, was {state['config']['run']['seed']}")
    # What cuts a step's rollouts into updates, and which of them take part.
    cuts = (
        *("run.seed", "rollout.group_size", "rollout.prompts_per_step", "algorithm.updates_per_rollout"),
        *(
            "algorithm.variant",
            "algorithm.kl_coef",
            "algorithm.entropy_coef",
            "model.aux_loss_coef",
            "train.skip_zero_gradient",
        ),
    )
    if state["step"] and (wrong := [text for text in changed if text.startswith(cuts)]):
        raise CheckpointError(
            f"this checkpoint is inside a step that was begun with other settings ({'; '.join(wrong)}); put them back "
            "until the next step is saved, or load an earlier checkpoint"
        )
    return changed


def describe(position: Position) -> str:
    """`step 12 and 2 updates of the next`."""
    if not position.steps and not position.updates:
        return f"{position.warm_start} updates of the warm start"
    return f"step {position.steps}" + (f" and {position.updates} updates of the next" if position.updates else "")
