"""The loop on its own: a table policy with a true gradient, replicas in threads, no Megatron, no processes."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.base.errors import CheckpointError, ConfigError, DataError
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.build.checks import config_warnings
from gspo_megatron.config.loading import replaced
from gspo_megatron.data.order import OrderedPrompts
from gspo_megatron.monitor.catalogue import OF_THE_MACHINE
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.rollout.collective import CollectiveSource
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.step_state import StepState
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.testing.fakes import (
    TOKENIZER,
    Notebook,
    OneRank,
    Replicas,
    Shelf,
    TablePolicy,
    TableSampler,
    config_of,
    trainer_of,
)

KEYS_OF_A_STEP = [
    "step",
    "policy_version",
    "loss",
    "grad_norm",
    "lr",
    "reward/mean",
    "reward/std",
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "clip_fraction",
    "kl/old",
    "kl/ref",
    "entropy",
    "response_length/mean",
    "response_length/p50",
    "response_length/p90",
    "response_length/max",
    "truncated_fraction",
    "groups/zero_variance_fraction",
    "groups/all_right_fraction",
    "groups/all_wrong_fraction",
    "tokens",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "mfu",
    "time/rollout_s",
    "time/update_s",
    "time/step_s",
]
"""What the documentation promises in every row of metrics.jsonl."""


class Rows(RunWriter):
    """A writer that keeps its rows in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.samples: dict[int, list[dict[str, Any]]] = {}
        self.answers: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def metrics(self, row: Any) -> None:
        self.rows.append(dict(row))

    def rollouts(self, step: int, rows: Any) -> None:
        self.samples[step] = list(rows)

    def held_out(self, name: str, step: int, rows: Any) -> None:
        self.answers[name, step] = list(rows)


def run(*overrides: str, ranks: Ranks | None = None, **parts: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    """A whole fit; the trainer and its rows."""
    writer = Rows()
    trainer = trainer_of(config_of(*overrides), ranks, writer=writer, **parts)
    trainer.run()
    return trainer, writer.rows


def policy_of(trainer: Trainer) -> TablePolicy:
    assert isinstance(trainer.policy, TablePolicy)
    return trainer.policy


def sampler_of(trainer: Trainer) -> TableSampler:
    source = trainer.parts.source
    assert isinstance(source, CollectiveSource) and isinstance(source.sampler, TableSampler)
    return source.sampler


def prompts_of(trainer: Trainer) -> OrderedPrompts:
    return trainer.parts.warm_start.prompts


def warnings_of(trainer: Trainer) -> list[str]:
    assert isinstance(trainer.parts.console, Notebook)
    return trainer.parts.console.warnings


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(OF_THE_MACHINE)} for row in rows]


# --- rewards a user may bring, in a module that Python can import: this one ---

HERE = __name__


def shortness(*, prompt: str, response: str, answer: str) -> float:
    return -float(len(response))


def constant(*, prompt: str, response: str, answer: str) -> float:
    return 3.0


def nearly_constant(*, prompt: str, response: str, answer: str) -> float:
    return 1e-8 * len(response)


def breaks_at_a(*, prompt: str, response: str, answer: str) -> float:
    if answer == "a":
        raise RuntimeError("no a's today")
    return float(response == answer)


def not_a_number(*, prompt: str, response: str, answer: str) -> float:
    return math.nan


# --- the run as a whole ---


@pytest.mark.parametrize("variant", ["gspo", "gspo_sum", "gspo_token", "grpo"])
def test_the_reward_rises(variant: str) -> None:
    _, rows = run("train.steps=30", f"algorithm.variant={variant}")
    first, last = (sum(row["reward/mean"] for row in part) / 3 for part in (rows[1:4], rows[-3:]))
    assert first < 0.3 and rows[0]["eval/accuracy"] < 0.6
    assert last > 0.9 and rows[-1]["eval/accuracy"] == 1.0
    assert 0.1 < max(row["clip_fraction"] for row in rows[1:]) < 0.6


