"""The section `algorithm`: the objective and what it compares."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_megatron.config.declarations import setting


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective. null takes the variant's value."""

    variant: str = setting("gspo", "A row of the table of algorithms, which docs/algorithms.md shows with its dials.")
    clip_low: float | None = setting(None, "The ratio is clipped below 1 - clip_low; in gmpo, its log below -clip_low.")
    clip_high: float | None = setting(
        None, "The ratio is clipped above 1 + clip_high; in gmpo, its log above clip_high."
    )
    kl_coef: float | None = setting(
        None,
        "Coefficient of the KL divergence to the starting policy. Above 0, a frozen copy of that policy is kept to "
        "score with.",
    )
    kl_estimator: str = setting(
        "k3",
        "Estimator of that divergence, by John Schulman's name for it. With +: its value, and the gradient of k2, "
        "which is that of the divergence.",
        choices=("k1", "k2", "k3", "k1+", "k3+"),
    )
    kl_in: str = setting(
        "loss",
        "Where that divergence counts: as a term of the loss, or subtracted from the reward before rewards become "
        "advantages: summed over a response, or, for each token in reinforce_pp, over the tokens from it on.",
        choices=("loss", "reward"),
    )
    entropy_coef: float = setting(0.0, "Coefficient of the entropy bonus.", least=0)
    dials: dict[str, float] = setting(
        {},
        "Parameters of the variant's dials by `dial.parameter`, such as {clip.low: 3e-4}; clip_low and clip_high are "
        "shorthand.",
    )
    advantage: str | None = setting(
        None,
        "How rewards become advantages: mean_std, mean, leave_one_out or mean_normalised over their group, "
        "batch_mean_std over the step, mean_batch_std with the group's mean and the step's deviation, or none.",
    )
    correction: str | None = setting(
        None,
        "Weights for tokens that another than the old policy has drawn, by the ratio of the two: token_tis, "
        "sequence_tis, token_mis, sequence_mis, icepop, geometric_mask, off_policy_mask; sequence_sum_tis and "
        "sequence_sum_mis take products in place of geometric means. docs/algorithms.md has the equations. null: none.",
    )
    drop_truncated: bool = setting(
        False,
        "Leave responses that rollout.max_new_tokens has cut out of the loss and its counts (DAPO's overlong "
        "filtering); they still count in the baseline of their group. DAPO's soft overlong punishment is the reward "
        "length (docs/rewards.md).",
    )
    updates_per_rollout: int = setting(
        4, "Mini-batches that a rollout batch is split into; each is used for one update.", least=1
    )
    old_log_probs: str = setting(
        "auto",
        "Source of the old log-probs. recompute: a forward of the trainer before the updates. auto: the same, except "
        "where a rollout batch has one update, whose own forward gives them. rollout: the sampler.",
        choices=("auto", "recompute", "rollout"),
    )
    sampling_mask: bool = setting(
        False,
        "Record which ids rollout.top_k and rollout.top_p kept for every sampled token, and score and train its "
        "probability among them: the distribution that was sampled. It takes 4 bytes for each id kept, which top_k "
        "bounds.",
    )
    routing_replay: str = setting(
        "none",
        "Records which experts tokens go to. compare: report how many go to others in the pass that scores old "
        "log-probs than in sampling (router/sampler_changed_fraction), and in updates than in that pass "
        "(router/changed_fraction). R2: updates use the experts of that pass. R3: both use those of the sampler.",
        choices=("none", "compare", "R2", "R3"),
    )
    router_shift_floor: float | None = setting(
        None,
        "Multiply each token's ratio, before it is averaged and clipped, by exp(-shift), but at least by this. Shift: "
        "how far the routers' log-probs of the token's experts have moved, on average over experts and layers (RSPO; "
        "0.8 there). null: do not.",
        above=0,
        below=1,
    )
