"""The stages of a step between its rollouts and its updates: advantages, packing, scores; and the loss of an update.

S  sequences      R  trained tokens
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, PackingRules, Rollout, RolloutGroup, Sequence, UpdateBatch
from gspo_megatron.base.errors import DataError
from gspo_megatron.base.metrics import LossTerms, Metric, merge, on_host, values
from gspo_megatron.base.protocols import Policy, Ranks
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.data.packing import Plan, pack
from gspo_megatron.data.sources import checked_tokens
from gspo_megatron.objective import KL_ESTIMATORS, PolicyObjective, Segments, group_advantages
from gspo_megatron.objective.corrections import drift_by_position, gap_to_sampler
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.sampled_experts import SampledExperts
from gspo_megatron.run.step_state import StepState, places_of_trained


def sequences_of(
    groups: Seq[RolloutGroup], algorithm: Algorithm, *, vocab_size: int, dtype: torch.dtype
) -> list[Sequence]:
    """One trainable sequence per rollout, group by group, with its advantage. Log-probs are of `dtype`.

    Raises:
        DataError: a token id that the embedding does not have, or a missing or wrong support.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    advantages = advantages_of(groups, [r.reward for r in rollouts], algorithm)
    sequences = []
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        tokens = checked_tokens(rollout.prompt, rollout.tokens, vocab_size)
        sequences.append(Sequence.after_prompt(tokens, length := len(rollout.prompt.tokens), advantage))
        for begin, end in rollout.outside:
            sequences[-1].trained[length + begin : length + end] = False
        column = "old_log_probs" if algorithm.old_log_probs == "sampler" else "sampler_log_probs"
        sequences[-1].columns[column] = torch.tensor(rollout.log_probs, dtype=dtype)
        if algorithm.masks_sampling:
            sequences[-1].columns["support"] = checked_support(rollout, vocab_size)
    return sequences


def advantages_of(groups: Seq[RolloutGroup], rewards: Seq[float], algorithm: Algorithm) -> list[float]:
    """Of each rollout, group by group."""
    group_ids = [i for i, g in enumerate(groups) for _ in g.rollouts]
    rewards_S = torch.tensor(rewards, dtype=torch.float64)
    advantages: list[float] = group_advantages(rewards_S, group_ids, baseline=algorithm.variant.baseline).tolist()
    return advantages


def checked_support(rollout: Rollout, vocab_size: int) -> Ragged:
    """The ids that every sampled token of a rollout was drawn from.

    Raises:
        DataError: they were not recorded, are not one list for each token, are no ids, or lack the token.
    """
    support, tokens = rollout.support, torch.tensor(rollout.sampled, dtype=torch.int64)
    if support is None:
        raise DataError(
            f"rollout {rollout.id} comes without the ids that top-k and top-p kept; what sampled it does not record "
            "them: set algorithm.sampling_mask=false, with rollout.top_k=0 and rollout.top_p=1"
        )
    if len(support) != len(tokens):
        raise DataError(
            f"rollout {rollout.id} has {len(tokens)} sampled tokens and kept ids for {len(support)} of them"
        )
    if len(bad := ((support.ids_E < 0) | (support.ids_E >= vocab_size)).nonzero()):
        raise DataError(
            f"rollout {rollout.id}: the kept id {int(support.ids_E[bad[0]])} is not an id in [0, {vocab_size})"
        )
    if len(lacking := support.lacks(tokens).nonzero()):
        place = int(lacking[0])
        raise DataError(
            f"rollout {rollout.id}: sampled token {place} (id {int(tokens[place])}) is not among the ids that it "
            "was drawn from; the recorded ids are of other tokens"
        )
    return support


