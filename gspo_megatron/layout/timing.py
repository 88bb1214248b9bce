"""Seconds of a step on paper: matrix products, memory traffic, kernel launches and communication by axis and link.

A prediction from data sheets and one set of published efficiencies (layout/hardware.py); docs/planner.md has every
equation under the names used here, and the errors against published measurements.

Units: seconds, bytes, floating-point operations. T tokens of a micro-batch on one context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from gspo_megatron.config.sections import Config
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.layout.activations import Format, working_bytes
from gspo_megatron.layout.hardware import Efficiency, Gpu
from gspo_megatron.layout.layout import Layout
from gspo_megatron.layout.memory import (
    Kinds,
    counts_of,
    kinds_of_stage,
    layer_bytes,
    rollouts_at_once,
    saved_bytes,
    stage_parameters,
    state_bytes,
)
from gspo_megatron.models.family import LayerCount, TokenCount


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run: `node` of them have NVLink between them."""

    gpu: Gpu
    node: int
    efficiency: Efficiency = field(default_factory=Efficiency)

    def bandwidth(self, size: int, stride: int) -> tuple[str, float]:
        """(link, bytes per second of each rank) of a collective over `size` ranks, `stride` apart. Over nodes each
        member in a node drives its own network card."""
        if size * stride <= self.node:
            return "NVLink", self.gpu.nvlink_gb_s * 1e9 * self.efficiency.nvlink
        members = max(1, self.node // stride)
        network = self.gpu.network_gb_s * 1e9 * self.efficiency.network * min(members, size)
        return "network", min(network, self.gpu.nvlink_gb_s * 1e9 * self.efficiency.nvlink)

    def latency(self, size: int, stride: int) -> float:
        """Seconds of such a collective of a few bytes: a message in the node, and one for each other node."""
        nodes = ceil(size / max(1, self.node // stride)) if size * stride > self.node else 1
        return self.efficiency.message_s + (nodes - 1) * self.efficiency.network_message_s


@dataclass(frozen=True)
class Work:
    """What a step consists of.

    Attributes:
        sequences: rollouts of a step.
        prompt, response: mean tokens of a prompt and a response.
        longest: longest response in tokens.
        updates: updates of a step.
        scorings: forwards ahead of the updates: old and reference log-probs.
        save_every: steps between checkpoints; 0: none.
        engine: rollouts come from an engine with CUDA graphs: decoding waits for no launch.
        overlaps: gradients and weights travel while the model computes.
    """

    sequences: int
    prompt: float
    response: float
    longest: int
    updates: int
    scorings: int = 1
    save_every: int = 0
    engine: bool = False
    overlaps: bool = True

    @property
    def length(self) -> float:
        return self.prompt + self.response


@dataclass(frozen=True)
class LayerTime:
    """Seconds of a micro-batch in a layer: forward compute, and communication of the forward and of the backward."""

    forward: float
    attention: float
    tp: float
    tp_backward: float
    ep: float
    cp: float


class StepTime:
    """Seconds of a step on a layout, part by part. model.vocab_size must be known."""

    def __init__(self, config: Config, layout: Layout, cluster: Cluster, work: Work) -> None:
        self.config, self.layout, self.cluster, self.work = config, layout, cluster, work
        self.m, self.format = config.model.shape, Format.of(config)
        self.is_fp8 = RECIPES[config.precision.fp8].quantizes
        self.parameters, self.costs = counts_of(self.m)
        # Whole sequences fill a micro-batch; none is split.
        per_batch = max(1, int(config.train.tokens_per_micro_batch // work.length))
        per_update = work.sequences / work.updates / layout.dp
        self.sequences_per_micro_batch = min(per_batch, per_update)
        self.micro_batches = max(1, ceil(per_update / per_batch))
        if layout.vpp > 1:
            self.micro_batches = ceil(self.micro_batches / layout.pp) * layout.pp
        self.tokens = self.sequences_per_micro_batch * work.length / layout.cp

    # ------------------------------------------------------------------------------------------------------- one layer

    def _seconds(self, flops: float, efficiency: float, *, fp8: bool = False) -> float:
        return flops / (self.cluster.gpu.peak_flops(fp8=fp8) * efficiency)

    def _moved(self, size: float) -> float:
        return size / (self.cluster.gpu.hbm_gb_s * 1e9 * self.cluster.efficiency.memory)

    def layer(self, n: LayerCount, cost: TokenCount, tokens: float, context: float) -> LayerTime:
        """`tokens` of a context-parallel rank, each of which attends to `context` others on average."""
        e, ranks, m, f = self.cluster.efficiency, self.layout, self.m, self.format
        chosen = m.experts_per_token if n.num_experts else 0
        grouped = 2 * tokens * chosen * n.expert / ranks.tp
        dense = 2 * tokens * (cost.multiplied - chosen * n.expert) / ranks.tp
        weights = n.num_experts // ranks.ep * n.expert / ranks.etp * (1 if self.is_fp8 else f.width)
        attended = min(context, cost.window or context)
        attention = self._seconds(2 * tokens * attended * cost.attended / ranks.tp, e.attention)
        products = self._seconds(dense, e.dense, fp8=self.is_fp8)
        experts = max(self._seconds(grouped, e.grouped, fp8=self.is_fp8), self._moved(weights))
        # What is kept is written once and read once; so are the buffers on the way to the experts.
        traffic = 2 * tokens * (layer_bytes(m, n, ranks, f) + working_bytes(m, n, ranks, f))
        busy = products + experts + attention + self._moved(traffic)
        return LayerTime(max(busy, e.kernels * e.launch_s), attention, *self._communication(n, cost, tokens))

    def _communication(self, n: LayerCount, cost: TokenCount, tokens: float) -> tuple[float, float, float, float]:
        """Sequence parallel: an all-gather and a reduce-scatter around attention and around dense networks, and in the
        backward a third collective that gathers the input again. Experts: two exchanges each way. Context parallel:
        keys and values around the ring."""
        ranks, m, w = self.layout, self.m, self.format.width
        tp = ep = cp = 0.0
        if ranks.tp > 1:
            _, speed = self.cluster.bandwidth(ranks.tp, 1)
            inner = m.shared_expert_ffn_size if n.num_experts else m.dense_ffn_size
            blocks = 1 + (inner > 0) + (n.num_experts > 0 and ranks.etp > 1)
            each = tokens * m.hidden_size * w * (ranks.tp - 1) / ranks.tp / speed + self.cluster.latency(ranks.tp, 1)
            tp = 2 * blocks * each
        if ranks.ep > 1 and n.num_experts:
            ep = 2 * self.exchange(tokens / ranks.tp * m.experts_per_token * m.hidden_size * w)
        if ranks.cp > 1:
            _, speed = self.cluster.bandwidth(ranks.cp, ranks.tp)
            keys = ((cost.cached + cost.gathered) // ranks.tp + cost.cached_whole) * w
            cp = tokens * keys * (ranks.cp - 1) / speed + self.cluster.latency(ranks.cp, ranks.tp)
        return tp, 1.5 * tp, ep, cp

    def exchange(self, size: float) -> float:
        """An all-to-all of `size` bytes a rank between the ranks that share the experts: what stays in the node and
        what leaves it travel at the same time, and every other node costs a message over the network: of a few tokens,
        as when decoding, the messages are all of it."""
        ranks, c = self.layout, self.cluster
        inside = min(ranks.ep, max(1, c.node // ranks.etp))
        nvlink = size * (inside - 1) / ranks.ep / (c.gpu.nvlink_gb_s * 1e9 * c.efficiency.nvlink)
        network = size * (ranks.ep - inside) / ranks.ep / (c.gpu.network_gb_s * 1e9 * c.efficiency.network)
        return max(nvlink, network) + c.latency(ranks.ep, ranks.etp)

    # -------------------------------------------------------------------------------------------------------- a stage

    def head(self, *, trained: bool) -> float:
        """Log-probs of a micro-batch's N response tokens on the last stage: 2 N H V forward, 4 N H V backward, and
        2 N H V for what is recomputed."""
        rows = self.sequences_per_micro_batch * self.work.response / self.layout.cp
        once = 2 * rows * self.parameters.vocabulary / self.layout.tp
        return self._seconds(once * (4 if trained else 1), self.cluster.efficiency.dense)

    @cached_property
    def stages(self) -> list[tuple[float, float, dict[str, float]]]:
        """(forward, forward and backward) of a micro-batch on each stage, and the communication within the second."""
        found = []
        times: dict[tuple[LayerCount, TokenCount], LayerTime] = {}
        last = self.layout.pp - 1
        for stage in range(self.layout.pp):
            forward = both = 0.0
            axes = dict.fromkeys(("tp", "ep", "cp", "pp"), 0.0)
            for n, cost, number in kinds_of_stage(self.m, self.layout, stage):
                if (n, cost) not in times:
                    times[n, cost] = self.layer(n, cost, self.tokens, self.work.length / 2)
                t = times[n, cost]
                recompute = {"none": 0.0, "selective": t.attention, "full": t.forward + t.tp + t.ep + t.cp}
                again = recompute[self.config.parallel.recompute]
                forward += number * (t.forward + t.tp + t.ep + t.cp)
                both += number * (3 * t.forward + t.tp + t.tp_backward + 2 * t.ep + 3 * t.cp + again)
                axes["tp"] += number * (t.tp + t.tp_backward)
                axes["ep"] += number * 2 * t.ep
                axes["cp"] += number * 3 * t.cp
            if self.layout.pp > 1 and self.layout.vpp == 1:
                # Interleaved stages send while they compute (mcore/model.py, overlap_p2p_comm).
                send = self.tokens / self.layout.tp * self.m.hidden_size * self.format.width / self._pipeline_speed
                forward, both, axes["pp"] = forward + send, both + 2 * send, 2 * send
            is_last = stage == last
            forward += is_last * self.head(trained=False)
            both += is_last * self.head(trained=True)
            found.append((forward, both, axes))
        return found

    @property
    def _pipeline_speed(self) -> float:
        return self.cluster.bandwidth(2, self.layout.world_size // self.layout.pp)[1]

    def _pipeline(self, each: list[float], micro_batches: int) -> float:
        """One after the other through the slowest stage, after the first has reached it and until the last has left the
        others; virtual stages shorten these ends."""
        slowest = max(each)
        return micro_batches * slowest + (sum(each) - slowest) / self.layout.vpp

    @property
    def bubble(self) -> float:
        """The share of an update's forwards and backwards in which the average stage waits."""
        each = [both for _, both, _ in self.stages]
        return 1 - self.micro_batches * sum(each) / len(each) / self._pipeline(each, self.micro_batches)

    # --------------------------------------------------------------------------------------------------------- parts

    def gradients_and_weights(self) -> tuple[str, float]:
        """(link, seconds) of reducing gradients (float32 under bf16) and gathering weights, once an update."""
        ranks, w = self.layout, self.format.width
        dense, experts = max((stage_parameters(self.m, ranks, stage) for stage in {0, ranks.pp - 1}), key=sum)
        each = (4 if w == 2 else w) + w
        link, speed = self.cluster.bandwidth(ranks.dp * ranks.cp, ranks.tp)
        expert_link, expert_speed = self.cluster.bandwidth(ranks.edp, ranks.etp * ranks.ep)
        replicas, expert_replicas = ranks.dp * ranks.cp, ranks.edp
        seconds = dense * each * (replicas - 1) / replicas / speed
        seconds += experts * each * (expert_replicas - 1) / expert_replicas / expert_speed
        return ("network" if "network" in (link, expert_link) else link), seconds

    def optimizer(self) -> float:
        """Adam reads and writes 30 bytes for each parameter of a rank's shard."""
        ranks = self.layout
        dense, experts = stage_parameters(self.m, ranks, 0)
        shard = (
            dense / (ranks.dp * ranks.cp) + experts / ranks.edp
            if self.config.optimizer.distributed
            else dense + experts
        )
        return self._moved(30 * shard)

    def update(self) -> float:
        """All updates of a step, without the communication that `communication` counts."""
        each = [both for _, both, _ in self.stages]
        return self.work.updates * (self._pipeline(each, self.micro_batches) + self.optimizer())

    def exposed_communication(self) -> float:
        """What of the gradients' and weights' travel the model's own work does not hide: with overlap, beyond the last
        micro-batch's backward and the first one's forward."""
        seconds = self.gradients_and_weights()[1]
        hidden = max(both for _, both, _ in self.stages) if self.work.overlaps else 0.0
        return self.work.updates * max(0.0, seconds - hidden)

    def log_probs(self) -> float:
        """The forwards ahead of the updates."""
        each = [forward for forward, _, _ in self.stages]
        return self.work.scorings * self._pipeline(each, self.work.updates * self.micro_batches)

    def rollout(self) -> float:
        """Prompts in one forward each, then a token for every rollout at a time. A forward passes through all stages
        one after the other; waiting rollouts take the rows of those that ended."""
        ranks, w = self.layout, self.work
        rollouts = ceil(w.sequences / (ranks.dp * ranks.cp))
        rows = min(rollouts, rollouts_at_once(self.config, ranks))
        forwards = max(w.longest, 0) + w.response * max(0.0, rollouts / rows - 1)
        prefill = rollouts / max(1, self.config.rollout.group_size) * w.prompt
        times = ((self.layer(n, cost, prefill, w.prompt / 2), number) for n, cost, number in self._kinds)
        prompts = sum(number * (t.forward + t.tp + t.ep) for t, number in times)
        return prompts + forwards * self.decode(rows, w.prompt + w.response / 2)

    def decode(self, rows: float, context: float) -> float:
        """One token for each of `rows` rollouts: the weights that any of them needs and their caches are read once."""
        e, ranks, m, f = self.cluster.efficiency, self.layout, self.m, self.format
        seconds = 0.0
        for n, cost, number in self._kinds:
            local = n.num_experts // ranks.ep
            # Of experts that `drawn` tokens choose among evenly, the share that at least one chooses.
            drawn = rows * ranks.ep * ranks.etp * m.experts_per_token / ranks.tp
            touched = local * (1 - (1 - 1 / max(1, n.num_experts)) ** drawn) if local else 0.0
            width = 1 if self.is_fp8 else f.width
            weights = (n.sharded / ranks.tp + n.replicated + touched * n.expert / ranks.etp) * width
            cache = rows * context * (cost.cached // ranks.tp + cost.cached_whole) * f.width
            cache += rows * 2 * state_bytes(cost, f.width) / ranks.tp  # read and written
            products = self._seconds(2 * rows * cost.multiplied / ranks.tp, e.dense, fp8=self.is_fp8)
            tp, _, ep, _ = self._communication(n, cost, rows)
            launches = 0.0 if self.work.engine else e.kernels * e.launch_s
            seconds += number * (max(self._moved(weights + cache), products, launches) + tp + ep)
        head = self._moved(self.parameters.vocabulary / ranks.tp * f.width + rows * (m.vocab_size or 0) * 32)
        return seconds + head + (ranks.pp - 1) * self.cluster.latency(2, ranks.world_size // ranks.pp)

    @property
    def _kinds(self) -> Kinds:
        """All layers, whatever stage they are on."""
        return kinds_of_stage(self.m, Layout(1), 0)

    def save(self) -> float:
        """A checkpoint's copy to the host, averaged over steps; files are written in the background."""
        if not self.work.save_every:
            return 0.0
        dense, experts = max((stage_parameters(self.m, self.layout, s) for s in {0, self.layout.pp - 1}), key=sum)
        return (
            saved_bytes(self.config, self.layout, dense, experts)
            / (self.cluster.gpu.host_gb_s * 1e9)
            / self.work.save_every
        )

    @cached_property
    def parts(self) -> Mapping[str, float]:
        """Seconds of a step by part."""
        return {
            "rollout": self.rollout(),
            "log_probs": self.log_probs(),
            "update": self.update(),
            "communication": self.exposed_communication(),
            "save": self.save(),
        }

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def by_axis(self) -> dict[str, tuple[str, float]]:
        """(link, seconds of an update) of communication by axis: of the slowest stage, all of its micro-batches; dp is
        what reduces gradients and gathers weights, hidden or not."""
        ranks = self.layout
        axes = max(self.stages, key=lambda stage: stage[1])[2]
        links = {
            "tp": self.cluster.bandwidth(ranks.tp, 1)[0],
            "cp": self.cluster.bandwidth(ranks.cp, ranks.tp)[0],
            "ep": self.cluster.bandwidth(ranks.ep, ranks.etp)[0],
            "pp": self.cluster.bandwidth(2, ranks.world_size // ranks.pp)[0],
        }
        found = {axis: (links[axis], seconds * self.micro_batches) for axis, seconds in axes.items() if seconds}
        link, seconds = self.gradients_and_weights()
        return {**found, **({"dp": (link, seconds)} if seconds else {})}

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of a step's matrix products over all GPUs: forward and backward of the updates, forwards ahead of them, and
        the rollout. Recomputation is not counted."""
        w = self.work
        weights = sum(cost.multiplied for cost in self.costs)
        attended = sum(cost.pairs(w.length) * cost.attended for cost in self.costs)
        layers = 2 * w.length * weights + 2 * attended
        forward = w.sequences * (layers + 2 * w.response * self.parameters.vocabulary)
        return {"update": 3 * forward, "log_probs": w.scorings * forward, "rollout": forward}