def test_every_row_has_the_keys_that_are_promised(tmp_path: Path) -> None:
    shelf, config = Shelf(), config_of("train.steps=5", "train.eval_every=2", "checkpoint.save_every=2")
    writer = RunWriter(tmp_path, first_step=0)
    trainer_of(config, writer=writer, checkpoints=shelf).run()

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["policy_version"] for row in rows] == [0, 2, 4, 6, 8, 10]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4, 5]
    for row in rows[1:]:
        assert set(KEYS_OF_A_STEP) <= set(row), set(KEYS_OF_A_STEP) - set(row)
        assert all(math.isfinite(row[key]) for key in KEYS_OF_A_STEP if key not in ("kl/ref", "mfu"))
        assert row["kl/ref"] is None
    assert [position for position, _ in shelf.saved] == [(0, step, 0) for step in (2, 4, 5)]
    assert [state.settings["train.steps"] for _, state in shelf.saved] == [5, 5, 5]

    samples = [json.loads(line) for line in (tmp_path / "rollouts" / "step_000003.jsonl").read_text().splitlines()]
    assert len(samples) == config.logging.rollouts_per_step
    for sample in samples:
        assert TOKENIZER.decode(sample["tokens"]) == sample["text"]
        assert sample["reward"] == float(sample["text"] == sample["answer"]) == sample["reward_terms"]["exact_match"]
        assert len(sample["log_probs"]) == len(sample["tokens"])
        assert sample["policy_version"] == 4


def test_the_stages_come_in_the_order_of_the_algorithm() -> None:
    trainer, _ = run("train.steps=2", "train.warm_start_steps=2", "train.warm_start_lr=0.5", "algorithm.kl_coef=0.1")
    step = ["sample", "log-probs", "reference log-probs", "update, lr 5", "update, lr 5"]
    assert policy_of(trainer).calls == [
        *["update, lr 0.5"] * 2,
        "begin, reference True",
        "sample greedily",
        *step * 2,
        "sample greedily",
    ]


def test_a_step_writes_what_it_did() -> None:
    """The numbers of a row, from the rollouts and rewards that were kept."""
    writer = Rows()
    config = config_of("train.steps=1", "logging.rollouts_per_step=-1", "reward.functions.format=-0.5")
    config = replaced(config, {"reward.functions": {**config.reward.functions, "exact_match": 2.0}})
    trainer_of(config, writer=writer).run()
    row, samples = writer.rows[1], writer.samples[1]
    n = len(samples)
    assert n == 8 * 4
    rewards = [2.0 * s["reward_terms"]["exact_match"] - 0.5 * s["reward_terms"]["format"] for s in samples]
    mean = sum(rewards) / n
    assert row["reward/mean"] == pytest.approx(mean)
    assert row["reward/std"] == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in rewards) / n))
    assert row["reward/exact_match"] == pytest.approx(sum(s["text"] == s["answer"] for s in samples) / n)
    assert row["truncated_fraction"] == pytest.approx(sum(s["tokens"][-1] != TOKENIZER.eos_id for s in samples) / n)
    assert row["response_length/mean"] == pytest.approx(sum(len(s["tokens"]) for s in samples) / n)
    assert row["tokens"] == sum(len(s["prompt"]) + len(s["tokens"]) for s in samples)
    for group in (samples[i : i + 4] for i in range(0, n, 4)):
        assert len({s["prompt_id"] for s in group}) == 1
        assert sum(s["advantage"] for s in group) == pytest.approx(0, abs=1e-12)


def test_the_loss_of_a_row_is_the_mean_over_its_updates() -> None:
    trainer, rows = run("algorithm.updates_per_rollout=4", "algorithm.entropy_coef=0.1", "train.warm_start_steps=5")
    losses = policy_of(trainer).losses[5:]
    means = [sum(losses[i : i + 4]) / 4 for i in range(0, 12, 4)]
    assert [row["loss"] for row in rows[1:]] == pytest.approx(means)
    assert len({round(loss, 6) for loss in losses}) == 12


def test_the_first_update_finds_ratio_one() -> None:
    _, rows = run("algorithm.updates_per_rollout=1")
    for row in rows[1:]:
        assert row["ratio/min"] == pytest.approx(1, abs=1e-12)
        assert row["ratio/max"] == pytest.approx(1, abs=1e-12)
        assert row["kl/old"] == pytest.approx(0, abs=1e-12)
        assert row["clip_fraction"] == 0


def test_later_updates_move_away_from_the_old_policy() -> None:
    _, rows = run("algorithm.updates_per_rollout=4")
    assert all(row["ratio/max"] > 1.001 and row["kl/old"] > 0 for row in rows[1:])


def test_the_reference_is_the_policy_as_the_first_step_found_it() -> None:
    _, rows = run("algorithm.kl_coef=0.1", "algorithm.updates_per_rollout=1", "train.warm_start_steps=3")
    assert rows[1]["kl/ref"] == pytest.approx(0, abs=1e-12)
    assert rows[2]["kl/ref"] > 1e-6
    assert rows[3]["kl/ref"] > rows[2]["kl/ref"]


