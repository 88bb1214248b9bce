"""Held-out sets in the loop: metrics, random numbers, the best checkpoint and the early stop, with fakes."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup, Sampling
from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.rewards.functions import NotJudged
from gspo_megatron.rewards.rewards import Rewards, score_rollouts
from gspo_megatron.run.best import Record, Records
from gspo_megatron.run.estimates import estimate, majority_at_k, pass_at_k
from gspo_megatron.run.evaluation import Answered, EvalSet
from gspo_megatron.run.evaluation_table import markdown, table_of
from gspo_megatron.run.state import RunState
from gspo_megatron.testing.fakes import Notebook, OneRank, Prompts, Replicas, Shelf, TablePolicy, config_of, trainer_of
from tests.run.test_trainer import Rows, without_times

SAMPLED = Sampling(0.7, 0.9, 3, 2, seed=5)


def set_of(name: str = "hard", **how: Any) -> EvalSet:
    given = {"sampling": SAMPLED, "n": 4, "k": (1, 3), "size": 5} | how
    return EvalSet(name, Prompts(seed=2), reward=Rewards({"exact_match": 1.0}), **given)


def run(*overrides: str, ranks: Ranks | None = None, sets: tuple[EvalSet, ...] = ()) -> Rows:
    writer = Rows()
    trainer_of(config_of(*overrides), ranks, writer=writer, more_sets=sets).run()
    return writer


def test_a_set_has_metrics_of_its_own_and_takes_nothing_from_training() -> None:
    """The same on any number of replicas; the rows of training are those without it."""
    alone, with_set = run("train.eval_every=2"), run("train.eval_every=2", "eval.rollouts=-1", sets=(set_of(),))
    assert [row["step"] for row in with_set.rows if "eval/hard/accuracy" in row] == [0, 2, 3]
    for row, same in zip(without_times(alone.rows), without_times(with_set.rows), strict=True):
        assert row == {key: value for key, value in same.items() if not key.startswith("eval/hard/")}
    assert [len(alone.answers["", step]) for step in (0, 2, 3)] == [7, 7, 7]

    answers = with_set.answers["hard", 2]
    assert [a["prompt_id"] for a in answers] == [i for i in range(5) for _ in range(4)]
    groups = [answers[i : i + 4] for i in range(0, 20, 4)]
    assert all(a["correct"] == (a["response"].strip() == a["answer"]) == a["reward"] for a in answers)
    assert len({tuple(a["response"] for a in group) for group in groups}) > 1 and max(a["length"] for a in answers) <= 2
    means = [statistics.fmean(a["correct"] for a in group) for group in groups]
    found = {key.removeprefix("eval/hard/"): v for key, v in with_set.rows[2].items() if key.startswith("eval/hard/")}
    votes = [([a["answered"] for a in g], [float(a["correct"]) for a in g]) for g in groups]
    assert found == {
        "accuracy": pytest.approx(statistics.fmean(means)),
        "accuracy_low": estimate(means).low,
        "accuracy_high": estimate(means).high,
        "reward": pytest.approx(statistics.fmean(means)),
        "pass@1": pytest.approx(statistics.fmean(means)),
        "pass@3": pytest.approx(statistics.fmean(pass_at_k(4, int(4 * mean), 3) for mean in means)),
        "maj@1": pytest.approx(statistics.fmean(majority_at_k(*vote, 1) for vote in votes)),
        "maj@3": pytest.approx(statistics.fmean(majority_at_k(*vote, 3) for vote in votes)),
        "response_length": statistics.fmean(a["length"] for a in answers),
        "truncated_fraction": statistics.fmean(a["truncated"] for a in answers),
        "unscored_fraction": 0.0,
    }
    several = Replicas(3).run(
        lambda ranks: run("train.eval_every=2", "eval.rollouts=-1", ranks=ranks, sets=(set_of(),))
    )
    for writer in several:
        assert writer.answers["hard", 0] == with_set.answers["hard", 0]


def test_the_seed_alone_decides_what_is_drawn() -> None:
    one, same = (run("train.steps=0", sets=(set_of(),)).answers["hard", 0] for _ in range(2))
    other = run("train.steps=0", sets=(set_of(sampling=SAMPLED._replace(seed=6)),)).answers["hard", 0]
    assert one == same != other


# --- the best checkpoint, and the early stop ---

METRIC = "eval/hard/accuracy"
WATCHED = (
    *("train.steps=12", "train.eval_every=2", "algorithm.updates_per_rollout=2", "optimizer.lr=30"),
    *(f"checkpoint.keep_best={METRIC}", f"eval.stop_metric={METRIC}", "eval.patience=2"),
)


def watched(ranks: Ranks, stops: list[int]) -> tuple[Rows, list[tuple[int, int | None]], dict[str, Record]]:
    """A run that is told to stop when it asks for the n-th time, for each n, and then continued: its rows, (step, best
    step) of its saves, and its records at the end."""
    policy, writer, state, saves = TablePolicy(ranks), Rows(), None, []
    for n in [*stops, 0]:
        asked, shelf = itertools.count(1), Shelf(ranks)
        trainer = trainer_of(
            config_of(*WATCHED, f"checkpoint.load={'latest' if state else 'none'}"),
            ranks,
            policy,
            writer=writer,
            checkpoints=shelf,
            state=state,
            more_sets=(set_of(),),
            stop=lambda asked=asked, n=n: next(asked) == n,
        )
        done = trainer.run()
        assert done == (n == 0)
        saves += [(at.steps, best and best.steps) for (at, _), best in zip(shelf.saved, shelf.best, strict=True)]
        state = shelf.saved[-1][1] if shelf.saved else state
    assert state is not None
    return writer, saves, dict(state.records)


@pytest.mark.parametrize(("size", "stops"), [(1, ([3], [5, 4, 2], [1, 2, 3])), (2, ([4],))])
def test_the_best_is_kept_and_the_run_ends_when_nothing_gets_better(size: int, stops: tuple[list[int], ...]) -> None:
    """Exactly so when the run is stopped on the way and continued."""
    for writer, saves, records in Replicas(size).run(lambda ranks: watched(ranks, [])):
        measured = {row["step"]: row[METRIC] for row in writer.rows if METRIC in row}
        best = max(measured, key=lambda step: (measured[step], -step))
        last = max(measured)
        assert 0 < best < last < 12 and last == best + 4, "two evaluations after the best, and not the whole run"
        assert records == {METRIC: Record(measured[best], best, since=2)}
        rising = [s for s in measured if all(measured[s] > measured[t] for t in measured if t < s)]
        assert saves == [*((s, s) for s in rising), (last, best)]
    for at in stops:
        for again, _, same in Replicas(size).run(lambda ranks, at=at: watched(ranks, at)):
            assert same == records
            assert without_times(again.rows) == (
                without_times(writer.rows)
                if size == 1
                else [pytest.approx(row, abs=1e-11) for row in without_times(writer.rows)]
            )


def test_a_run_that_stopped_early_goes_on_with_more_patience() -> None:
    shelf, console = Shelf(), Notebook()
    policy = TablePolicy(shelf.ranks)
    sets = (set_of(),)
    assert trainer_of(config_of(*WATCHED), policy=policy, checkpoints=shelf, console=console, more_sets=sets).run()
    _, state = shelf.saved[-1]
    assert any(text.startswith(f"stopped early: {METRIC} was ") for text in console.said)
    again = {"policy": policy, "checkpoints": Shelf(), "state": state, "more_sets": sets}
    assert trainer_of(config_of(*WATCHED, "checkpoint.load=latest"), **again).completed_steps == state.position.steps
    patient = trainer_of(config_of(*WATCHED, "checkpoint.load=latest", "eval.patience=9"), **again)
    assert patient.run() and patient.completed_steps == 12


def test_a_state_of_another_run_has_no_records_here() -> None:
    """Its best checkpoint is in another directory."""
    shelf = Shelf()
    assert trainer_of(config_of(*WATCHED), checkpoints=shelf, more_sets=(set_of(),)).run()
    _, state = shelf.saved[-1]
    assert state.records
    assert trainer_of(config_of(*WATCHED), state=state, more_sets=(set_of(),)).records.held == {}


def test_a_state_without_records_is_of_an_earlier_version() -> None:
    shelf = Shelf()
    trainer_of(config_of("train.steps=1"), checkpoints=shelf).run()
    about = json.loads(json.dumps(shelf.saved[-1][1].to_json()))
    assert about.pop("records") == {} == RunState.from_saved(about, []).records
    with pytest.raises(CheckpointError, match="records, eval/x: step is '3'; expected a whole number"):
        RunState.from_saved(about | {"records": {"eval/x": {"value": 1, "step": "3", "since": 0}}}, [])


def test_equal_is_not_better_and_what_is_not_finite_is_never_the_best() -> None:
    records = Records(config_of("checkpoint.keep_best=eval/reward", "eval.patience=3"), {})
    values = [float("nan"), 1.0, 1.0, float("inf"), 0.5, 2.0]
    kept = [
        records.note({"step": step, "eval/reward": value, "eval/accuracy": 0.5}) for step, value in enumerate(values)
    ]
    assert kept == [False, True, False, False, False, True]
    assert records.held == {"eval/accuracy": Record(0.5, 0, 5), "eval/reward": Record(2.0, 5, 0)}
    assert records.stopped().startswith("eval/accuracy was 0.5 after step 0 and has not risen in 5 evaluations since")


# --- judged answers, and the table ---


def answered(texts: list[list[str]], golds: list[str], reward: str, **how: Any) -> Answered:
    rewards = Rewards({reward: 1.0}, isolate=False)
    of = EvalSet("set", Prompts(), None, SAMPLED, rewards, n=len(texts[0]), **how)
    groups = []
    for i, (gold, responses) in enumerate(zip(golds, texts, strict=True)):
        prompt = Prompt(i, f"q{i}|", (1,), gold, metadata={"level": i % 2})
        group = [Rollout(j, prompt, [1] * len(text), [], False, 0, text=text) for j, text in enumerate(responses)]
        score_rollouts(rewards, group)
        groups.append(RolloutGroup(prompt, group))
    rewards.close()
    return Answered(of, groups)


def test_math_is_judged_as_math_verify_judges() -> None:
    math_verify = pytest.importorskip("math_verify")
    golds = ["1/2", "12", "x+1", r"\sqrt{2}"]
    texts = [
        [r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", r"\boxed{2}", "half"],
        [r"\boxed{12.0}", r"\boxed{12}", r"\boxed{13}", r"\boxed{12}"],
        [r"\boxed{1+x}", r"\boxed{x}", r"\boxed{x+1}", r"\boxed{x + 1}"],
        [r"\boxed{2^{1/2}}", r"\boxed{1}", r"\boxed{\sqrt{2}}", r"\boxed{1.0}"],
    ]
    found = answered(texts, golds, "math", k=(4,))
    theirs = [
        [float(math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(text))) for text in responses]
        for gold, responses in zip(golds, texts, strict=True)
    ]
    assert found.correct == theirs
    assert found.answers[1] == ["12", "12", "13", "12"] and found.answers[3][1] == found.answers[3][3] == "1"
    # 0.5 and 1/2 are two answers: a majority is of texts, not of values. So three ties of one vote, two of them right.
    assert found.values()["maj@4"] == [pytest.approx(2 / 3), 1.0, 1.0, 0.0]
    assert found.values()["pass@4"] == [1.0, 1.0, 1.0, 1.0]


def test_the_table_splits_by_field_and_by_length(tmp_path: Path) -> None:
    found = answered(
        [["a", "ab"], ["b", "ccc"], ["x", "c"], ["", "d" * 9]], ["a", "b", "c", "|d"], "exact_match", by="level"
    )
    table = json.loads(json.dumps(table_of("run/step", [(found, 1.5)])))
    of = table["sets"]["set"]
    assert of["prompts"] == 4 and of["n"] == 2 and of["temperature"] == 0.7
    assert of["metrics"]["accuracy"] == estimate([0.5, 0.5, 0.5, 0.0])._asdict()
    assert {value: part["metrics"]["accuracy"]["value"] for value, part in of["by"].items()} == {"0": 0.5, "1": 0.25}
    assert [(b["from"], b["to"], b["responses"], b["accuracy"]) for b in of["by_response_length"]] == [
        *((0, 0, 1, 0.0), (1, 1, 4, 0.75), (2, 2, 1, 0.0), (3, 4, 1, 0.0), (9, 16, 1, 0.0))
    ]
    text = markdown(table)
    assert "| set | 4 | 2 | 0.7 | 37.5% [" in text and "## set by level" in text and "| 9 to 16 | 1 | 0.0% |" in text
    assert len({line.count("|") for line in text.split("## ")[0].splitlines() if line.startswith("|")}) == 1
    writer = RunWriter(tmp_path, first_step=0)
    writer.held_out("set", 3, found.rows())
    rows = [
        json.loads(line) for line in (tmp_path / "rollouts" / "eval_set_step_000003.jsonl").read_text().splitlines()
    ]
    assert [row["level"] for row in rows] == [0, 0, 1, 1, 0, 0, 1, 1] and rows[0]["correct"] is True


def test_responses_without_a_reward_are_told_apart_from_wrong_ones() -> None:
    found = answered([["a", "lost"], ["lost", "lost"], ["b", "c"]], ["a", "b", "c"], "tests.run.test_evaluation:exact")
    assert found.correct == [[1, 0], [0, 0], [0, 1]]
    assert found.values()["unscored_fraction"] == [0.5, 1.0, 0.0]
    text = markdown(table_of("run/step", [(found, 1.5)]))
    assert "| unscored_fraction |" in text and "| 50.0% [" in text.split("## ")[0].splitlines()[4]
    assert replace(found, of=replace(found.of, name="")).metrics().keys() == {
        *("eval/accuracy", "eval/reward", "eval/unscored_fraction")
    }


def exact(response: str, answer: str) -> float:
    if response == "lost":
        raise NotJudged("no room", {"score": 0.0})
    return float(response == answer)


def test_ranks_agree_where_a_set_is_smaller_than_they_are() -> None:
    one = run("train.steps=0", sets=(set_of(size=1),)).answers["hard", 0]
    for writer in Replicas(4).run(lambda ranks: run("train.steps=0", ranks=ranks, sets=(replace(set_of(), size=1),))):
        assert writer.answers["hard", 0] == one
    assert OneRank().is_main and len(one) == 4