@dataclass(frozen=True)
class Packer:
    """Sequences into this rank's micro-batches.

    Attributes:
        max_tokens, rules, cost: as in `data.packing.pack`.
        group_size, updates_per_rollout, seed: how a step's groups are split into mini-batches.
    """

    ranks: Ranks
    pad_id: int
    max_tokens: int
    rules: PackingRules
    cost: Callable[[int], float]
    group_size: int
    updates_per_rollout: int
    seed: int

    def pack(
        self,
        step: StepState,
        *,
        drop_zero_advantage: bool,
        drop_truncated: bool = False,
        experts: SampledExperts | None = None,
    ) -> None:
        """Splits the step into mini-batches of complete groups, shuffled by (seed, step), each packed for this rank.
        Sequences of advantage 0 may be dropped: they still count, and their term of the loss is 0 with gradient 0.
        Truncated responses may be dropped, too, and then count nowhere but in the baseline of their group. The
        `experts` that the sampler chose go with the sequences."""
        draws = random.Random(f"{self.seed}:{step.number}")
        # Sorted by draws: of Python's generator, only random() is guaranteed to stay the same across versions.
        order = [g for _, g in sorted((draws.random(), g) for g in range(len(step.groups)))]
        share, rollouts = len(order) // self.updates_per_rollout, step.rollouts
        for i in range(self.updates_per_rollout):
            groups = order[i * share : (i + 1) * share]
            members = [g * self.group_size + j for g in groups for j in range(self.group_size)]
            members = [n for n in members if not (drop_truncated and rollouts[n].truncated)]
            with_gradient = [n for n in members if step.sequences[n].advantage or not drop_zero_advantage]
            step.mini_batches.append(with_gradient)
            planned = partial(experts.deliver, members=with_gradient, sequences=step.sequences) if experts else None
            step.batches.append(
                self.update_batch(
                    [step.sequences[n] for n in with_gradient], [step.sequences[n] for n in members], planned
                )
            )
        if experts:
            experts.release(step.sequences)

    def update_batch(
        self,
        sequences: Seq[Sequence],
        all_sequences: Seq[Sequence] | None = None,
        planned: Callable[[Plan], None] | None = None,
    ) -> UpdateBatch:
        """This rank's micro-batches of an update on `sequences`, and the counts over all ranks that normalise its loss:
        those of `all_sequences`, by default the same. `planned`: as in `data.packing.pack`."""
        micro_batches = pack(
            sequences,
            pad_id=self.pad_id,
            max_tokens=self.max_tokens,
            rules=self.rules,
            cost=self.cost,
            dp_rank=self.ranks.dp_rank,
            dp_size=self.ranks.dp_size,
            cp_rank=self.ranks.cp_rank,
            cp_size=self.ranks.cp_size,
            planned=planned,
        )
        trained = [s.num_trained for s in (sequences if all_sequences is None else all_sequences) if s.num_trained]
        return UpdateBatch(micro_batches, num_sequences=len(trained), num_tokens=sum(trained))


def score(batches: Seq[UpdateBatch], policy: Policy, algorithm: Algorithm) -> None:
    """Fills in old log-probs, unless the sampler or the update computes them, the experts chosen meanwhile, and
    reference log-probs in the micro-batches of the updates, as the algorithm needs them."""
    micro_batches = [m for b in batches for m in b.micro_batches]
    scores: dict[str, dict[str, bool]] = {}
    if algorithm.scores_old:
        scores["old_log_probs"] = {"as_old": True}
    if algorithm.needs_reference:
        scores["ref_log_probs"] = {"reference": True}
    for column, how in scores.items():
        scored = policy.log_probs(micro_batches, **how)
        for micro_batch, log_probs_R in zip(micro_batches, scored, strict=True):
            micro_batch.columns[column] = log_probs_R


def penalise(step: StepState, algorithm: Algorithm, ranks: Ranks) -> None:
    """A = baseline(R'), R'_i = R_i - kl_coef sum_t KL(old || ref)_it        (2203.02155 Eq. 2, k1 of a whole response)

    Replaces the advantages of the step, whose batches hold all of its sequences, scored. Equal on all ranks."""
    shares: list[tuple[int, float]] = []
    for mini_batch, batch in zip(step.mini_batches, step.batches, strict=True):
        for m in batch.micro_batches:
            kl_R = _penalty_of(m, algorithm)
            kl_S = kl_R.new_zeros(len(m.index)).index_add(0, m.sequence_R.cpu(), kl_R)
            shares += zip([mini_batch[i] for i in m.index], kl_S.tolist(), strict=True)
    penalties = [0.0] * len(step.sequences)
    # Under context parallel a rank has a share of every sequence.
    for number, kl in ranks.gather(shares):
        penalties[number] += kl
    rewards = [rollout.reward - penalty for rollout, penalty in zip(step.rollouts, penalties, strict=True)]
    for sequence, advantage in zip(step.sequences, advantages_of(step.groups, rewards, algorithm), strict=True):
        sequence.advantage = advantage
    for mini_batch, batch in zip(step.mini_batches, step.batches, strict=True):
        for m in batch.micro_batches:
            m.advantages_S = m.advantages_S.new_tensor([step.sequences[mini_batch[i]].advantage for i in m.index])
    step.noted["kl/penalty"] = statistics.fmean(penalties)


def _penalty_of(m: MicroBatch, algorithm: Algorithm) -> Tensor:
    """kl_coef KL(old || ref) of each trained token, [R] float64."""
    of_old, of_ref = (m.columns[name].cpu().double() for name in ("old_log_probs", "ref_log_probs"))
    return algorithm.variant.kl_coef * KL_ESTIMATORS[algorithm.kl_estimator](of_old, of_ref)