def test_the_samplers_log_probs_are_used_when_asked_for() -> None:
    """The table sampler draws from the very policy, so both ways are the same run; only one of them scores."""
    recomputed, rows = run()
    reused, same_rows = run("algorithm.old_log_probs=rollout")
    assert policy_of(recomputed).calls.count("log-probs") == 3
    assert "log-probs" not in policy_of(reused).calls
    for row, same in zip(without_times(rows), without_times(same_rows), strict=True):
        assert {k: v for k, v in row.items() if not k.startswith("sampler/")} == pytest.approx(same, abs=1e-12)
    batch = policy_of(reused).batches[0].micro_batches[0]
    assert batch.columns.keys() == {"old_log_probs"}
    assert batch.columns["old_log_probs"].dtype == torch.float64


def test_the_distance_to_the_sampler_is_measured() -> None:
    """The table sampler draws from the very policy: 0 in float64, whoever computes the old log-probs."""
    for updates in (1, 4):
        trainer, rows = run(f"algorithm.updates_per_rollout={updates}")
        for row in rows[1:]:
            assert row["sampler/kl"] == pytest.approx(0, abs=1e-12) == row["sampler/drift/from_0"]
            assert row["sampler/far_fraction"] == row["sampler/not_finite"] == 0
        assert "sampler_log_probs" in policy_of(trainer).batches[0].micro_batches[0].columns
    assert not any(name.startswith("sampler/") for name in run("algorithm.old_log_probs=rollout")[1][1])


def test_a_correction_of_a_sampler_that_is_the_policy_changes_nothing() -> None:
    _, plain = run()
    _, corrected = run("algorithm.correction=token_tis")
    assert corrected[1]["sampler/weight"] == pytest.approx(1, abs=1e-12)
    for row, same in zip(without_times(plain), without_times(corrected), strict=True):
        assert {k: same[k] for k in row} == pytest.approx(row, abs=1e-12)


def test_truncated_responses_are_left_out_and_counted_nowhere() -> None:
    trainer, _ = run("algorithm.drop_truncated=true", "train.skip_zero_gradient=false")
    batches = policy_of(trainer).batches
    kept, _ = run("train.skip_zero_gradient=false")
    counts = [sum(b.num_sequences for b in of) for of in (batches, policy_of(kept).batches)]
    assert counts[0] < counts[1]
    for b in batches:
        assert b.num_sequences == sum(map(bool, (n for m in b.micro_batches for n in m.trained_lengths)))


# --- what goes wrong ---


@pytest.mark.parametrize("function", ["constant", "nearly_constant"])
def test_equal_rewards_teach_nothing_say_so_and_go_on(function: str) -> None:
    """`nearly_constant` differs by 1e-8, far below six digits of a metric, but not of itself: it does teach."""
    trainer, rows = run(
        f"reward.functions={{{HERE}:{function}: 1}}", f"train.steps={41 if function == 'constant' else 2}"
    )
    before = TablePolicy(OneRank()).logits_VV
    if function == "constant":
        assert {row["groups/zero_variance_fraction"] for row in rows[1:]} == {1.0}
        # There is nothing to average: 0 would read as a collapse.
        for key in ("entropy", "ratio/mean", "clip_fraction", "kl/old"):
            assert all(key not in row or math.isnan(row[key]) for row in rows[1:]), key
        assert all(row["grad_norm"] == 0 for row in rows[1:])
        assert torch.equal(policy_of(trainer).logits_VV, before)
        first, *later = warnings_of(trainer)
        assert "step 1, equal_rewards: within each group all rewards are equal (in the first of 8: 3)" in first
        assert [warning.partition(":")[0] for warning in later] == ["step 20, equal_rewards", "step 40, equal_rewards"]
        assert "as in the 19 steps before" in later[0]
    else:
        assert rows[1]["groups/zero_variance_fraction"] < 1
        assert not torch.equal(policy_of(trainer).logits_VV, before)
        assert warnings_of(trainer) == []


def test_a_group_of_one_teaches_nothing_and_says_so() -> None:
    trainer, rows = run("rollout.group_size=1", "train.steps=1")
    assert rows[1]["groups/zero_variance_fraction"] == 1.0
    assert rows[1]["grad_norm"] == 0
    assert len(warnings_of(trainer)) == 1


