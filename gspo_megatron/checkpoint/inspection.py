"""What the tensors of a Hugging Face folder become, and which are missing or of no use. Only headers are read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from gspo_megatron.checkpoint.hugging_face import HuggingFaceFolder
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.models.names import NameRule
from gspo_megatron.models.shape import ModelShape

INDEX = re.compile(r"\{(\w+)\}")


@dataclass
class Row:
    """The tensors that a rule makes of those of the folder, with these sizes.

    Attributes:
        rule: which.
        ours, theirs: sizes.
        count: how many of ours.
        formats: number formats in the folder.
    """

    rule: NameRule
    ours: tuple[int, ...]
    theirs: tuple[tuple[int, ...], ...]
    count: int = 0
    formats: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Inspection:
    """
    Attributes:
        rows: what becomes what.
        parameters: in the folder, the experts' bias not counted.
        expected: of a model of config.json.
        missing: names that other layers or experts of the folder have, or of which only a part is there.
        extra: names that no part of the model has.
        unread: names that are left out on purpose: further prediction layers, what is computed.
        wrong: what does not fit together.
    """

    rows: list[Row]
    parameters: int
    expected: int
    missing: list[str]
    extra: list[str]
    unread: list[str]
    wrong: list[str]

    @property
    def whole(self) -> bool:
        return not (self.missing or self.extra or self.wrong) and self.parameters == self.expected


def inspect(folder: HuggingFaceFolder, shape: ModelShape, rules: Sequence[NameRule]) -> Inspection:
    rows: dict[tuple[NameRule, object], Row] = {}
    missing: list[str] = []
    wrong: list[str] = []
    known: set[str] = set()
    parameters = 0
    for rule in rules:
        for names in _instances(rule, folder, shape):
            known.update(names)
            if absent := [name for name in names if name not in folder.weights]:
                missing += absent
                continue
            stored = [folder.weights[name] for name in names]
            theirs = tuple(tuple(each.get_shape()) for each in stored)
            try:
                # Of tensors that stack a layer's experts, the operation is of one of them.
                one = [s[1:] if rule.stacks_experts else s for s in theirs]
                size = tuple(rule.op.to_ours([torch.empty(s, device="meta") for s in one], shape).shape)
            except RuntimeError:
                wrong.append(f"{', '.join(names)} of sizes {theirs} do not make one {rule.ours}")
                continue
            row = rows.setdefault((rule, theirs), Row(rule, size, theirs))
            row.count += 1
            row.formats |= {each.dtype for each in stored}
            parameters += 0 if rule.ours.endswith(".expert_bias") else torch.Size(size).numel()
    rest = sorted(folder.weights.keys() - known)
    unread = [name for name in rest if folder.is_skipped(name)]
    extra = [name for name in rest if name not in unread]
    expected = count_parameters(shape).total
    return Inspection(list(rows.values()), parameters, expected, sorted(missing), extra, unread, wrong)


def _instances(rule: NameRule, folder: HuggingFaceFolder, shape: ModelShape) -> Iterator[tuple[str, ...]]:
    """Their names for each layer and expert to which the rule applies: those with a tensor in the folder, all experts
    of such a layer, and all layers of its kind (with experts, or without)."""
    layers: dict[int, set[int]] = defaultdict(set)
    alone = False
    for template in rule.theirs:
        pattern = re.compile(INDEX.sub(r"(?P<\1>\\d+)", re.escape(template).replace(r"\{", "{").replace(r"\}", "}")))
        for name in folder.weights:
            if match := pattern.fullmatch(name):
                found = {key: int(value) for key, value in match.groupdict().items()}
                alone |= not found
                if found.get("layer", shape.num_layers) < shape.num_layers:
                    layers[found["layer"]].add(found.get("expert", 0))
    if alone:
        yield rule.theirs
    counted = count_parameters(shape).layers
    kinds = {counted[layer].num_experts for layer in layers}
    for layer, count in enumerate(counted):
        # What a layer without experts has as well belongs to all layers.
        if layers and count.num_experts in kinds:
            experts = range(count.num_experts) if "{expert}" in rule.ours else range(1)
            for expert in experts:
                yield tuple(name.format(layer=layer, expert=expert) for name in rule.theirs)
