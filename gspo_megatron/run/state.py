"""The state of a run: everything that decides how it continues, apart from the policy and its optimizer.

Everything else is a function of the settings and the position: the order of prompts, the random number of every token,
mini-batches, the learning rate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gspo_megatron.base.batches import COLUMNS, NOTHING, Held, Position, Taken
from gspo_megatron.checkpoint.fields import (
    BY_COUNT,
    COUNT,
    COUNT_BY_NAME,
    COUNTS,
    FLAG,
    LIST,
    NUMBER,
    NUMBER_BY_NAME,
    NUMBERS,
    NUMBERS_BY_NAME,
    OBJECT,
    OBJECTS,
    TEXT,
    check_fields,
    optional,
)
from gspo_megatron.config.loading import RENAMED, to_yaml
from gspo_megatron.config.sections import Config
from gspo_megatron.run.best import Record
from gspo_megatron.run.step_state import StepSnapshot


@dataclass(frozen=True)
class GuardState:
    """What the guards remember.

    Attributes:
        grad_norms: of the last updates.
        skipped_in_a_row: how many updates, up to the last one, were left out.
        past, streaks: of the rules for steps (`Concerns`).
    """

    grad_norms: tuple[float, ...] = ()
    skipped_in_a_row: int = 0
    past: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    streaks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> GuardState:
        """Earlier versions saved the first two."""
        past = {name: tuple(values) for name, values in (saved.get("past") or {}).items()}
        return cls(tuple(saved["grad_norms"]), saved["skipped_in_a_row"], past, saved.get("streaks") or {})


@dataclass(frozen=True)
class SavedStep:
    """A step that was stopped between two updates: what `StepState.snapshot` returned, with the tensors of all
    processes."""

    about: Mapping[str, Any]
    shares: tuple[Mapping[str, Tensor], ...]


STATE = {
    "position": COUNTS,
    "began": FLAG,
    "config": OBJECTS,
    "config_sha256": TEXT,
    "guards": OBJECT,
    "step": optional(OBJECT),
    # Later than format 1.
    "taken": optional(OBJECT),
    "contents": optional(OBJECT),
    "warm_start_loss": optional(NUMBER),
    "records": optional(OBJECTS),
    "held": optional(OBJECT),
}
PARTS = {
    "guards": {
        "grad_norms": NUMBERS,
        "skipped_in_a_row": COUNT,
        "past": optional(NUMBERS_BY_NAME),
        "streaks": optional(COUNT_BY_NAME),
    },
    "taken": {"prompts": COUNT, "rollouts": COUNT, "curriculum": optional(BY_COUNT)},
    "contents": {"digests": OBJECT, "num_prompts": optional(COUNT)},
    "step": {"number": COUNT, "prompts": LIST, "rollouts": LIST, "updates": LIST, "noted": optional(NUMBER_BY_NAME)},
    "held": {"groups": LIST, "again": LIST},
}
"""The fields of a state in JSON, and of its objects."""
RECORD = {"value": NUMBER, "step": COUNT, "since": COUNT}


@dataclass(frozen=True)
class Contents:
    """What a run reads, known by its content and not by its name.

    Attributes:
        digests: of data, tokenizer and reward modules, by the setting that names them.
        num_prompts: of the training prompts; None where they are endless.
    """

    digests: Mapping[str, str]
    num_prompts: int | None


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds of a run.

    Attributes:
        position: how far the run has come.
        began: whether its first step has begun: the reference is frozen, and row 0 is written.
        settings: the settings that it ran with, by `section.key`.
        taken: what it has used up.
        contents: of what it reads; None in a checkpoint of an earlier version.
        guards: what the guards remember.
        step: the unfinished step, if any: this process's snapshot when saved, those of all processes when loaded.
        warm_start_loss: of the last update of a warm start.
        records: the best evaluation so far, by metric.
        held: what was sampled for steps to come.
    """

    position: Position
    began: bool
    settings: Mapping[str, Any]
    guards: GuardState
    taken: Taken = NOTHING
    contents: Contents | None = None
    step: StepSnapshot | SavedStep | None = None
    config_sha256: str = ""
    warm_start_loss: float | None = None
    records: Mapping[str, Record] = field(default_factory=dict)
    held: Held | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        position: Position,
        *,
        began: bool,
        guards: GuardState,
        step: StepSnapshot | None,
        taken: Taken = NOTHING,
        contents: Contents | None = None,
        warm_start_loss: float | None = None,
        records: Mapping[str, Record] | None = None,
        held: Held | None = None,
    ) -> RunState:
        return cls(
            position,
            began,
            settings_of(asdict(config)),
            guards,
            taken,
            contents,
            step,
            config_sha256=hashlib.sha256(to_yaml(config).encode()).hexdigest(),
            warm_start_loss=warm_start_loss,
            records=dict(records or {}),
            held=held,
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers and text. JSON keeps every bit of a float64."""
        config: dict[str, dict[str, Any]] = {}
        for name, value in self.settings.items():
            section, _, key = name.partition(".")
            config.setdefault(section, {})[key] = value
        return {
            "position": list(self.position),
            "began": self.began,
            "config": config,
            "config_sha256": self.config_sha256,
            "guards": asdict(self.guards),
            "taken": self.taken._asdict(),
            "contents": None if self.contents is None else asdict(self.contents),
            "warm_start_loss": self.warm_start_loss,
            "records": {name: record._asdict() for name, record in self.records.items()},
            "step": None if self.step is None else self.step.about,
            "held": None if self.held is None else self.held.about,
        }

    def tensors(self) -> dict[str, Tensor]:
        """This process's share of what is too large for JSON."""
        of_step = self.step.tensors if isinstance(self.step, StepSnapshot) else {}
        held = self.held.tensors if self.held else {}
        return of_step | {HELD + name: tensor for name, tensor in held.items()}

    @classmethod
    def from_saved(cls, about: Mapping[str, Any], shares: Seq[Mapping[str, Tensor]]) -> RunState:
        """From what `to_json` wrote and the `tensors` of every process.

        Raises:
            CheckpointError: something is missing, or is not what it should be.
        """
        where = "run.json, state"
        check_fields(about, STATE, where)
        for name, fields in PARTS.items():
            if about.get(name) is not None:
                check_fields(about[name], fields, f"{where}, {name}")
        records = about.get("records") or {}
        for name, record in records.items():
            check_fields(record, RECORD, f"{where}, records, {name}")
        step = about.get("step")
        if step is not None and "advantages" in step:
            step, shares = _step_of_format_1(step)
        held, shares = _held(about.get("held"), shares)
        position = Position(*about["position"])
        settings = {RENAMED.get(name, name): value for name, value in settings_of(about["config"]).items()}
        # A checkpoint of an earlier version lacks what is read by `get`.
        taken, contents = about.get("taken"), about.get("contents")
        return cls(
            position,
            about["began"],
            settings,
            GuardState.from_json(about["guards"]),
            Taken(taken["prompts"], taken["rollouts"], taken.get("curriculum") or {})
            if taken
            else taken_until(position, settings, inside=step is not None),
            Contents(contents["digests"], contents.get("num_prompts")) if contents else None,
            None if step is None else SavedStep(step, tuple(shares)),
            about["config_sha256"],
            about.get("warm_start_loss"),
            {name: Record(**{key: record[key] for key in RECORD}) for name, record in records.items()},
            held,
        )


HELD = "held."
"""Before the names of tensors that `Held` has, where they stand with those of a step."""


def _held(
    about: Mapping[str, Any] | None, shares: Seq[Mapping[str, Tensor]]
) -> tuple[Held | None, list[Mapping[str, Tensor]]]:
    """What a source had, and the shares of the step without it."""
    own = {name.removeprefix(HELD): t for share in shares for name, t in share.items() if name.startswith(HELD)}
    others = [{name: t for name, t in share.items() if not name.startswith(HELD)} for share in shares]
    return (Held(about, own) if about is not None else None), list(others)


def taken_until(position: Position, settings: Mapping[str, Any], *, inside: bool) -> Taken:
    """What a run of these settings has used up, if they never changed. `inside`: whether it is in the step after
    position.steps."""
    names = ("rollout.prompts_per_step", "rollout.group_size", "train.warm_start_batch")
    check_fields(dict(settings), dict.fromkeys(names, COUNT), "run.json, state, config")
    steps, prompts = position.steps + inside, settings["rollout.prompts_per_step"]
    of_warm_start = position.warm_start * settings["train.warm_start_batch"]
    return Taken(of_warm_start + steps * prompts, (1 + steps) * prompts * settings["rollout.group_size"])


def settings_of(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`{"train": {"steps": 3}}` -> `{"train.steps": 3}`."""
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def _step_of_format_1(step: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Converts a step of checkpoint format 1, which had every token in JSON."""
    prompts = [
        prompt["tokens"] for prompt, rollouts in zip(step["prompts"], step["rollouts"], strict=True) for _ in rollouts
    ]
    drawn = [rollout for rollouts in step["rollouts"] for rollout in rollouts]
    lengths = torch.tensor([len(p) + len(r["tokens"]) for p, r in zip(prompts, drawn, strict=True)])
    trained = [torch.arange(n) >= len(p) for n, p in zip(lengths.tolist(), prompts, strict=True)]
    share = {
        "first_sequence": torch.tensor([0]),
        "lengths_S": lengths,
        "advantages_S": torch.tensor(step["advantages"], dtype=torch.float64),
        "tokens_L": torch.tensor([t for p, r in zip(prompts, drawn, strict=True) for t in (*p, *r["tokens"])]),
        "trained_L": torch.cat(trained),
        "sampler_log_probs_R": torch.tensor([p for r in drawn for p in r["log_probs"]], dtype=torch.float64),
    }
    starts = (lengths.cumsum(0) - lengths).tolist()
    for name in COLUMNS:
        known = [i for i, values in enumerate(step.get(name, ())) if values is not None]
        if known:
            places = [starts[i] + trained[i].nonzero().flatten() for i in known]
            share[f"{name}.places"] = torch.cat(places)
            share[f"{name}.values"] = torch.tensor([v for i in known for v in step[name][i]], dtype=torch.float64)
    for rollout in drawn:
        del rollout["tokens"], rollout["log_probs"]
    kept = {key: step[key] for key in ("number", "prompts", "rollouts", "updates")}
    return kept, [share]
