"""Every metric of metrics.jsonl: its formula, what it warns of, and its place in TensorBoard and wandb.

`make docs` writes docs/metrics.md from this table; a test compares it with a run."""

from __future__ import annotations

import re
from typing import NamedTuple


class Entry(NamedTuple):
    """A metric, or several whose keys differ in an upper-case word.

    Attributes:
        board: the group it is drawn in; empty: not drawn.
        formula: what it is, over what.
        watch: what it warns of.
    """

    key: str
    board: str
    formula: str
    watch: str = ""

    def names(self, key: str) -> bool:
        """Whether `key` is this entry's, or one of them."""
        pattern = re.sub(r"[A-Z]+", lambda word: r"\d+" if word[0] == "NN" else ".+", re.escape(self.key))
        return re.fullmatch(pattern, key) is not None


OF_THE_MACHINE = ("time/", "tokens_per_second", "mfu", "memory/", "engine/sync_s")
"""Beginnings of the keys that the machine decides, not the run: equal runs differ in them."""

CATALOGUE = (
    Entry("step", "", "The step, from 1. Row 0 is the evaluation before the first step, after the warm start."),
    Entry("policy_version", "train", "Updates completed after the step."),
    Entry("warm_start/loss", "train", "Row 0: -mean log p of the solutions' tokens in the warm start's last update."),
    # Rewards.
    Entry(
        "reward/mean", "reward", "Mean over all rollouts of the weighted sum of reward functions.", "The one to watch."
    ),
    Entry(
        "reward/std",
        "reward",
        "Its standard deviation over all n rollouts, dividing by n.",
        "Near 0: nothing to learn from.",
    ),
    Entry(
        "reward/errors",
        "reward",
        "Rollouts whose reward raised or was not finite (reward.on_error=count), or was lost.",
        "Above 0: a fault in a reward function; rollouts/ has its message.",
    ),
    Entry(
        "reward/lost",
        "reward",
        "Of them, those whose process hung, ended, printed too much or ran out of memory. Their reward is 0; when "
        "they are more than half of a step's rollouts, the run stops.",
        "Growing: see reward.timeout_s and reward.memory_gib.",
    ),
    Entry(
        "reward/mean/SOURCE",
        "reward",
        "reward/mean over the rollouts of one source of data.train, where sources have names.",
        "One that stands still: its weight is better given to another.",
    ),
    Entry("accuracy/SOURCE", "reward", "accuracy over the rollouts of one source."),
    Entry("prompts/set_aside", "reward", "Prompts that data.curriculum sets aside after this step, of those visited."),
    Entry("prompts/SOURCE", "", "Prompts of the step that are of one source."),
    Entry(
        "reward/NAME",
        "reward",
        "Mean of one reward function, without its weight. NAME/PART: of another number that it returns, over the "
        "rollouts for which it does.",
        "Constant: it teaches nothing.",
    ),
    Entry("accuracy", "reward", "Share of rollouts for which the function of reward.accuracy gives 1 or more."),
    Entry("eval/accuracy", "reward", "The same on the held-out prompts, each answered greedily, where measured."),
    Entry(
        "eval/reward",
        "reward",
        "Mean reward of those answers.",
        "Falls while reward/mean rises: the policy overfits the training prompts.",
    ),
    Entry(
        "eval/unscored_fraction",
        "reward",
        "Share of those answers whose reward failed or was lost; they count as wrong.",
        "Above 0: eval/accuracy is too low by up to that.",
    ),
    Entry(
        "eval/SET/accuracy",
        "reward",
        "Of a set of eval.sets: the share of correct responses, mean over its prompts (mean@n).",
        "Falls while accuracy rises: the policy overfits.",
    ),
    Entry("eval/SET/accuracy_low", "reward", "Lower end of its 95 % interval (docs/evaluation.md)."),
    Entry("eval/SET/accuracy_high", "reward", "Upper end of it."),
    Entry("eval/SET/reward", "reward", "Mean reward of the set's responses."),
    Entry(
        "eval/SET/pass@NN",
        "reward",
        "Probability that one of k responses is correct, without bias: 1 - C(n - c, k) / C(n, k), c of n correct; mean "
        "over the prompts.",
        "Falls while accuracy rises: responses lose their variety.",
    ),
    Entry("eval/SET/maj@NN", "reward", "Probability that the most frequent answer of k responses is correct."),
    Entry("eval/SET/response_length", "reward", "Mean tokens of the set's responses."),
    Entry("eval/SET/truncated_fraction", "reward", "Share of them cut at max_new_tokens."),
    Entry("eval/SET/unscored_fraction", "reward", "Share of them whose reward failed or was lost; they are wrong."),
    Entry(
        "groups/zero_variance_fraction",
        "reward",
        "Share of groups in which all advantages are 0.",
        "Near 1: prompts are too easy or too hard for a gradient.",
    ),
    Entry("groups/all_right_fraction", "reward", "Share of groups in which every rollout is correct.", "Too easy."),
    Entry("groups/all_wrong_fraction", "reward", "Share of groups in which none is.", "Too hard."),
    # Rollouts ahead of the trainer (rollout.max_lag).
    Entry("lag/mean", "reward", "Steps between the beginning of a group and the step that trains on it, mean."),
    Entry("lag/max", "reward", "The largest of them, at most rollout.max_lag."),
    Entry(
        "lag/swept",
        "reward",
        "Groups that grew too old since the last step; their prompts are sampled anew.",
        "Above 0, often: long responses are lost. Raise rollout.max_lag, or add engines.",
    ),
    Entry(
        "lag/older_tokens",
        "reward",
        "Share of tokens from older weights than those the step begins with.",
        "sampler/kl says how far these weights are.",
    ),
    # Dynamic sampling (rollout.dynamic_sampling). All other numbers are of the groups that the step trains on.
    Entry(
        "groups/rounds",
        "reward",
        "Rounds of sampling of the step.",
        "1 + rollout.dynamic_sampling: the bound is reached.",
    ),
    Entry(
        "groups/kept_fraction",
        "reward",
        "Share of the sampled groups whose rewards differ.",
        "Falling: few prompts still teach, and a step costs its inverse.",
    ),
    Entry("groups/dropped_all_right", "reward", "Groups with equal rewards in which every rollout is correct."),
    Entry("groups/dropped_all_wrong", "reward", "Groups with equal rewards in which none is."),
    Entry(
        "groups/surplus", "reward", "Groups whose rewards differ beyond rollout.prompts_per_step; they are not used."
    ),
    Entry(
        "groups/filled",
        "reward",
        "Groups with equal rewards that complete the batch, since the bound was reached.",
        "Above 0, often: raise rollout.dynamic_sampling, or change the prompts.",
    ),
    Entry("groups/unused_tokens", "time", "Tokens of the responses that were sampled and are not trained on."),
    # Responses.
    Entry("response_length/mean", "reward", "Tokens of a response with its EOS; mean over all rollouts."),
    Entry("response_length/p50", "reward", "Their median."),
    Entry("response_length/p90", "reward", "Their 90th percentile, interpolated."),
    Entry(
        "response_length/max",
        "reward",
        "The longest response.",
        "Far above p90: a few responses decide how long sampling takes.",
    ),
    Entry(
        "truncated_fraction",
        "reward",
        "Share of responses cut at rollout.max_new_tokens.",
        "Growing: responses have no end, or no room.",
    ),
    # Conversations: where rollout.environment answers.
    Entry("turns/mean", "turns", "Turns of the model in a rollout; mean over all rollouts.", "1: it calls no tool."),
    Entry("turns/max", "turns", "The most turns of a rollout.", "rollout.max_turns: some were cut there."),
    Entry(
        "turns/outside_tokens",
        "turns",
        "Tokens of a rollout that are not the model's: what the environment said; mean over all rollouts. No "
        "other length than `tokens` counts them.",
        "Growing: long answers take the room of rollout.max_new_tokens.",
    ),
    Entry("tools/calls", "turns", "Tools called in a rollout; mean over all rollouts."),
    Entry(
        "tools/errors",
        "turns",
        "Calls of the step without a result, such as a division by 0. The model reads that they failed.",
        "Not falling: the model does not learn how a tool is called.",
    ),
    Entry(
        "environment/errors",
        "turns",
        "Rollouts that ended because the environment failed: it raised, hung, or answered what cannot be used. When "
        "they are more than half of a step's rollouts, the run stops.",
        "Above 0: a fault in the environment; rollouts/ has its message.",
    ),
    Entry("tokens", "time", "Tokens of all prompts and responses of the step."),
    # The update. Live: of sequences that the updates train on.
    Entry(
        "loss",
        "train",
        "Mean of the step's updates of the objective's loss. Near 0 while ratios are near 1 (one update a rollout "
        "batch, or the first of several) in the rows with the aggregate sequence_mean and the clip ppo or log, such as "
        "gspo and grpo, but for a KL or entropy term. Not in the others, such as dapo, luspo, cispo and sapo, which "
        "count sequences by their length, weigh log-probs, or differ by the sign of the advantage; docs/algorithms.md "
        "has the rows. Progress shows in reward/mean, not here.",
    ),
    Entry(
        "grad_norm",
        "train",
        "Mean over the step's updates of the gradient's norm before clipping.",
        "A jump: see guards.grad_norm_spike. 0: nothing is learned.",
    ),
    Entry("lr", "train", "Learning rate of the step's last update."),
    Entry(
        "ratio/mean",
        "train",
        "Mean of the ratio, over live sequences in gspo, gspo_sum, luspo, gmpo and vespo, over live tokens otherwise.",
        "Not near 1.",
    ),
    Entry("ratio/min", "train", "Smallest ratio of the step."),
    Entry("ratio/max", "train", "Largest ratio of the step."),
    Entry(
        "ratio/first_update_noise",
        "train",
        "max |ratio - 1| in the step's first update, before anything is learned from its rollouts.",
        "Not far below the clip band: numerical noise decides what is clipped. See guards.ratio_noise.",
    ),
    Entry(
        "clip_fraction",
        "train",
        "Share of live tokens whose gradient the clip removes; in cispo, whose weight it bounds.",
        "Above 0.33: the band is too narrow for these updates. 0 for ever: it never acts.",
    ),
    Entry("clip_fraction_low", "train", "Of them, below 1 - clip_low (advantage < 0)."),
    Entry("clip_fraction_high", "train", "Of them, above 1 + clip_high (advantage > 0)."),
    Entry(
        "kl/old",
        "train",
        "k3 estimate of KL(old || policy), mean over live tokens.",
        "Growing: the step's updates move too far.",
    ),
    Entry(
        "kl/ref",
        "train",
        "Estimate (algorithm.kl_estimator) of KL(policy || reference), mean over live tokens; null without a "
        "reference.",
        "Growing without reward: the policy drifts.",
    ),
    Entry(
        "kl/penalty",
        "train",
        "Mean over all rollouts of what algorithm.kl_in=reward subtracts from the reward: algorithm.kl_coef times the "
        "estimated KL of a whole response. reward/mean is without it.",
        "As large as the differences between rewards: the policy learns to stay where it is.",
    ),
    Entry(
        "entropy",
        "train",
        "Mean over live tokens of the entropy of the distribution they were drawn from, in nats.",
        "Near 0: the policy has collapsed; large and growing: it dissolves.",
    ),
    # The sampler. Old: the policy at the start of the step, as the trainer scores it.
    Entry(
        "sampler/kl",
        "sampler",
        "k3 estimate of KL(sampler || old), mean over live tokens: the distance between what drew the tokens and what "
        "the ratios start from.",
        "0 in float64 where the training model samples; the share of a clip band that it takes is lost to noise.",
    ),
    Entry(
        "sampler/kl_reverse",
        "sampler",
        "mean(rho log rho - rho + 1), rho = old / sampler: the other direction.",
        "Far above sampler/kl: tokens that the sampler deems unlikely, and the policy does not.",
    ),
    Entry(
        "sampler/far_fraction",
        "sampler",
        "Share of live tokens with rho above 2 or below 1/2.",
        "Above 0.1: collapse is near (2510.11370).",
    ),
    Entry(
        "sampler/drift/from_NN",
        "sampler",
        "Mean |log rho| of live tokens from this position of their sequence on, up to the next of 64, 256, 1024, ...",
        "Growing with the position: errors add up along the response.",
    ),
    Entry(
        "engine/probe_gap",
        "sampler",
        "With rollout.engine=vllm: the largest distance between an engine's log-prob of a token and the trainer's, in "
        "the sequence that both score after each change of weights.",
        "Growing: an engine computes in another way than the trainer; engine.probe_limit stops the run.",
    ),
    Entry(
        "engine/sync_s",
        "sampler",
        "Seconds in which the last new weights came to the engines, and were probed; a part of time/rollout_s, or of "
        "an evaluation before it.",
    ),
    Entry("sampler/not_finite", "sampler", "Tokens without a number from the sampler; their rho is taken as 1."),
    Entry(
        "sampler/weight",
        "sampler",
        "Mean weight of algorithm.correction over live tokens.",
        "Far below 1: little is left.",
    ),
    Entry(
        "sampler/left_out_fraction",
        "sampler",
        "Share of live tokens whose weight is 0.",
        "Growing; above half, little is learned.",
    ),
    Entry("guards/skipped_updates", "train", "Updates that a guard left out.", "Above 0: guards/ has their rollouts."),
    # The router.
    Entry(
        "router/max_load/layer_NN",
        "router",
        "max(n) / mean(n), n the numbers of rows that each expert of the layer got; mean over the step's updates. Only "
        "rows that predict a live token count.",
        "1 is even; near experts / top-k: every token goes to the same ones.",
    ),
    Entry(
        "router/dead_experts/layer_NN", "router", "Experts that got none, mean over the updates.", "Growing: collapse."
    ),
    Entry(
        "router/entropy/layer_NN",
        "router",
        "-sum(p ln p) / ln(experts), p = n / sum(n), mean over the updates.",
        "1 is even, 0 is one expert.",
    ),
    Entry(
        "router/changed_fraction/layer_NN",
        "router",
        "Share of the updates' tokens whose experts are not those that the policy at the start of the step chose, or "
        "under R3 the sampler (algorithm.routing_replay), which gives the last token of a rollout none to compare.",
        "The larger, the more a ratio compares two different networks.",
    ),
    Entry(
        "router/sampler_changed_fraction/layer_NN",
        "router",
        "Share of the tokens that the policy at the start of the step, which scores old log-probs, sends to other "
        "experts than the sampler did (algorithm.routing_replay: compare, R3).",
        "0 in float64. Number formats, other batch shapes and another engine raise it.",
    ),
    Entry(
        "router/shift/layer_NN",
        "router",
        "Mean over the updates' tokens of |log p - log p_old|, averaged over a token's recorded experts: the router's "
        "log-probs now, and in the policy at the start of the step (algorithm.routing_replay=compare, "
        "algorithm.router_shift_floor).",
        "RSPO's drift (arXiv 2510.23027).",
    ),
    Entry(
        "router/shift_weight",
        "router",
        "Mean factor of the ratios, exp(-mean shift over layers) or the floor (algorithm.router_shift_floor).",
        "1: the routers have not moved.",
    ),
    Entry("router/shift_floor_fraction", "router", "Share of tokens whose factor is the floor."),
    # Speed and memory.
    Entry("tokens_per_second", "time", "tokens / time/step_s."),
    Entry("tokens_per_second_per_gpu", "time", "The same divided by the number of processes."),
    Entry(
        "mfu",
        "time",
        "Model FLOPs utilisation: model FLOPs / (time/step_s * processes * peak). Model FLOPs are a forward of every "
        "rollout to sample it, one of each live sequence for each scoring, and three for its update, without padding "
        "and recomputation; the peak is that of the GPU's data sheet in precision.dtype, or in FP8 where that is "
        "on. null where it is not known, as on a CPU.",
        "It falls with short responses, and where decoding takes most of a step.",
    ),
    Entry(
        "memory/peak_gib",
        "time",
        "Largest memory of any process since it started, in GiB: allocated on the GPU, or resident on a CPU.",
        "Near the GPU's memory: the next longer response may not fit.",
    ),
    Entry("time/step_s", "time", "Seconds of the step, without evaluation and saving."),
    Entry("time/rollout_s", "time", "Of them, sampling and rewards."),
    Entry("time/log_probs_s", "time", "Of them, scoring."),
    Entry("time/update_s", "time", "Of them, updates."),
    Entry("time/checkpoint_s", "time", "Seconds that the step waited for the save before it."),
    Entry("time/eval_s", "time", "Seconds of the evaluation after it."),
)


def entry_of(key: str) -> Entry | None:
    """The most exact entry of a key: `reward/mean` is not a reward function of that name."""
    exact = next((entry for entry in CATALOGUE if entry.key == key), None)
    return exact or next((entry for entry in CATALOGUE if entry.names(key)), None)


def board_name(key: str) -> str:
    """The key as it is drawn: its group, and the key without it."""
    entry = entry_of(key)
    group = entry.board if entry else "train"
    return f"{group}/{key.removeprefix(f'{group}/').replace('/', '_')}"
