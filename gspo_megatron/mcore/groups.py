"""Megatron's process groups for a layout, and the collectives that the trainer uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from gspo_megatron.base.errors import CheckpointError, DataError, EngineError, StopRequested
from gspo_megatron.config.sections import ParallelConfig
from gspo_megatron.layout.layout import Layout
from gspo_megatron.mcore.context_parallel import SumOverRanks

Number = TypeVar("Number", int, float)
Result = TypeVar("Result")
MAIN = 0
"""The rank that writes files and prints."""
POLL_S = 0.02
"""Seconds between checks whether the main process is still at work for all."""
TOLD = (CheckpointError, DataError, EngineError)
"""Errors of the main process that the others learn."""


class Groups:
    """The process groups of one layout (`Ranks` of base/protocols.py). Rank order: tp fastest, then cp, dp, pp.

    `timeout_s`: how long a collective of any of them may wait for a rank.
    """

    def __init__(self, layout: Layout, device: torch.device, timeout_s: float = ParallelConfig().timeout_s) -> None:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_s / 60,
        )
        self.layout, self.device = layout, device
        self.collection = ProcessGroupCollection.use_mpu_process_groups()
        self.tp, self.pp, self.cp = self.collection.tp, self.collection.pp, self.collection.cp
        self.tp_rank, self.pp_rank, self.cp_rank = self.tp.rank(), self.pp.rank(), self.cp.rank()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size, self.cp_size = layout.dp, layout.cp
        self.is_first_stage = self.pp_rank == 0
        self.is_last_stage = self.pp_rank == layout.pp - 1
        self.is_main = dist.get_rank() == MAIN
        self.is_reporter = self.is_last_stage and self.tp_rank == 0

    @property
    def experts_have_own_groups(self) -> bool:
        """True when expert gradients are reduced over other ranks than dense gradients."""
        return (self.layout.ep, self.layout.etp) != (1, self.layout.tp)

    def gather(self, mine: list[Any]) -> list[Any]:
        """Concatenates the reporters' lists in rank order, on every process. With several processes, items are
        pickled."""
        if dist.get_world_size() == 1:
            return mine
        heard: list[list[Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(heard, mine if self.is_reporter else [])
        return [item for part in heard if part for item in part]

    def from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrites `tensor` on every pipeline stage with the last stage's."""
        if self.layout.pp > 1:
            dist.broadcast(tensor, src=dist.get_global_rank(self.pp, self.layout.pp - 1), group=self.pp)
        return tensor

    def sum_over_parts(self, partial_S: torch.Tensor) -> torch.Tensor:
        """See `Ranks.sum_over_parts`."""
        return partial_S if self.cp_size == 1 else SumOverRanks.apply(partial_S, self.cp)

    def exchange(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Ranks.exchange`."""
        if len(parts) == 1:
            return list(parts)
        group, dtype = self.collection.dp_cp, parts[0].dtype
        # As bytes: NCCL knows no int16.
        sent = torch.cat(list(parts)).view(torch.uint8).to(self.device)
        sizes = [part.numel() * part.element_size() for part in parts]
        heard = torch.tensor(sizes, device=self.device)
        dist.all_to_all_single(heard, heard.clone(), group=group)
        received = sent.new_empty(int(heard.sum()))
        dist.all_to_all_single(received, sent, heard.tolist(), sizes, group=group)
        return [part.view(dtype) for part in received.cpu().split(heard.tolist())]

    def max_over_ranks(self, numbers: list[Number]) -> list[Number]:
        """The elementwise maximum over all processes. All numbers are int, or all are float and none is NaN."""
        if dist.get_world_size() == 1:
            return numbers
        dtype = torch.float64 if isinstance(numbers[0], float) else torch.int64
        largest = torch.tensor(numbers, dtype=dtype, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def sum_over_ranks(self, counts: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all processes, as a new tensor."""
        total = counts.clone()
        if dist.get_world_size() > 1:
            dist.all_reduce(total)
        return total

    def any_rank(self, flag: bool) -> bool:
        """See `Ranks.any_rank`."""
        return self.max_over_ranks([int(flag)]) == [1]

    def from_all(self, mine: Result) -> list[Result]:
        """The values of all processes, in rank order; they are pickled."""
        if dist.get_world_size() == 1:
            return [mine]
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, mine)
        return said

    def fail_together(self, what: str, error: BaseException | None) -> None:
        """Fails on all processes if one has an error.

        Raises:
            CheckpointError: `what`, with the reason and the process.
        """
        for rank, reason in enumerate(self.from_all(error and reason_of(error))):
            if reason is not None:
                raise CheckpointError(f"{what}: {reason} (process {rank})")

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on the main process; returns its result, or raises its error if that is one of TOLD, on all
        processes. It may take longer than the timeout of a collective."""
        return self.from_main(lambda stopped: work(), lambda: False)

    def from_main(self, work: Callable[[Event], Result], stop: Callable[[], bool]) -> Result:
        """See `Ranks.from_main`."""
        stopped = Event()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(work, stopped) if self.is_main else None
            while not stopped.is_set():
                busy = running is not None and not running.done()
                is_busy, is_asked = self.max_over_ranks([int(busy), int(stop())])
                if is_asked:
                    stopped.set()
                elif not is_busy:
                    break
                else:
                    time.sleep(POLL_S)
        if stopped.is_set():
            raise StopRequested
        outcome: list[Any] = [None]
        if running is not None:
            error = running.exception()
            if error is not None and not isinstance(error, TOLD):
                raise error
            outcome = [error or running.result()]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], TOLD):
            raise outcome[0]
        result: Result = outcome[0]
        return result

    def close(self) -> None:
        """Destroys the groups once every process is done: no rank closes a connection that another still uses."""
        dist.barrier()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def reason_of(error: BaseException) -> str:
    """What a message says about an error: its own message, with its type where that is not ours."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
