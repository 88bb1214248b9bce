"""Rules of rollout.engine: what an engine cannot do, and settings that it would not use."""

from __future__ import annotations

from dataclasses import fields

from gspo_megatron.base.errors import ConfigError, EngineError, plural
from gspo_megatron.config.engine import EngineConfig
from gspo_megatron.config.sections import Config
from gspo_megatron.models.shape import ModelShape
from gspo_megatron.rollout.engine_server import options_of_servers
from gspo_megatron.rollout.http import Address

OF_THE_SERVER = ("count", "python", "port", "gpus", "tensor_parallel", "threads", "cache_gib", "arguments")
"""Settings of the engines that a run starts itself, or that the command serve starts."""

LEAST_HEAD_ON_CPU = 32

USED: dict[str, tuple[tuple[str, ...], str]] = {
    "collective": ((), "the model under training samples"),
    "vllm_colocated": (
        ("tensor_parallel", "cache_gib", "arguments", "draw", "probe_limit"),
        "the run's own processes are the engines",
    ),
}
"""(settings of section engine that it reads, why not the others), where it does not read them all."""


def check_engine(config: Config) -> None:
    """
    Raises:
        ConfigError: settings that do not go together with rollout.engine.
    """
    r, e = config.rollout, config.engine
    used, where = USED.get(r.engine, (None, ""))
    changed = [f.name for f in fields(e) if getattr(e, f.name) != getattr(EngineConfig(), f.name)]
    if used is not None and (ignored := [name for name in changed if name not in used]):
        raise ConfigError(
            f"engine.{ignored[0]}={getattr(e, ignored[0])} has no effect with rollout.engine={r.engine}, where {where}"
            "; remove it, or set rollout.engine=vllm"
        )
    if used is not None and r.max_lag:
        raise ConfigError(
            f"rollout.max_lag={r.max_lag} with rollout.engine={r.engine}: what trains cannot sample meanwhile; set "
            "max_lag=0, or rollout.engine=vllm"
        )
    if r.engine == "collective":
        return
    for what, why, fix in _not_offered(config):
        raise ConfigError(f"{what} with rollout.engine={r.engine}: {why}; {fix}")
    if e.addresses:
        _check_addresses(e)
    if e.timeout_s >= config.parallel.timeout_s:
        raise ConfigError(
            f"engine.timeout_s={e.timeout_s:g} with parallel.timeout_s={config.parallel.timeout_s:g}: while an engine "
            "takes weights the other processes wait in a collective, and the run would end there before it learns what "
            "the engine lacks; make engine.timeout_s the smaller one"
        )
    ours = options_of_servers()
    if own := [text for text in map(str, e.arguments) if text.partition("=")[0].replace("_", "-") in ours]:
        raise ConfigError(
            f"engine.arguments has {own[0]}, which the run sets itself; remove it (docs/engines.md has the setting "
            "that each of vLLM's options stands for)"
        )
    wanted = e.count * e.tensor_parallel
    if e.gpus and (len(e.gpus) != wanted or len(set(e.gpus)) != wanted):
        raise ConfigError(
            f"engine.gpus={e.gpus} for engine.count={e.count} with engine.tensor_parallel={e.tensor_parallel}: they "
            f"take {plural(wanted, 'GPU')}; name each of them once"
        )
    if bad := [gpu for gpu in e.gpus if not isinstance(gpu, int) or isinstance(gpu, bool) or gpu < 0]:
        raise ConfigError(f"engine.gpus={e.gpus}: {bad[0]!r} is not the number of a GPU; write them as [6, 7]")


def check_shares(config: Config, world_size: int) -> None:
    """For engines in the processes of a run.

    Raises:
        ConfigError: they do not make whole engines.
    """
    share = config.engine.tensor_parallel
    if config.rollout.engine == "vllm_colocated" and world_size % share:
        raise ConfigError(
            f"engine.tensor_parallel={share} with rollout.engine=vllm_colocated on {plural(world_size, 'process')}: "
            "each engine takes as many of them; set it to a divisor of their number"
        )


def check_heads(shape: ModelShape) -> None:
    """For engines on a CPU.

    Raises:
        ConfigError: a model that vLLM cannot compute there. It would start, and die of the first sequence.
    """
    if 0 < shape.head_dim < LEAST_HEAD_ON_CPU and not shape.kv_lora_rank:
        raise ConfigError(
            f"model.head_dim={shape.head_dim} with engines on a CPU: vLLM's attention there takes heads of "
            f"{LEAST_HEAD_ON_CPU} or more; set model.head_dim={LEAST_HEAD_ON_CPU}, or rollout.engine=collective"
        )


def _check_addresses(e: EngineConfig) -> None:
    for name in OF_THE_SERVER:
        if getattr(e, name) != getattr(EngineConfig(), name):
            raise ConfigError(
                f"engine.{name}={getattr(e, name)} has no effect with engine.addresses, whose engines are running "
                "already; remove it, and "
                + ("start that many" if name == "count" else "give it to the command that starts them")
                + " (python -m gspo_megatron.serve, once for each engine)"
            )
    try:
        places = [(a.host, a.port) for a in (Address.of("engine.addresses", str(url)) for url in e.addresses)]
    except EngineError as error:
        raise ConfigError(str(error)) from error
    if len(set(places)) < len(places):
        raise ConfigError(f"engine.addresses={e.addresses} has an engine twice; name each once")


def _not_offered(config: Config) -> list[tuple[str, str, str]]:
    """(setting, why an engine does not go with it, what to do) of each that is on."""
    r, a, p = config.rollout, config.algorithm, config.precision
    texts = [text for text in r.stop if not isinstance(text, int)]
    rules = (
        (
            bool(texts),
            f"rollout.stop={texts}",
            "engines get token ids and look for no text",
            "give the ids of tokens, or use rollout.engine=collective",
        ),
        (
            r.environment != "single_turn",
            f"rollout.environment={r.environment}",
            "engines sample single turns",
            "use rollout.engine=collective",
        ),
        (
            bool(r.max_lag and r.dynamic_sampling),
            f"rollout.max_lag={r.max_lag} and rollout.dynamic_sampling={r.dynamic_sampling}",
            "a step that samples in rounds cannot be cut from what is sampled ahead",
            "set one of them to 0",
        ),
        (
            a.sampling_mask,
            "algorithm.sampling_mask=true",
            "engines do not send the ids that top-k and top-p kept",
            "set sampling_mask=false, with rollout.top_k=0 and rollout.top_p=1",
        ),
        (
            a.routing_replay == "R3",
            "algorithm.routing_replay=R3",
            "engines do not send the experts that they chose",
            "use R2, or rollout.engine=collective",
        ),
        (
            a.old_log_probs == "rollout",
            "algorithm.old_log_probs=rollout",
            "an engine's log-probs are another program's, and a ratio to them is not 1 before the first update",
            "use auto or recompute; the engine's stay beside them for algorithm.correction",
        ),
        (
            p.dtype == "fp64",
            "precision.dtype=fp64",
            "vLLM computes in fp32 or bf16",
            "use one of them, or rollout.engine=collective",
        ),
    )
    return [(what, why, fix) for acts, what, why, fix in rules if acts]
