"""Process groups: each has the run's own time limit."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.device import open_device
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.small import SMALL


def time_limits(settings: list[str]) -> dict[str, timedelta]:
    """Of every process group that this rank is in, by name."""
    config = load_config(None, [*SMALL, *settings])
    device = open_device("cpu", config.precision.dtype)
    groups = Groups(check_config(config, dist.get_world_size()), device.torch_device, config.parallel.timeout_s)
    found: dict[str, Any] = {}
    for name, group in vars(groups.collection).items():
        for number, member in enumerate(group if isinstance(group, list) else [group]):
            if isinstance(member, dist.ProcessGroup) and dist.get_rank(member) >= 0:
                found[f"{name} {number}"] = member._get_backend(torch.device("cpu")).options._timeout
    return found


def test_every_group_waits_as_long_as_the_settings_say() -> None:
    """Megatron's own limit is half an hour: a rank that hangs would hold the others for that long."""
    settings = ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "parallel.timeout_s=45"]
    for of_rank in run_distributed(time_limits, 8, settings):
        assert len(of_rank) >= 8
        assert set(of_rank.values()) == {timedelta(seconds=45)}, of_rank
