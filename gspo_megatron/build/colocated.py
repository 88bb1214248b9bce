"""Engines in the run's own processes: opened on its process group, and asked by its ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gspo_megatron.base.batches import Sampling
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.engine_checks import check_heads
from gspo_megatron.build.engine_servers import FOLDER, draw_of, server_settings, write_config
from gspo_megatron.build.engines import probe_of, scores_of
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.checkpoint.export import FolderFiles
from gspo_megatron.device import DTYPES, Device
from gspo_megatron.device.own import set_variables
from gspo_megatron.models.families import family_of
from gspo_megatron.monitor.console import Console
from gspo_megatron.rollout.colocated import VARIABLES, ColocatedEngine, ColocatedSource, EngineRanks
from gspo_megatron.rollout.engine_server import ENVIRONMENT, ON_CPU
from gspo_megatron.rollout.native.stopping import stops_of


@contextmanager
def open_colocated(
    inputs: Inputs,
    policy: Any,
    ranks: Any,
    files: FolderFiles,
    device: Device,
    console: Console,
    stop: Callable[[], bool],
) -> Iterator[Callable[..., ColocatedSource]]:
    """As `open_engines`, with vLLM in this process. Collective.

    Raises:
        ConfigError: vLLM is not installed, or its memory on a GPU is not given.
    """
    config, tokenizer = inputs.config, inputs.tokenizer
    e, r = config.engine, config.rollout
    if ranks.any_rank(importlib.util.find_spec("vllm") is None):
        raise ConfigError(
            "rollout.engine=vllm_colocated, but a process of the run has no vLLM; install it into the environment of "
            "the run, or set rollout.engine=vllm and engine.python to an interpreter that has it"
        )
    if not device.on_cpu and not e.cache_gib:
        raise ConfigError(
            "engine.cache_gib=0 with rollout.engine=vllm_colocated on GPUs, which the trainer shares: vLLM would take "
            "most of a GPU; say how many GiB of each its keys and values may take, such as engine.cache_gib=8"
        )
    if device.on_cpu:
        check_heads(config.model.shape)
    folder = Path(config.run.dir) / FOLDER / "model"
    ranks.from_main(lambda stopped: write_config(folder, files, DTYPES[config.precision.dtype]), lambda: False)
    set_variables({**ENVIRONMENT, **VARIABLES, **(ON_CPU if device.on_cpu else {})}, device.rank)
    engine = ColocatedEngine(
        server_settings(config, folder).on(() if device.on_cpu else (device.torch_device.index,)),
        ranks,
        draw=draw_of(inputs),
        as_in_training=Sampling(r.temperature, r.top_p, r.top_k, r.max_new_tokens, config.run.seed),
        stop_ids=stops_of(r.stop, tokenizer).ids,
        stop=stop,
        sign_of_life=console.sign_of_life,
    )
    seen = EngineRanks(ranks, device.rank, device.world_size, e.tensor_parallel)

    def made(**rest: Any) -> ColocatedSource:
        return ColocatedSource(
            **{**rest, "ranks": seen},
            sampler=engine,
            engine=engine,
            policy=policy,
            weights=partial(policy.weights, family_of(config.model.shape).rules),
            probe=probe_of(inputs),
            score=scores_of(inputs, policy, ranks, console),
        )

    try:
        yield made
    finally:
        engine.close()
