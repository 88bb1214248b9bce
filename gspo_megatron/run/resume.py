"""Where a run starts: from the beginning, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gspo_megatron.base.batches import Position, Taken
from gspo_megatron.base.errors import CheckpointError, plural
from gspo_megatron.checkpoint.names import CHECKPOINTS
from gspo_megatron.config.sections import Config
from gspo_megatron.data.order import position_in
from gspo_megatron.models.shape import ModelShape
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.state import Contents, RunState, settings_of

FREE_SECTIONS = ("run", "parallel", "checkpoint", "logging")
"""Sections of settings that do not decide the rest of a run, and may change when it continues."""
CUTTING = (
    "run.seed",
    "rollout.group_size",
    "rollout.prompts_per_step",
    "algorithm.updates_per_rollout",
    "algorithm.variant",
    "algorithm.kl_coef",
    "algorithm.kl_in",
    "algorithm.entropy_coef",
    "algorithm.routing_replay",
    "algorithm.router_shift_floor",
    "model.aux_loss_coef",
    "train.skip_zero_gradient",
    "rollout.temperature",
    *(f"model.{field.name}" for field in fields(ModelShape)),
)
"""Settings that decide how a step's rollouts are split into updates and which of them take part, and those that the old
log-probs of an unfinished step were computed with."""
OF_THE_WARM_START = ("train.warm_start_steps", "train.warm_start_batch", "train.warm_start_lr")
"""Settings without effect once the first step has begun."""


@dataclass(frozen=True)
class Continuation:
    """Where a run starts.

    Attributes:
        state: the state it continues from; None for a new run.
        own: whether `state` is from this run's own directory. Otherwise what an earlier run left there is moved aside.
        is_newest: whether `state` is the newest there. Any other is saved again, so that it becomes the newest.
        changed: settings that differ from the saved ones, as `optimizer.lr: 0.001, was 0.003`.
        taken: what the run has used up; None for a new run.
        other_contents: what to warn of: data, a tokenizer or a reward that has changed under the same name.
    """

    state: RunState | None = None
    own: bool = False
    is_newest: bool = False
    changed: tuple[str, ...] = ()
    taken: Taken | None = None
    other_contents: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        state: RunState | None,
        config: Config,
        algorithm: Algorithm,
        *,
        has_reference: bool,
        contents: Contents,
    ) -> Continuation:
        """From the state that checkpoint.load named; `has_reference`: whether a reference policy was loaded with it;
        `contents`: of what this run reads.

        Raises:
            CheckpointError: the settings need something that the checkpoint lacks, would split its unfinished step
                differently, or have another algorithm.variant.
        """
        if state is None:
            return cls()
        if state.began and algorithm.needs_reference and not has_reference:
            raise CheckpointError(
                f"checkpoint.load={config.checkpoint.load}: that run had no reference policy, so algorithm.kl_coef "
                "above 0 has nothing to compare with; set algorithm.kl_coef=0, or start from the beginning with "
                "checkpoint.load=none"
            )
        load = config.checkpoint.load
        in_own_directory = Path(load).resolve().parent == (Path(config.run.dir) / CHECKPOINTS).resolve()
        changed = tuple(changed_settings(state, config))
        other = next((text for text in changed if text.startswith("algorithm.variant: ")), None)
        if state.began and other and not config.checkpoint.allow_other_variant:
            raise CheckpointError(
                f"checkpoint.load={load}: its run has another objective ({other}); restore it, start a run of its own "
                "with checkpoint.load=none, or set checkpoint.allow_other_variant=true to go on with this one"
            )
        taken, news = taken_from(state, config, contents)
        return cls(
            state,
            own=load == "latest" or in_own_directory,
            is_newest=load == "latest",
            changed=changed,
            taken=taken,
            other_contents=(*changed_contents(state, config, contents), *news),
        )

    @property
    def first_step(self) -> int:
        """The first step whose row of metrics is still to be written."""
        return self.state.position.steps + 1 if self.state and self.state.began else 0

    def messages(self, config: Config) -> Iterator[str]:
        """Lines that tell the user how the run starts."""
        load, steps = config.checkpoint.load, config.train.steps
        if self.state is None and load == "latest":
            yield (
                f"checkpoint.load=latest: nothing was saved in {Path(config.run.dir) / CHECKPOINTS}, so the run starts "
                "from the beginning"
            )
        if config.model.hf and self.state is None:
            yield f"the weights are those of {config.model.hf}"
        if self.state:
            if config.model.hf:
                yield f"the weights are those of the checkpoint, not of model.hf={config.model.hf}"
                if (before := self.state.settings.get("model.hf")) != config.model.hf:
                    yield (
                        f"model.hf was {before} when the run began; exports get config.json and tokenizer of the new "
                        "folder; to train the new folder's weights, start a run of its own: checkpoint.load=none and "
                        "another run.dir"
                    )
            yield f"continuing after {describe(self.state.position)}"
            if self.state.position.steps >= steps:
                yield f"train.steps={steps} are done: nothing is left to train; a larger train.steps continues the run"

    @property
    def fresh(self) -> bool:
        """Whether what an earlier run left in the directory is moved aside."""
        return not (self.state and self.own)


def changed_settings(state: RunState, config: Config) -> list[str]:
    """`optimizer.lr: 0.001, was 0.003` for every changed setting that decides the rest of the run.

    Raises:
        CheckpointError: the state is inside a step that began with settings that split its rollouts differently.
    """
    now: Mapping[str, Any] = settings_of(asdict(config))
    changed = {
        name: f"{name}: {value!r}, was {state.settings[name]!r}{_without_effect(name, state)}"
        for name, value in now.items()
        if name in state.settings
        and state.settings[name] != value
        and (name == "run.seed" or name.partition(".")[0] not in FREE_SECTIONS)
    }
    wrong = [text for name, text in changed.items() if name in CUTTING]
    if state.step is not None and wrong:
        raise CheckpointError(
            f"this checkpoint is inside a step that began with other settings ({'; '.join(wrong)}); restore them "
            "until the next step is saved, or load an earlier checkpoint"
        )
    return list(changed.values())


def _without_effect(name: str, state: RunState) -> str:
    return " (without effect: the warm start is over)" if state.began and name in OF_THE_WARM_START else ""


def changed_contents(state: RunState, config: Config, contents: Contents) -> Iterator[str]:
    """What has another content than when the run was saved, and the same name."""
    if state.contents is None:
        return
    settings = settings_of(asdict(config))
    for name, digest in contents.digests.items():
        then = state.contents.digests.get(name, digest)
        if then != digest and settings.get(name) == state.settings.get(name):
            value = f"={settings[name]}" if name in settings else ""
            yield (
                f"{name}{value} is not what the run was saved with (SHA-256 {digest[:12]}, was {then[:12]}): the run "
                "goes on with what it finds now"
            )


def taken_from(state: RunState, config: Config, contents: Contents) -> tuple[Taken, list[str]]:
    """What the run has used up, in the order of prompts that this run has, and what to say about it: another number of
    prompts, or another seed, is another order, which begins with an epoch of its own."""
    if state.contents and state.contents.digests.get("data.train") != contents.digests.get("data.train"):
        state = replace(state, taken=state.taken._replace(curriculum={}))  # what it remembers is of other prompts
    now = contents.num_prompts
    then = state.contents.num_prompts if state.contents else now
    same_seed = config.run.seed == state.settings.get("run.seed", config.run.seed)
    if now is None or (now == then and same_seed):
        return state.taken, []
    taken = state.taken._replace(prompts=position_in(now, state.taken.prompts, then))
    why = f"run.seed={config.run.seed} is another order of the prompts"
    if now != then:
        before = "endless ones" if then is None else f"{then:,}"
        why = f"data.train={config.data.train} has {plural(now, 'prompt')}, and had {before} when the run was saved"
    return taken, [f"{why}: the next step begins epoch {taken.prompts // now + 1}"]


def describe(position: Position) -> str:
    """`step 12 and 2 updates of the next`."""
    if not position.steps and not position.updates:
        return f"{plural(position.warm_start, 'update')} of the warm start"
    return f"step {position.steps}" + (
        f" and {plural(position.updates, 'update')} of the next" if position.updates else ""
    )
