"""What one rank of a large run holds, without its memory and without the other ranks.

The policy is built as in a run, from torch's fake tensors, which have a shape, a format and a device and no elements,
over its fake process group, whose collectives return at once. So any rank of any layout fits one small process, and
what is found is Megatron's and this package's own bookkeeping: names, slices, buffers, optimizer state, and which rank
writes which elements of a checkpoint.

    contents = DryBuild(config, layout, torch.device("cpu"), use_te=False).rank(5)

Nothing can be computed: a fake tensor has no numbers.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from gspo_megatron.checkpoint.place import Place
from gspo_megatron.checkpoint.shards import Shard
from gspo_megatron.config.sections import Config
from gspo_megatron.device import DTYPES, Device
from gspo_megatron.layout.layout import Layout
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.model import mcore_random
from gspo_megatron.mcore.parameters import named_tensors
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.mcore.saving import MegatronCheckpoints
from gspo_megatron.mcore.weights import Source, sources_of
from gspo_megatron.models.families import family_of
from gspo_megatron.run.algorithm import Algorithm


@dataclass(frozen=True)
class RankContents:
    """What a rank holds.

    Attributes:
        rank, stage: of all processes, and among the pipeline stages.
        parameters: the size of every parameter's slice by its place in the whole model.
        written: (key, shard) of everything that it writes into a checkpoint.
        sources: the slices that it would send to whoever wants whole tensors.
        num_bytes: of all tensors on its device, by purpose: weights, gradients, optimizer, reference; other, what
            serves none of these.
        optimizers: the classes of the optimizers that update it.
    """

    rank: int
    stage: int
    parameters: Mapping[Place, tuple[int, ...]]
    written: tuple[tuple[str, Shard], ...]
    sources: Mapping[Place, Source]
    num_bytes: Mapping[str, int]
    optimizers: frozenset[str]

    def num_parameters(self) -> tuple[int, int]:
        """(dense, expert): elements of its parameters."""
        experts = sum(prod(size) for place, size in self.parameters.items() if ".experts." in place.name)
        return sum(map(prod, self.parameters.values())) - experts, experts


@dataclass(frozen=True)
class DryBuild:
    """Builds ranks of a run whose settings are checked and whose vocabulary size is known. On `device` nothing is
    allocated."""

    config: Config
    layout: Layout
    device: torch.device
    use_te: bool

    def rank(self, rank: int) -> RankContents:
        """Builds one rank's policy as a run does, and its reference where the algorithm has one."""
        with self._policy(rank) as policy:
            shape, groups = self.config.model.shape, policy.groups
            held = {place: x for chunk in policy.model for place, x in named_tensors(chunk, shape, groups)}
            checkpoints = MegatronCheckpoints(policy, None, print)  # type: ignore[arg-type]  # nothing is written
            return RankContents(
                rank,
                groups.pp_rank,
                {place: tuple(x.shape) for place, x in held.items() if isinstance(x, torch.nn.Parameter)},
                tuple((key, shard) for key, shard, _ in checkpoints.to_write()),
                sources_of(held, groups),
                _num_bytes(policy, self.device),
                frozenset(_class_of(part.optimizer) for part in policy.optimizer.chained_optimizers),
            )

    def whole_weights(self, told: Sequence[Mapping[Place, Source]]) -> dict[str, tuple[int, ...]]:
        """The size of every tensor that `Policy.weights` gives on rank 0, by its name on the hub. `told`: the sources
        of all ranks, in order.

        Raises:
            KeyError: a slice is on no rank.
        """
        with self._policy(0) as policy, patch.object(dist, "all_gather_object", _heard(told)):
            return {name: tuple(x.shape) for name, x in policy.weights(family_of(self.config.model.shape).rules)}

    @contextmanager
    def _policy(self, rank: int) -> Iterator[MegatronPolicy]:
        here = Device(self.device, "fake", DTYPES[self.config.precision.dtype], self.layout.world_size, rank)
        algorithm = Algorithm.of(self.config)
        gc.collect()  # modules refer to each other in circles, and `other` would count those of the rank before
        with fake_world(here), FakeTensorMode(allow_non_fake_inputs=True):
            groups = Groups(self.layout, self.device)
            compat.apply_patches(here.on_cpu)
            policy = MegatronPolicy(self.config, groups, here, self.use_te, algorithm.scoring)
            policy.begin(with_reference=algorithm.needs_reference)
            yield policy
            groups.close()


