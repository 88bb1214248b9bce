"""Settings of engines: programs of their own that sample with a copy of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gspo_megatron.config.declarations import setting


@dataclass(frozen=True)
class EngineConfig:
    """Programs of their own that sample rollouts, where rollout.engine names their kind."""

    addresses: list[Any] = setting(
        [],
        "Engines that `python -m gspo_megatron.serve` starts apart from the run, as ['http://HOST:PORT']. []: the run "
        "starts its own.",
    )
    count: int = setting(1, "Engines that the run starts, beside its process 0.", least=1, most=64)
    python: str | None = setting(None, "The Python that has vLLM. null: the run's own.")
    port: int = setting(
        0, "The first engine's port on 127.0.0.1; the others have those after it. 0: free ones.", least=0, most=65000
    )
    gpus: list[Any] = setting(
        [],
        "Numbers of the GPUs that the engines take, tensor_parallel each; no process of the run may use them. []: on a "
        "CPU.",
    )
    tensor_parallel: int = setting(1, "GPUs that share the weights of one engine.", least=1)
    threads: int = setting(1, "Threads of an engine on a CPU.", least=1)
    cache_gib: float = setting(
        0.0,
        "Memory for keys and values. 0: what vLLM takes of a GPU by itself; on a CPU 0.25.",
        least=0,
        most=2**20,
    )
    arguments: list[Any] = setting([], "Further arguments of vLLM's server, such as ['--enforce-eager'].")
    channel: str = setting(
        "auto",
        "How new weights come to engines: shared_memory, on one machine; broadcast, over the network; disk, a folder "
        "of run.dir that all see. auto: shared_memory where all engines are on this machine and on its CPU, else "
        "broadcast.",
        choices=("auto", "shared_memory", "broadcast", "disk"),
    )
    draw: str = setting(
        "counter",
        "Whose random numbers draw tokens. counter: the product's own, of seed, rollout and position; the rollouts are "
        "those of the training model's sampler, however they are batched, cut or continued. vllm: those of vLLM's own "
        "sampler.",
        choices=("counter", "vllm"),
    )
    probe_limit: float | None = setting(
        None,
        "After every change of weights an engine scores a fixed sequence. A log-prob further than this from the "
        "trainer's stops the run. null: 1e-4 in fp32, 0.5 in bf16.",
        above=0,
    )
    most_starts: int = setting(
        3,
        "How often an engine that died is started again, or one of addresses waited for, before it has taken ten "
        "updates of weights; after those it is as good as new.",
        least=0,
        most=1000,
    )
    start_timeout_s: float = setting(
        900.0, "How long an engine may take to start, or one of addresses to answer.", above=0, most=1e6
    )
    timeout_s: float = setting(
        300.0, "How long an engine may send no token, or take for anything else.", above=0, most=1e6
    )
