"""Memory of a GPU, by pipeline stage, phase of a step and purpose, from the settings alone.

One model for `--dry-run`, tools/plan_layout.py and the check at the start of a run. docs/planner.md has the equations
under the names used here; tests/layout/test_measured_memory.py compares them with what torch allocates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from gspo_megatron.base.replay import expert_dtype, replay_of
from gspo_megatron.config.sections import Config
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.layout.activations import BYTES, Format, core_ends, kept_by_layer, working_bytes
from gspo_megatron.layout.layout import Layout
from gspo_megatron.log_probs.blocks import ACCELERATOR_BLOCK, CPU_BLOCK
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.models.families import family_of, has_sigmoid_router
from gspo_megatron.models.family import LayerCount, ParameterCount, TokenCount
from gspo_megatron.models.shape import ModelShape

GIB = 2**30
RESERVED_GIB = 6.0
"""Left to the driver, communication libraries and fragmentation: 2 to 6 GiB on a GPU (CUDA and NCCL take 1.5 to 3)."""

Sizes = Mapping[str, float]
"""Bytes by purpose."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU of one pipeline stage.

    Attributes:
        held: what is there all the time.
        phases: what comes on top of it, by phase: update, scoring, rollout, save.
        host: what a save in the background keeps in the host's memory.
    """

    stage: int
    held: Sizes
    phases: Mapping[str, Sizes]
    host: float

    def of(self, phase: str) -> dict[str, float]:
        """All of a phase by purpose."""
        return {name: size for name, size in {**self.held, **self.phases[phase]}.items() if size}

    def total(self, phase: str) -> float:
        return sum(self.of(phase).values())

    @property
    def peak(self) -> float:
        return max(map(self.total, self.phases))


# --------------------------------------------------------------------------------------------------------- parameters


@lru_cache(64)
def counts_of(m: ModelShape) -> tuple[ParameterCount, tuple[TokenCount, ...]]:
    """Parameters and costs of a token, by layer."""
    return count_parameters(m), family_of(m).per_token(m)


Kinds = tuple[tuple[LayerCount, TokenCount, int], ...]
"""Kinds of layers: parameters, costs of a token, and how many layers are alike."""


def kinds_of_stage(m: ModelShape, layout: Layout, stage: int) -> Kinds:
    """The layers of a pipeline rank by kind."""
    return _kinds_of_stages(m, layout.pp, layout.vpp, layout.first, layout.last)[stage]


@lru_cache(256)
def _kinds_of_stages(m: ModelShape, pp: int, vpp: int, first: int | None, last: int | None) -> tuple[Kinds, ...]:
    layout, (n, costs) = Layout(pp, pp=pp, vpp=vpp, first=first, last=last), counts_of(m)
    stages = []
    for stage in range(pp):
        layers = Counter((n.layers[i], costs[i]) for i in layout.layers_of_stage(m.num_layers, stage))
        stages.append(tuple((*kind, number) for kind, number in layers.items()))
    return tuple(stages)


def parameters_per_rank(m: ModelShape, layout: Layout) -> tuple[int, int]:
    """(dense, expert) parameters of the pipeline rank with the most."""
    return max((stage_parameters(m, layout, stage) for stage in range(layout.pp)), key=sum)


def stage_parameters(m: ModelShape, layout: Layout, stage: int) -> tuple[int, int]:
    """(dense, expert) parameters of a rank of pipeline stage `stage`."""
    assert m.vocab_size is not None
    n, kinds = counts_of(m)[0], kinds_of_stage(m, layout, stage)
    shard = -(-m.vocab_size // layout.tp) * m.hidden_size
    is_first, is_last = stage == 0, stage == layout.pp - 1
    vocabularies = n.num_vocabularies if layout.pp == 1 else is_first + is_last
    layers = sum(number * (x.sharded // layout.tp + x.replicated) for x, _, number in kinds)
    experts = sum(number * (x.num_experts // layout.ep * x.expert // layout.etp) for x, _, number in kinds)
    return vocabularies * shard + layers + is_last * n.final_norm, experts


# -------------------------------------------------------------------------------------------------------------- held


def held_sizes(config: Config, layout: Layout, stage: int, *, with_reference: bool) -> dict[str, float]:
    """Weights, gradients, Adam's state, and copies: exact, but for what allocators round up."""
    m, dtype = config.model.shape, config.precision.dtype
    width, recipe = BYTES[dtype], RECIPES[config.precision.fp8]
    dense, experts = stage_parameters(m, layout, stage)
    quantized = quantized_parameters(m, layout, stage) if recipe.quantizes else 0
    return {
        "weights": (dense + experts) * width,
        "FP8 copies": quantized * (recipe.trained_copy_bytes + with_reference * recipe.frozen_copy_bytes),
        "gradients": (dense + experts) * (4 if dtype == "bf16" else width),
        "optimizer": optimizer_bytes(config, layout, dense, experts),
        "reference": with_reference * (dense + experts) * width,
    }


