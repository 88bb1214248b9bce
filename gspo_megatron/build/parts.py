"""Assembles the parts of a run on this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from gspo_megatron.base.batches import Held, Taken
from gspo_megatron.base.errors import plural
from gspo_megatron.base.protocols import Checkpoints, Exports, Policy, Ranks, Sampler
from gspo_megatron.build.environments import in_conversation
from gspo_megatron.build.inputs import Inputs, ModelInputs
from gspo_megatron.data.curriculum import Curriculum
from gspo_megatron.data.order import OrderedPrompts
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.models.counts import sequence_cost
from gspo_megatron.monitor.console import Console
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.rollout.buffered import BufferedSource
from gspo_megatron.rollout.collective import CollectiveSource
from gspo_megatron.rollout.dynamic_sampling import DynamicSampling
from gspo_megatron.rollout.source import RolloutSource
from gspo_megatron.run.evaluation import Evaluation
from gspo_megatron.run.guards import Guards
from gspo_megatron.run.save_request import SaveRequest
from gspo_megatron.run.stages import Packer
from gspo_megatron.run.state import Contents, GuardState
from gspo_megatron.run.throughput import Throughput
from gspo_megatron.run.trainer import Parts
from gspo_megatron.run.warm_start import WarmStart


def never() -> bool:
    return False


def assemble(
    inputs: Inputs,
    policy: Policy,
    sampler: Sampler,
    ranks: Ranks,
    *,
    console: Console,
    writer: RunWriter | None = None,
    checkpoints: Checkpoints | None = None,
    exports: Exports | None = None,
    guards: GuardState | None = None,
    taken: Taken | None = None,
    held: Held | None = None,
    contents: Contents | None = None,
    peak_flops: float | None = None,
    stop: Callable[[], bool] = never,
    note: Callable[[str], None] = lambda where: None,
    served: Callable[..., RolloutSource] | None = None,
) -> Parts:
    """The parts that a trainer drives, around a policy, a sampler and the processes of a run. `served`: makes the
    source of rollouts in place of the sampler. `taken`, `held`: what the run has used up, and what it has sampled for
    steps to come, if it continues. `contents`: of what it reads. `peak_flops`: of one GPU, where it is known."""
    config, algorithm = inputs.config, inputs.algorithm
    r, vocab_size = config.rollout, config.model.vocab_size
    assert vocab_size is not None, "settle sets model.vocab_size"
    # The ids below those of one step are free: checkpoints of earlier versions count from there.
    taken = taken or Taken(0, r.prompts_per_step * r.group_size)
    curriculum = None
    visits, retry = config.data.curriculum, config.data.curriculum_retry
    if visits:
        curriculum = Curriculum(visits, retry, inputs.rewards.accuracy)
        curriculum.restore(taken.curriculum)
    prompts = OrderedPrompts(inputs.train_prompts, config.run.seed, taken.prompts, curriculum)
    answered = in_conversation(sampler, inputs.environment, config, inputs.tokenizer, ranks)
    source: RolloutSource = (served or partial(CollectiveSource, sampler=answered))(
        ranks=ranks,
        reward=inputs.rewards,
        tokenizer=inputs.tokenizer,
        prompts=prompts,
        next_id=taken.rollouts,
        prompts_per_step=r.prompts_per_step,
        group_size=r.group_size,
        vocab_size=vocab_size,
    )
    if isinstance(source, BufferedSource):
        source.saved = held
    elif held and held.about["groups"]:
        console.warn(
            f"rollout.max_lag=0: {plural(len(held.about['groups']), 'group')} that the run had sampled ahead, with the "
            "lag it had, are dropped"
        )
    if r.dynamic_sampling:
        source = DynamicSampling(source, r.prompts_per_step, r.dynamic_sampling, inputs.rewards.accuracy)
    packer = packer_of(inputs, ranks)
    watch = Guards(config, ranks, writer, console.warn, guards)
    asked_by = Path(config.run.dir) / "save" if ranks.is_main else None
    return Parts(
        config=config,
        algorithm=algorithm,
        ranks=ranks,
        policy=policy,
        source=source,
        packer=packer,
        warm_start=WarmStart(config, policy, ranks, prompts, inputs.tokenizer, packer, watch, console, note),
        evaluation=Evaluation(source, inputs.sets, writer, config.eval.rollouts),
        accuracy=inputs.rewards.accuracy,
        guards=watch,
        contents=contents or Contents({}, inputs.train_prompts.size),
        console=console,
        writer=writer,
        checkpoints=checkpoints,
        exports=exports,
        save_request=SaveRequest(every_s=config.checkpoint.save_every_s, file=asked_by),
        throughput=Throughput(
            packer.cost, algorithm.scores_old + algorithm.needs_reference, inputs.layout.world_size, peak_flops
        ),
        stop=stop,
        note=note,
    )


def packer_of(inputs: ModelInputs, ranks: Ranks) -> Packer:
    config = inputs.config
    return Packer(
        ranks=ranks,
        pad_id=inputs.tokenizer.pad_id,
        max_tokens=config.train.tokens_per_micro_batch,
        rules=packing_rules(config),
        cost=sequence_cost(config.model.shape),
        group_size=config.rollout.group_size,
        updates_per_rollout=inputs.algorithm.updates_per_rollout,
        seed=config.run.seed,
    )