def test_a_reward_of_the_users_own() -> None:
    _, rows = run(f"reward.functions={{{HERE}:shortness: 1.0}}", "train.steps=25")
    assert rows[-1]["response_length/mean"] < rows[1]["response_length/mean"] - 0.5
    assert rows[-1][f"reward/{HERE}:shortness"] == rows[-1]["reward/mean"]


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "breaks_at_a",
            r"rollout \d+, prompt \d+ '[AB]*A': reward '[a-z._]*test_trainer:breaks_at_a' failed: .*no a's today",
        ),
        ("not_a_number", r"rollout \d+, prompt \d+ '.*': .*it returned nan; expected a finite number"),
    ],
)
def test_a_reward_that_fails_stops_every_replica_and_names_the_rollout(
    function: str, message: str, dp_size: int
) -> None:
    config = config_of(f"reward.functions={{{HERE}:{function}: 1}}")
    replicas = Replicas(dp_size)

    def fails(ranks: Ranks) -> bool:
        with pytest.raises(DataError, match=message):
            trainer_of(config, ranks).run()
        return True

    assert replicas.run(fails) == [True] * dp_size


class FullDisk:
    """`Exports` of base/protocols.py that cannot write."""

    def after(self, step: int) -> None:
        if step == 2:
            raise CheckpointError("no space left")

    def at_end(self, step: int) -> None:
        raise AssertionError("the run has ended before")


def test_a_folder_that_cannot_be_written_leaves_a_checkpoint() -> None:
    shelf = Shelf()
    with pytest.raises(CheckpointError, match="no space left"):
        trainer_of(config_of("train.steps=3"), checkpoints=shelf, exports=FullDisk()).run()
    assert shelf.saved[-1][0].steps == 2


def test_a_reward_that_fails_is_counted_when_configured() -> None:
    writer = Rows()
    config = config_of(
        f"reward.functions={{{HERE}:breaks_at_a: 1}}", "reward.on_error=count", "logging.rollouts_per_step=-1"
    )
    trainer_of(config, writer=writer).run()
    assert len(writer.rows) == 4
    for row in writer.rows[1:]:
        samples = writer.samples[row["step"]]
        failed = [s for s in samples if s["answer"] == "a"]
        assert row["reward/errors"] == len(failed) > 0
        assert all(s["reward"] == 0 and "no a's today" in s["reward_error"] for s in failed)
        assert not any(s["reward_error"] for s in samples if s["answer"] != "a")


def test_ids_beyond_the_tokenizer_are_tokens_but_no_text() -> None:
    """A vocabulary rounded up: the policy draws what the tokenizer does not know."""
    policy = TablePolicy(OneRank(), vocab_size=TOKENIZER.vocab_size + 6)
    writer = Rows()
    config = config_of("logging.rollouts_per_step=-1", f"model.vocab_size={TOKENIZER.vocab_size + 6}")
    trainer_of(config, policy=policy, writer=writer).run()
    samples = [s for step in writer.samples.values() for s in step]
    unknown = [s for s in samples if max(s["tokens"]) >= TOKENIZER.vocab_size]
    assert len(unknown) > 10
    for sample in unknown:
        known = [t for t in sample["tokens"] if t < TOKENIZER.vocab_size]
        assert sample["text"] == TOKENIZER.decode(known)
        assert len(sample["log_probs"]) == len(sample["tokens"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.variant=gpso", "variant 'gpso' is unknown; did you mean 'gspo'?"),
        ("algorithm.kl_coef=-1", "kl_coef=-1.0"),
        ("reward.accuracy=format", "reward.accuracy='format' is not one of the rewards exact_match"),
        ("reward.functions.exakt_match=1", "unknown reward 'exakt_match'; did you mean 'exact_match'?"),
    ],
)
def test_names_that_nothing_answers_to(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trainer_of(config_of(override))
    assert message in str(caught.value)


def test_a_clip_range_that_cannot_act_is_a_warning() -> None:
    config = config_of("algorithm.clip_low=0.2", "algorithm.clip_high=0.2")
    (warning,) = [note for note in config_warnings(config, Algorithm.of(config)) if "clip" in note]
    assert "clip_low=0.2" in warning and "too wide to act" in warning


def test_a_step_is_gone_before_the_next_one_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns take memory of the device."""
    steps: list[weakref.ref[StepState]] = []
    alive: list[int] = []
    sample, update = Trainer.sample, Trainer.update

    def sampling(self: Trainer, number: int) -> Any:
        alive.append(sum(step() is not None for step in steps))
        return sample(self, number)

    def updating(self: Trainer, step: StepState) -> Any:
        steps.append(weakref.ref(step))
        return update(self, step)

    monkeypatch.setattr(Trainer, "sample", sampling)
    monkeypatch.setattr(Trainer, "update", updating)
    run("train.steps=3")
    assert alive == [0, 0, 0]
