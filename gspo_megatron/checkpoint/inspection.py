"""What the weights of a Hugging Face folder become, and which are missing, of no use or of another size. Only headers
are read, so a folder of any size is looked at before anything is built."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.checkpoint.hugging_face import HuggingFaceFolder
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.models.families import family_of
from gspo_megatron.models.names import NameRule
from gspo_megatron.models.shape import ModelShape
from gspo_megatron.models.tensors import names_on_hub, sizes_of

SHOWN = 3
"""Names of a kind that a message lists."""


@dataclass(frozen=True)
class Row:
    """The tensors of a rule.

    Attributes:
        theirs: sizes in the folder, in the order of the rule's names.
        expected, found: how many of each name the model has, and how many are in the folder and fit.
        formats: number formats in the folder.
    """

    rule: NameRule
    theirs: tuple[tuple[int, ...], ...]
    expected: int
    found: int
    formats: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """
    Attributes:
        rows: what becomes what.
        parameters: of the folder that fit, the experts' bias not counted.
        expected: of a model of config.json.
        missing: names that the model has and the folder lacks.
        extra: names that no part of the model has.
        wrong: messages, each with file and name, about sizes and number formats.
        left_out: by reason, names that are not read on purpose.
    """

    rows: list[Row]
    parameters: int
    expected: int
    missing: list[str]
    extra: list[str]
    wrong: list[str]
    left_out: dict[str, list[str]]

    @property
    def whole(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What keeps the folder from being a model of its config.json."""
        lacks = [f"there is no {listed(self.missing)}, which config.json asks for"] if self.missing else []
        holds = [f"config.json does not describe {listed(self.extra)}"] if self.extra else []
        return [*lacks, *holds, *self.wrong]

    @property
    def notes(self) -> list[str]:
        """What is left out, and why."""
        return [f"left out: {listed(names)}: {reason}" for reason, names in self.left_out.items()]


def listed(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def inspect(folder: HuggingFaceFolder, shape: ModelShape) -> Inspection:
    """`shape`: of config.json."""
    rows: list[Row] = []
    missing: list[str] = []
    wrong: list[str] = []
    known: set[str] = set()
    parameters = 0
    for rule in family_of(shape).rules:
        every = list(names_on_hub(rule, shape))
        if not every:
            continue
        sizes, found, formats = sizes_of(rule, shape), 0, set()
        for names in every:
            known.update(names)
            missing += [name for name in names if name not in folder.weights]
            there = [(name, size) for name, size in zip(names, sizes, strict=True) if name in folder.weights]
            complaints = [each for name, size in there for each in _wrong(folder, name, size)]
            wrong += complaints
            formats |= {folder.weights[name].dtype for name, _ in there}
            if len(there) == len(names) and not complaints:
                found += 1
                counts = 0 if rule.ours.endswith(".expert_bias") else 1
                parameters += counts * sum(torch.Size(size).numel() for size in sizes)
        rows.append(Row(rule, sizes, len(every), found, tuple(sorted(formats))))
    extra: list[str] = []
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    for name in folder.weights.keys() - known:
        reason = folder.left_out(name)
        (left_out[reason] if reason else extra).append(name)
    return Inspection(
        rows,
        parameters,
        count_parameters(shape).total,
        missing,
        sorted(extra),
        wrong,
        {reason: sorted(names) for reason, names in sorted(left_out.items())},
    )


def _wrong(folder: HuggingFaceFolder, name: str, size: Sequence[int]) -> Iterator[str]:
    weight = folder.weights[name]
    if weight.get_shape() != list(size):
        yield f"{weight.stored[0].file.name}: {name} has size {weight.get_shape()}, not {list(size)} as in config.json"
    if unreadable := folder.unreadable(name):
        yield unreadable


def check_folder(folder: HuggingFaceFolder, shape: ModelShape) -> Inspection:
    """What `inspect` finds in a folder that is whole.

    Raises:
        CheckpointError: it is not.
    """
    found = inspect(folder, shape)
    if problems := found.problems:
        more = f"; and {len(problems) - SHOWN:,} more like that" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{folder.path} is not a whole {shape.family} model: {'; '.join(problems[:SHOWN])}{more}; download it "
            f"again, or see all of it: python -m gspo_megatron.convert inspect {folder.path}"
        )
    return found