@contextmanager
def fake_world(device: Device) -> Iterator[None]:
    """The process group of one rank without the others; and what fake tensors and fake collectives cannot do, done
    otherwise."""
    dist.init_process_group(device.backend, store=FakeStore(), rank=device.rank, world_size=device.world_size)
    with ExitStack() as stack:
        for owner, name, replacement in (
            (dist, "all_gather_object", _own_object),
            (torch.nn.Module, "to", _moved),
            # Compares two random states, which fake tensors cannot.
            (mcore_random.CudaRNGStatesTracker, "fork", _no_fork),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _own_object(into: list[Any], mine: Any, group: Any = None) -> None:
    """Every rank says what this one says."""
    into[:] = [mine] * len(into)


def _heard(told: Sequence[Any]) -> Callable[..., None]:
    """Every rank says its own part of `told`."""

    def gather(into: list[Any], mine: Any, group: Any = None) -> None:
        into[:] = told

    return gather


def _moved(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Module.to for fake tensors: torch's own swaps each parameter with its copy, which the weak references of their
    hooks forbid. Here a parameter that is elsewhere gets a successor with the same attributes."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.device.type != device.type:
                moved = torch.nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                fake_only = vars(torch.empty(0))
                moved.__dict__.update({key: x for key, x in vars(parameter).items() if key not in fake_only})
                part._parameters[name] = moved
    return module


@contextmanager
def _no_fork(tracker: Any, name: Any = None) -> Iterator[None]:
    yield


def _class_of(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


# --- memory ---


def _num_bytes(policy: MegatronPolicy, device: torch.device) -> dict[str, int]:
    """Bytes of the storages on `device` by purpose. A storage counts for the first purpose that it serves."""
    parameters = [p for chunk in policy.model for p in chunk.parameters()]
    optimizers = [part.optimizer for part in policy.optimizer.chained_optimizers]
    of_optimizers = [
        x
        for adam in optimizers
        for x in (
            *(p for group in adam.param_groups for p in group["params"]),
            *(x for state in adam.state.values() for x in state.values() if isinstance(x, Tensor)),
        )
    ]
    tensors: dict[str, Iterable[Tensor]] = {
        "weights": parameters,
        "gradients": [p.main_grad for p in parameters],
        "optimizer": of_optimizers,
        "reference": [p for chunk in policy.reference or [] for p in chunk.parameters()],
        "other": [x for x in gc.get_objects() if isinstance(x, FakeTensor)],
    }
    counted: set[int] = set()
    sizes = {}
    for purpose, those in tensors.items():
        storages = {s._cdata: s.nbytes() for x in those if x.device == device for s in [x.untyped_storage()]}
        sizes[purpose] = sum(size for storage, size in storages.items() if storage not in counted)
        counted |= storages.keys()
    return sizes


# --- what all ranks write together ---


@dataclass
class Coverage:
    """Which elements of which tensors the ranks write, over all ranks added so far."""

    _shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    _written: dict[str, list[tuple[int, int, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, written: Iterable[tuple[str, Shard]]) -> None:
        """Adds one rank's part."""
        for key, shard in written:
            first = self._shapes.setdefault(key, shard.shape)
            assert first == shard.shape, f"{key} is {first} on one rank and {shard.shape} on another"
            self._written[key] += [(r.row, r.column, r.num_rows, r.num_columns) for r in shard.rectangles()]

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Key -> (rows, columns) of the whole matrix; a vector has one column."""
        return self._shapes

    def faults(self) -> list[str]:
        """Tensors of which elements are missing, or are written more than once."""
        return [fault for key, shape in self._shapes.items() if (fault := _fault(key, shape, self._written[key]))]


def _fault(key: str, shape: tuple[int, int], rectangles: list[tuple[int, int, int, int]]) -> str | None:
    """Rectangles without a common element, whose elements are as many as the matrix has, and all in it, cover it
    exactly once."""
    r = np.array(rectangles, dtype=np.int64).reshape(-1, 4)
    start, end = r[:, :2], r[:, :2] + r[:, 2:]
    if (start < 0).any() or (end > shape).any():
        return f"{key} is {shape}, and elements outside of it are written"
    # [n, n]: whether two rectangles share rows, and share columns.
    shares = (np.maximum(start[:, None], start[None]) < np.minimum(end[:, None], end[None])).all(-1)
    if twice := int(shares.sum() - len(r)) // 2:
        return f"{key} is written more than once, {twice} pairs of shards overlap"
    missing = shape[0] * shape[1] - int(r[:, 2:].prod(1).sum())
    return f"{key} lacks {missing:,} elements" if missing else None
