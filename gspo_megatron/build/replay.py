"""Settings of routing replay and of the routers' shift that cannot work."""

from __future__ import annotations

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.config.sections import Config
from gspo_megatron.models.families import has_sigmoid_router
from gspo_megatron.run.algorithm import Algorithm


def check_replay(config: Config, algorithm: Algorithm) -> None:
    """
    Raises:
        ConfigError: there is nothing to record or to use, or it would not be what the model computes with.
    """
    a, replay, family = config.algorithm, algorithm.replay, config.model.family
    if not any(replay):
        return
    shifts = a.router_shift_floor is not None
    given, off = f"algorithm.routing_replay={a.routing_replay}", "routing_replay=none"
    if shifts:
        given, off = f"algorithm.router_shift_floor={a.router_shift_floor}", "router_shift_floor=null"
    if not config.model.shape.num_experts:
        raise ConfigError(f"{given} has no effect: model.family={family} has no experts; set {off}")
    if replay.of_old and algorithm.old_log_probs != "trainer":
        raise ConfigError(
            f"{given} records the experts in the pass that scores old log-probs, and there is none with "
            f"algorithm.old_log_probs={a.old_log_probs} and algorithm.updates_per_rollout={a.updates_per_rollout}; set "
            f"old_log_probs=recompute, or {off}"
        )
    if replay.in_updates and algorithm.balances_load:
        raise ConfigError(
            f"algorithm.routing_replay={a.routing_replay} with model.aux_loss_coef={config.model.aux_loss_coef}: the "
            "balancing loss counts the experts that the router would choose, not those that are used; set "
            "aux_loss_coef=0, or routing_replay=compare"
        )
    if shifts and not algorithm.variant.clip.corrects:
        raise ConfigError(
            f"{given} multiplies the ratios of the loss, and that of algorithm.variant={a.variant} has none (clip "
            f"{algorithm.variant.clip.name}); use a variant with ratios, such as gspo, or set {off}"
        )
    if shifts and has_sigmoid_router(family):
        raise ConfigError(
            f"{given} compares a router's probabilities of experts; that of model.family={family} gives every expert a "
            f"sigmoid of its own; set {off}"
        )
    if shifts and config.parallel.pp > 1:
        raise ConfigError(
            f"{given} with parallel.pp={config.parallel.pp}: a token's weight is an average over all layers, and a "
            f"pipeline stage knows its own; set pp=1, or {off}"
        )


def replay_warnings(config: Config, algorithm: Algorithm) -> list[str]:
    """Settings that work but have no effect."""
    floor = config.algorithm.router_shift_floor
    if floor is None or algorithm.updates_per_rollout > 1:
        return []
    return [
        f"algorithm.router_shift_floor={floor} with algorithm.updates_per_rollout=1: the one update of a rollout batch "
        "finds the routers as they were when old log-probs were scored, so their shift is 0 and no ratio changes; use "
        "2 or more, or set router_shift_floor=null"
    ]