def quantized_parameters(m: ModelShape, layout: Layout, stage: int) -> int:
    """Weights of the matrix products that FP8 computes: those of attention, networks and experts. The rest, such as
    norms, routers and what every tensor-parallel rank holds, is counted as unquantized."""
    return sum(
        number * (x.sharded // layout.tp + x.num_experts // layout.ep * x.expert // layout.etp)
        for x, _, number in kinds_of_stage(m, layout, stage)
    )


def optimizer_bytes(config: Config, layout: Layout, dense: float, experts: float) -> float:
    """Adam's two moments and, under bf16, float32 weights; sharded over the ranks that hold the same parameters."""
    dtype = config.precision.dtype
    each = 12 if dtype == "bf16" else 2 * BYTES[dtype]
    if config.optimizer.distributed and dtype != "fp64":
        dense, experts = dense / (layout.dp * layout.cp), experts / layout.edp
    return each * (dense + experts)


# ----------------------------------------------------------------------------------------------------------- a phase


def micro_batches_in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, counted over all of its layers.

    pp - stage where one forward and one backward alternate. In Megatron's interleaved schedule 2 (pp - stage - 1) +
    (vpp - 1) pp + 1 chunks of 1 / vpp of the layers (pipeline_parallel/schedules.py, get_pp_rank_microbatches)."""
    if layout.vpp == 1:
        return layout.pp - stage
    return (2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1) / layout.vpp


def activation_sizes(config: Config, layout: Layout, stage: int) -> dict[str, float]:
    """What is kept for the backward, and what the layer that runs works with on top."""
    f, m, tokens = Format.of(config), config.model.shape, config.train.tokens_per_micro_batch / layout.cp
    kept, largest, buffers, core, num_layers = 0.0, 0.0, 0.0, 0.0, 0
    for kind, _, number in kinds_of_stage(m, layout, stage):
        each = layer_bytes(m, kind, layout, f)
        kept, num_layers = kept + number * each, num_layers + number
        largest, buffers = max(largest, each), max(buffers, working_bytes(m, kind, layout, f))
        core = max(core, core_attention_bytes(m, kind, layout, f))
    in_flight = micro_batches_in_flight(layout, stage)
    ends = (stage == 0) * 8 + (stage == layout.pp - 1) * (f.norm(m.hidden_size) + f.width * m.hidden_size) / layout.tp
    if config.parallel.recompute == "full":
        boundary = num_layers * m.hidden_size * f.width / layout.tp
        sizes = {"activations": boundary * in_flight + ends, "recomputed layer": largest}
    elif config.parallel.recompute == "selective":
        sizes = {"activations": (kept - num_layers * core) * in_flight + ends, "recomputed layer": core}
    else:
        sizes = {"activations": kept * in_flight + ends, "recomputed layer": 0.0}
    return {name: size * tokens for name, size in {**sizes, "dispatch buffers": buffers}.items()}


@lru_cache(1024)
def _layer_bytes(m: ModelShape, kind: LayerCount, tp: int, etp: int, f: Format) -> float:
    return sum(kept_by_layer(m, kind, Layout(tp, tp=tp, etp=etp), f).values())


def layer_bytes(m: ModelShape, kind: LayerCount, layout: Layout, f: Format) -> float:
    """Of one token in one layer of this kind."""
    return _layer_bytes(m, kind, layout.tp, layout.etp, f)


def largest_layer(m: ModelShape, layout: Layout, f: Format) -> float:
    """Of one token in the layer that keeps most."""
    return max(layer_bytes(m, kind, layout, f) for kind in kinds_of_model(m))


@lru_cache(64)
def kinds_of_model(m: ModelShape) -> tuple[LayerCount, ...]:
    """The different layers of a model."""
    return tuple(dict.fromkeys(counts_of(m)[0].layers))


def core_attention_bytes(m: ModelShape, kind: LayerCount, layout: Layout, f: Format) -> float:
    """What selective recompute does not keep of one token in one layer: all but the output of core attention, less
    what it starts from."""
    attention = kept_by_layer(m, kind, layout, f)["attention"]
    return max(attention - core_ends(m, kind, f) / layout.tp, 0.0)


def log_prob_sizes(config: Config, layout: Layout, *, trained: bool) -> dict[str, float]:
    """On the last stage: a block of logits, its factors and gradients (log_probs/blocks.py), the scored rows and their
    gradients (log_probs/rows.py), and the exponentials that are kept. Without what oneDNN takes on some CPUs."""
    m, tokens, h = config.model.shape, config.train.tokens_per_micro_batch / layout.cp, config.model.hidden_size
    assert m.vocab_size is not None
    on_cpu, width = config.precision.device == "cpu", BYTES[config.precision.dtype]
    wide, columns = max(width, 4), -(-m.vocab_size // layout.tp)
    block = CPU_BLOCK if on_cpu else ACCELERATOR_BLOCK
    b, c = min(block[0], tokens), min(block[1], columns)
    # A CPU widens bf16 factors; a GPU multiplies them as they are, and rounds the gradient of the logits to bf16.
    factors = 0.0 if width == wide else wide * (2 * b * h + c * h) if on_cpu else trained * width * b * c
    gathered = (layout.tp > 1) * width * tokens * h
    returned = trained * (2 * wide * b * h + width * tokens * h / layout.tp)
    store = config.train.log_prob_store_gib * GIB if trained and not config.algorithm.entropy_coef else 0.0
    store = min(store, tokens * columns * (wide if on_cpu else width))
    logits = 0.0 if store == tokens * columns * (wide if on_cpu else width) else wide * b * c
    return {"log-prob workspace": logits + factors + gathered + returned, "log-prob store": store}


def rollouts_at_once(config: Config, layout: Layout) -> int:
    """Rows of the sampler's cache. The ranks of a context-parallel group sample different rollouts."""
    r = config.rollout
    return min(r.max_batch, -(-r.prompts_per_step * r.group_size // (layout.dp * layout.cp)))


def cache_bytes(config: Config, layout: Layout, stage: int, *, rows: int, positions: int) -> float:
    """Keys and values, or latents, of `rows` rollouts of `positions` tokens in all layers of the stage, and states."""
    kinds, width = kinds_of_stage(config.model.shape, layout, stage), BYTES[config.precision.dtype]
    cached = sum(number * (x.cached // layout.tp + x.cached_whole) for _, x, number in kinds)
    states = sum(number * state_bytes(x, width) // layout.tp for _, x, number in kinds)
    return rows * (positions * cached * width + states)


def state_bytes(x: TokenCount, width: int) -> int:
    """What the sampler keeps of a sequence in one layer, however long it is; `width` bytes a number of the model."""
    return max(width, 4) * x.states + width * x.inputs


def expert_bytes(config: Config) -> tuple[int, int]:
    """Of one token, in all layers of the model: the experts that are recorded, and the routers' log-probs of them."""
    m, replay = config.model.shape, replay_of(config.algorithm.routing_replay, config.algorithm.router_shift_floor)
    chosen = m.num_layers * m.experts_per_token
    has_log_probs = replay.log_probs and not has_sigmoid_router(m.family)
    return chosen * expert_dtype(m.num_experts).itemsize, has_log_probs * chosen * max(BYTES[config.precision.dtype], 4)


def recorded_sizes(config: Config, layout: Layout) -> dict[str, float]:
    """Recorded experts by phase, where they are of the trainer. What scoring has recorded stays on the device, for all
    tokens that this rank trains on, until the step ends; the sampler's experts are on the host, all of them are copied
    for scoring, and those of a mini-batch for its update."""
    a, r = config.algorithm, config.rollout
    replay, (experts, log_probs) = replay_of(a.routing_replay, a.router_shift_floor), expert_bytes(config)
    rollouts = -(-r.prompts_per_step * r.group_size // layout.dp)
    tokens = rollouts * config.model.max_sequence_length / layout.cp
    of_old, of_sampler = replay.of_old * (experts + log_probs), replay.of_sampler * experts
    return {
        "update": tokens * (of_old or of_sampler / a.updates_per_rollout),
        "scoring": tokens * (of_old + of_sampler),
    }


def sampled_experts(config: Config, layout: Layout) -> tuple[float, float]:
    """What the sampler has recorded when its last rollout ends, and what it then is at most: three copies of the parts
    of all tensor-parallel ranks, while they are put in order. As if no rollouts shared the forward of their prompt."""
    r, a = config.rollout, config.algorithm
    if not replay_of(a.routing_replay, a.router_shift_floor).of_sampler:
        return 0.0, 0.0
    rollouts = -(-r.prompts_per_step * r.group_size // (layout.dp * layout.cp))
    whole = rollouts * config.model.max_sequence_length * expert_bytes(config)[0]
    return whole / layout.tp, 3.0 * whole


def rollout_sizes(config: Config, layout: Layout, stage: int) -> dict[str, float]:
    """The cache; one layer at work on a forward's tokens, at most those of a micro-batch; the last stage's logits, as
    float32 and three times as float64 (rollout/native/sampling.py); the experts of all tokens, which are put together
    when no layer is at work any more."""
    m, r, rows = config.model.shape, config.rollout, rollouts_at_once(config, layout)
    assert m.vocab_size is not None
    # A later turn of a conversation begins with all that was said before.
    prompt = m.max_sequence_length - (r.max_new_tokens if r.environment == "single_turn" else 0)
    prompts = min(config.train.tokens_per_micro_batch, rows * prompt)
    f, is_last = Format.of(config), stage == layout.pp - 1
    working, logits = (prompts + rows) * largest_layer(m, layout, f), is_last * rows * m.vocab_size * (2 * 4 + 3 * 8)
    kept, together = sampled_experts(config, layout)
    return {
        "KV cache": cache_bytes(config, layout, stage, rows=rows, positions=m.max_sequence_length),
        "working memory": working,
        "logits": logits,
        "recorded experts": max(kept, together - working - logits),
    }


def memory_of_stage(config: Config, layout: Layout, stage: int, *, with_reference: bool) -> Memory:
    """Bytes on each GPU of pipeline stage `stage`. model.vocab_size must be known."""
    held = held_sizes(config, layout, stage, with_reference=with_reference)
    activations, is_last = activation_sizes(config, layout, stage), stage == layout.pp - 1
    m, f = config.model.shape, Format.of(config)
    layer = largest_layer(m, layout, f)
    tokens = config.train.tokens_per_micro_batch / layout.cp
    head = {name: is_last * size for name, size in log_prob_sizes(config, layout, trained=True).items()}
    scored = {name: is_last * size for name, size in log_prob_sizes(config, layout, trained=False).items()}
    # The head runs while no layer does.
    working = activations.pop("recomputed layer") + activations.pop("dispatch buffers")
    workspace = head.pop("log-prob workspace")
    update = {**activations, **head, "layer at work": max(working - workspace, 0.0), "log-prob workspace": workspace}
    dense, experts = stage_parameters(m, layout, stage)
    reference, recorded = held["reference"] / (layout.dp * layout.cp), recorded_sizes(config, layout)
    return Memory(
        stage,
        held,
        {
            "update": {**update, "recorded experts": recorded["update"]},
            "scoring": {"layer at work": tokens * layer, **scored, "recorded experts": recorded["scoring"]},
            "rollout": rollout_sizes(config, layout, stage),
            "save": {},
        },
        host=saved_bytes(config, layout, dense, experts) + reference,
    )


def saved_bytes(config: Config, layout: Layout, dense: float, experts: float) -> float:
    """What a rank copies for a checkpoint: weights (float32 under bf16) and Adam's moments, each element once."""
    each = 3 * (4 if config.precision.dtype == "bf16" else BYTES[config.precision.dtype])
    return each * (dense / (layout.dp * layout.cp) + experts / layout.edp)


def checkpoint_bytes(config: Config, *, with_reference: bool) -> float:
    """A checkpoint's files together."""
    width = BYTES[config.precision.dtype]
    each = 3 * max(width, 4) + with_reference * width
    return each * counts_of(config.model.shape)[0].total


def stages_of(config: Config, layout: Layout, *, with_reference: bool) -> Iterator[Memory]:
    """Every pipeline stage's memory. Of stages between the first and the last with the same layers only the first,
    which has the most micro-batches in flight."""
    m, seen = config.model.shape, set[Kinds]()
    for stage in range(layout.pp):
        kinds = kinds_of_stage(m, layout, stage)
        if stage in (0, layout.pp - 1) or kinds not in seen:
            yield memory_of_stage(config, layout, stage, with_reference=with_reference)
        if stage:
            seen.add(kinds)


def fullest_stage(config: Config, layout: Layout, *, with_reference: bool) -> Memory:
    return max(stages_of(config, layout, with_reference=with_reference), key=lambda memory: memory.peak)
