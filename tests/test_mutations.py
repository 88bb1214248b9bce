"""The comparison of layouts can fail: it notices each scale factor, reduction, split or name broken on its own.

Every mutation replaces a fragment of the package's source, on the ranks only, on a layout of two processes where the
fragment matters. Their results are compared with one process that runs the unchanged package; the same layout without
a mutation is equal to that.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import check_layout
import pytest
from check_layout import Drawn, LayoutRequest, Report, compare

from gspo_megatron.build.inputs import settle
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.data import packing
from gspo_megatron.log_probs import rows, shards, torch_kernels
from gspo_megatron.mcore import compat, context_parallel, layers, optimizer, parameters, sampler, schedule
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.run import stages

# A layer for each of four virtual stages; 2 + 11 ids, so that tensor parallel fills the vocabulary up; responses of
# different lengths, on micro-batches of a few sequences; KL and entropy.
CONFIG = """
model: {num_layers: 4, hidden_size: 16, num_attention_heads: 4, num_query_groups: 2, head_dim: 8, num_experts: 4,
        expert_ffn_size: 16, max_sequence_length: 24, init_std: 0.2}
data: {train: "task:sort_digits", eval: "task:sort_digits", task: {min_length: 1, max_length: 6}, eval_size: 4,
       tokenizer: "characters:0123456789>"}
