"""A policy in the benchmark's own process, without torchrun."""

from __future__ import annotations

from typing import NamedTuple

from gspo_megatron.build.checks import check_config
from gspo_megatron.config.sections import Config
from gspo_megatron.device import Device, open_device
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.run.algorithm import Algorithm


class Alone(NamedTuple):
    """One process and what its policy stands on."""

    device: Device
    groups: Groups
    policy: MegatronPolicy
    algorithm: Algorithm


def alone(config: Config) -> Alone:
    """Of random weights, on a CPU. Once in a process."""
    device = open_device("cpu", config.precision.dtype)
    device.start_processes(60.0)
    groups = Groups(check_config(config, 1), device.torch_device)
    compat.apply_patches(device.on_cpu)
    algorithm = Algorithm.of(config)
    return Alone(device, groups, MegatronPolicy(config, groups, device, False, algorithm.scoring), algorithm)