def penalise_tokens(step: StepState, algorithm: Algorithm, ranks: Ranks) -> None:
    """A_it = baseline(G)_it over all trained tokens of the step, G_it = R_i - kl_coef sum_{s >= t} KL(old || ref)_is
    (2501.03262)

    Fills in `return_advantages`, in micro-batches that hold all sequences of the step, scored. The advantage of a
    sequence is the mean of its tokens', for what reports one. Equal on all ranks."""
    own = [(m, places_of_trained(m, first_S)) for m, first_S in step.micro_batches()]
    lengths = [len(s) for s in step.sequences]
    penalty_L = torch.zeros(sum(lengths), dtype=torch.float64)
    # Under context parallel a rank has a part of every sequence, but what follows a token is anywhere.
    for places_R, penalty_R in ranks.gather([(places_R, _penalty_of(m, algorithm)) for m, places_R in own]):
        penalty_L[places_R] = penalty_R
    after_L = torch.cat([of_one.flip(0).cumsum(0).flip(0) for of_one in penalty_L.split(lengths)])
    reward_L = torch.tensor([r.reward for r in step.rollouts], dtype=torch.float64).repeat_interleave(
        torch.tensor(lengths)
    )
    trained_L = torch.cat([s.trained for s in step.sequences])
    returns_R = (reward_L - after_L)[trained_L]
    advantages_L = torch.zeros_like(penalty_L)
    if len(returns_R):
        together = torch.zeros(len(returns_R), dtype=torch.int64)
        advantages_L[trained_L] = group_advantages(returns_R, together, baseline=algorithm.variant.baseline)
    for sequence, advantages in zip(step.sequences, advantages_L.split(lengths), strict=True):
        sequence.advantage = float(advantages.sum()) / max(sequence.num_trained, 1)
    for m, places_R in own:
        m.columns["return_advantages"] = advantages_L[places_R].to(m.columns["old_log_probs"])
    step.noted["kl/penalty"] = float(penalty_L.sum()) / len(step.rollouts)


def segments_of(micro_batch: MicroBatch, ranks: Ranks) -> Segments:
    """Which of its sequences each trained token belongs to."""
    return Segments.from_lengths(
        micro_batch.trained_lengths,
        index_R=micro_batch.sequence_R,
        over_ranks=ranks.sum_over_parts if ranks.cp_size > 1 else None,
        device=micro_batch.sequence_R.device,
    )


@dataclass(frozen=True)
class PolicyLoss:
    """The objective on a micro-batch (`Loss` of base/protocols.py)."""

    objective: PolicyObjective
    ranks: Ranks
    with_reference: bool
    with_token_advantages: bool = False

    def __call__(
        self, log_probs_R: Tensor, entropy_R: Tensor | None, micro_batch: MicroBatch, batch: UpdateBatch
    ) -> LossTerms:
        # The only update of a rollout batch starts from the old policy: the ratio is 1, with a gradient.
        old_log_probs_R = micro_batch.columns.get("old_log_probs", log_probs_R.detach())
        sampler_log_probs_R = micro_batch.columns.get("sampler_log_probs")
        loss, metrics = self.objective(
            log_probs_R,
            old_log_probs_R,
            micro_batch.advantages_S,
            segments_of(micro_batch, self.ranks),
            token_advantages_T=micro_batch.columns["return_advantages"] if self.with_token_advantages else None,
            sampler_log_probs_T=sampler_log_probs_R,
            ref_log_probs_T=micro_batch.columns["ref_log_probs"] if self.with_reference else None,
            entropy_T=entropy_R,
            router_shift_T=micro_batch.columns.get("router_shift"),
            num_sequences=batch.num_sequences,
            num_tokens=batch.num_tokens,
        )
        if sampler_log_probs_R is not None:
            gap_R, _ = gap_to_sampler(old_log_probs_R, sampler_log_probs_R)
            position_R = micro_batch.positions_T.index_select(0, micro_batch.rows_R) + 1
            metrics |= drift_by_position(gap_R, position_R, micro_batch.max_seqlen)
        return LossTerms(loss, metrics)


def reduced(updates: Seq[dict[str, Metric]], ranks: Ranks) -> dict[str, float]:
    """Metrics of several updates over all ranks; `loss` is the mean over the updates. Collective."""
    merged = merge(ranks.gather([on_host(merge(updates))]))
    # The longest sequence may reach a position with its padding only.
    found = values({name: m for name, m in merged.items() if m.weight or not name.startswith("sampler/drift/")})
    return found | {"loss": found["loss"] / len(updates)}


def ratio_noise(first_update: dict[str, Metric]) -> dict[str, Metric]:
    """max |ratio - 1| before anything is learned from the rollouts: numerical noise alone, to compare with the clip
    band. Empty except on the last pipeline stage, which alone has ratios."""
    if "ratio/min" not in first_update:
        return {}
    low, high = float(first_update["ratio/min"].total), float(first_update["ratio/max"].total)
    # -inf, the least of all, where no sequence has a gradient.
    return {"ratio/first_update_noise": Metric(max(1 - low, high - 1), reduction="max")}