rollout: {prompts_per_step: 4, group_size: 4, max_new_tokens: 8}
algorithm: {kl_coef: 0.05, entropy_coef: 0.02}
train: {tokens_per_micro_batch: 48}
precision: {device: cpu, dtype: fp64}
"""


class Mutation(NamedTuple):
    """`function` says `instead` where it says `written`."""

    layout: str
    function: Callable[..., Any]
    written: str
    instead: str

    def apply(self) -> None:
        """Compiles the changed text and gives the function its code: whoever imported the function has it changed."""
        source = textwrap.dedent(inspect.getsource(self.function))
        assert source.count(self.written) == 1, f"{self.written!r} is not in {self.function.__qualname__} once"
        changed = textwrap.indent(source.replace(self.written, self.instead), "    ")
        made: dict[str, Any] = {}
        # In a class, as methods with super() are.
        exec(f"class Mutant:\n{changed}", self.function.__globals__, made)
        self.function.__code__ = getattr(made["Mutant"], self.function.__name__).__code__


DP, TP, CP, EP, VPP, ETP = "dp=2", "tp=2", "cp=2", "dp=2,ep=2", "pp=2,vpp=2", "tp=2,etp=2"
PATCHED_IN_016 = "expert gradients reduced as dense ones"

MUTATIONS = {
    # The scale of the loss
    "dp forgotten in the loss scale": Mutation(DP, schedule.train, " * groups.dp_size", ""),
    "micro-batches forgotten in the loss scale": Mutation(DP, schedule.train, "len(batch.micro_batches) * ", ""),
    "1 / cp too much": Mutation(CP, schedule.train, "groups.dp_size", "groups.dp_size / groups.cp_size"),
    "each micro-batch divided by its own count": Mutation(
        DP, stages.PolicyLoss.__call__, "num_sequences=batch.num_sequences", "num_sequences=None"
    ),
    "the update divided by one rank's count": Mutation(
        DP,
        stages.Packer.update_batch,
        "num_sequences=len(trained)",
        "num_sequences=sum(len(m.index) for m in micro_batches)",
    ),
    # Data parallel
    "every rank has the first one's sequences": Mutation(
        DP, packing.pack, "index_by_rank[dp_rank]", "index_by_rank[0]"
    ),
    "gradients not reduced": Mutation(DP, optimizer.wrap_model, "= finalize_model_grads", "= None"),
    "random numbers by rank": Mutation(
        DP,
        sampler.MegatronSampler._feed,
        "scheduler.ids[rollout_index]",
        "scheduler.ids[rollout_index] + self.groups.dp_rank",
    ),
    # Tensor and sequence parallel
    "log-sum-exp of the first shard": Mutation(TP, shards.merge, "lse_Pn.logsumexp(0)", "lse_Pn[0]"),
    "target's probability within its shard": Mutation(
        TP, shards.merge, "(log_p_part_Pn + log_p_within_Pn).amax(0)", "log_p_within_Pn.amax(0)"
    ),
    "target looked up in shards that do not hold it": Mutation(
        TP,
        torch_kernels.row_statistics,
        "torch.where(is_inside_b, z_y_b - log_sum_b, -torch.inf)",
        "z_y_b - log_sum_b",
    ),
    "entropy between the shards left out": Mutation(TP, shards.merge, " + torch.special.entr(p_part_Pn)", ""),
    "padding of the vocabulary in the softmax": Mutation(
        TP, schedule.response_log_probs, "vocab_size=module.true_vocab_size", "vocab_size=None"
    ),
    "hidden states not gathered": Mutation(
        TP, rows.Rows.gather, "self.shards.gather(padded_H)", "padded_H.expand(self.shards.size, -1, -1)"
    ),
    "hidden gradient not reduced": Mutation(
        TP,
        rows.GradientReturn.send,
        "shards.start_scatter(own_H, all_tH)",
        "(own_H.copy_(all_tH[: len(own_H)]), None)[1]",
    ),
    "norm weights not marked": Mutation(
        TP, layers.RMSNorm.__init__, "self.weight.sequence_parallel = config.sequence_parallel", "pass"
    ),
    # Context parallel
    "ratios of parts of sequences": Mutation(
        CP, Groups.sum_over_parts, "SumOverRanks.apply(partial_S, self.cp)", "partial_S"
    ),
    "gradient of a ratio from one part": Mutation(
        CP, context_parallel.SumOverRanks.backward, "dist.all_reduce(total, group=ctx.group)", "pass"
    ),
    "contiguous split": Mutation(
        CP, packing.zigzag, "[chunk[rank], chunk[-1 - rank]]", "[chunk[2 * rank], chunk[2 * rank + 1]]"
    ),
    "positions counted on each rank": Mutation(
        CP,
        packing.build_micro_batch,
        "torch.cat([torch.arange(length) for length in segments])[held_T]",
        "torch.cat([torch.arange(length // cp_size) for length in segments])",
    ),
    "gradient of keys and values from one rank's queries": Mutation(
        CP, context_parallel.whole, "group=part.group", "tensor_parallel_output_grad=False, group=part.group"
    ),
    "length of the part": Mutation(
        CP,
        stages.segments_of,
        "micro_batch.trained_lengths",
        "micro_batch.sequence_R.bincount(minlength=len(micro_batch.index)).tolist()",
    ),
    "padding counted in the length": Mutation(
        CP,
        packing.build_micro_batch,
        "trained_lengths=trained_lengths,",
        "trained_lengths=[n - int((~s.trained).sum()) for n, s in zip(segments, packed)],",
    ),
    # Experts and virtual stages
    "experts of the other rank": Mutation(
        EP,
        parameters._placed,
        "groups.collection.ep.rank()",
        "(groups.layout.ep - 1 - groups.collection.ep.rank())",
    ),
    "gate and up cut as one matrix": Mutation(ETP, parameters.Place.cut, "self.stride * self.count", "self.count"),
    PATCHED_IN_016: Mutation(TP, compat.mark_expert_parameters, "if experts_have_own_groups:", "if False:"),
    "layers as without virtual stages": Mutation(
        VPP,
        parameters._placed,
        "model.decoder.layers[0].layer_number - 1",
        "groups.pp_rank * groups.layout.vpp + (model.decoder.layers[0].layer_number - 1) // groups.layout.pp",
    ),
}


def mutated(name: str, config: Config, given: Drawn | None) -> Any:
    """What a rank of a broken layout measures."""
    MUTATIONS[name].apply()
    return check_layout.measure(config, given)


Measured = Callable[..., Report]
"""(layout, rollouts to use, what the ranks run) -> Report."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(CONFIG)

    def on(layout: str, *given_and_work: Any) -> Report:
        asked = LayoutRequest.parse(layout)
        config = settle(load_config(file, [*check_layout.FIXED, *asked.overrides]), asked.world_size).config
        return check_layout.run(config, asked.world_size, 30.0, *given_and_work)

    return on


@pytest.fixture(scope="module")
def one_process(measured: Measured) -> Report:
    return measured("dp=1")


@pytest.mark.parametrize("layout", sorted({mutation.layout for mutation in MUTATIONS.values()}))
def test_a_layout_is_equal_as_it_is(layout: str, one_process: Report, measured: Measured) -> None:
    rows = compare(one_process, measured(layout, one_process.rollouts), "fp64")
    assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name: str, one_process: Report, measured: Measured) -> None:
    """By a difference that no rounding makes. What stops a rank, rather than giving wrong numbers, is an error here."""
    if name == PATCHED_IN_016 and not compat.VERSION.startswith("0.16."):
        pytest.skip("newer versions of Megatron-Core mark the experts' weights rightly by themselves")
    broken = measured(MUTATIONS[name].layout, one_process.rollouts, partial(mutated, name))
    noticed = [row.difference for row in compare(one_process, broken, "fp64") if not row.ok]
    assert max(noticed, default=0.0) > 0.1, f"{len(noticed)} rows differ: {noticed}"
