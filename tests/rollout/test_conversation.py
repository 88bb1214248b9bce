"""Rollouts that are conversations: what is sampled, what comes from outside, and what an environment can break."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from gspo_megatron.base.batches import Position, Prompt, Rollout
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.build.environments import environment_of
from gspo_megatron.build.eval_sets import default_set
from gspo_megatron.build.rewards import rewards_of
from gspo_megatron.environments.environment import DONE, InProcess, Turn
from gspo_megatron.environments.tools import Calculator
from gspo_megatron.monitor.catalogue import OF_THE_MACHINE, entry_of
from gspo_megatron.rollout.user_environment import UserEnvironment
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.testing.fakes import TOKENIZER, Prompts, Replicas, Shelf, config_of, trainer_of
from gspo_megatron.testing.time_limits import time_factor
from tests.run.test_trainer import Rows

SETTINGS = ("model.max_sequence_length=12", "rollout.max_new_tokens=9", "rollout.environment=calculator")
OUTSIDE = TOKENIZER.encode("Ba")


class Echo(InProcess):
    """Says `Ba` until the model has had `turns` turns, as long as it ends them itself."""

    def __init__(self, turns: int = 3, answer: Callable[[Rollout], Turn] | None = None) -> None:
        self.turns, self.answer = turns, answer
        self.asked: list[tuple[int, str]] = []

    def replies(self, rollouts: Sequence[Rollout]) -> list[Turn]:
        self.asked += [(rollout.id, rollout.text) for rollout in rollouts]
        return [self._reply(rollout) for rollout in rollouts]

    def _reply(self, rollout: Rollout) -> Turn:
        if len(rollout.outside) + 1 == self.turns:
            return DONE
        return self.answer(rollout) if self.answer else Turn("Ba", calls=2, failed=1)


def run(
    *settings: str, ranks: Ranks | None = None, environment: Any = None, **parts: Any
) -> tuple[Trainer, list[Any], dict[int, list[dict[str, Any]]]]:
    """A whole run; its rows of metrics and its rollouts by step."""
    writer, config = Rows(), config_of(*SETTINGS, "logging.rollouts_per_step=-1", *settings)
    trainer = trainer_of(config, ranks, environment=environment or Echo(), writer=writer, **parts)
    trainer.run()
    rows = [{k: v for k, v in row.items() if v is not None and not k.startswith(OF_THE_MACHINE)} for row in writer.rows]
    return trainer, rows, writer.samples


def test_what_the_model_said_is_trained_on_and_nothing_else() -> None:
    trainer = trainer_of(config_of(*SETTINGS), environment=Echo())
    groups = trainer.sample(1)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    turns = [len(rollout.outside) + 1 for rollout in rollouts]
    assert {1, 2, 3} == set(turns), "some were cut before they could end a turn"
    for rollout, sequence in zip(rollouts, trainer.advantages(groups), strict=True):
        assert len(rollout.tokens) <= 9 and sequence.tokens.tolist() == [*rollout.prompt.tokens, *rollout.tokens]
        of_model = torch.zeros(len(sequence), dtype=torch.bool)
        of_model[len(rollout.prompt.tokens) :] = True
        end = 0
        for begin, stop in rollout.outside:
            assert rollout.tokens[begin - 1] == TOKENIZER.eos_id and rollout.tokens[begin:stop] == OUTSIDE
            assert TOKENIZER.eos_id not in rollout.tokens[end : begin - 1]
            of_model[len(rollout.prompt.tokens) + begin : len(rollout.prompt.tokens) + stop] = False
            end = stop
        assert torch.equal(sequence.trained, of_model)
        assert sequence.num_trained == len(rollout.log_probs) == len(sequence.columns["sampler_log_probs"])
        # The log-probs are the policy's, of each token after the one before it.
        table = trainer.policy.logits_VV.log_softmax(-1)
        before = sequence.tokens[:-1][sequence.trained[1:]]
        expected = table[before, sequence.tokens[sequence.trained]].tolist()
        assert rollout.log_probs == pytest.approx(expected, abs=1e-12)
        # The conversation as text.
        assert [turn["sampled"] for turn in rollout.turns] == [True, False, True, False, True][: len(rollout.turns)]
        assert rollout.text == rollout.turns[-1]["content"] == TOKENIZER.decode(rollout.last_turn)
        cut = rollout.tokens[-1] != TOKENIZER.eos_id
        answered = len(rollout.outside)
        assert rollout.truncated == (answered < 2 or cut)
        # An answer that there was no room for was given, too.
        assert rollout.tool_calls == 2 * rollout.tool_errors == 2 * (answered + (rollout.truncated and not cut))


def test_a_run_is_the_same_on_replicas_and_has_its_metrics() -> None:
    _, alone, rollouts = run("train.steps=2")
    together = Replicas(2).run(lambda ranks: run("train.steps=2", ranks=ranks))
    assert together[0][2] == rollouts and json.dumps(rollouts)
    for ours, theirs in zip(together[0][1], alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    for step, row in zip(rollouts.values(), alone[1:], strict=True):
        assert row["turns/mean"] == sum(len(r["outside"]) + 1 for r in step) / len(step) > 1.2
        assert row["turns/max"] == 3 and row["environment/errors"] == 0
        assert row["turns/outside_tokens"] == 2 * (row["turns/mean"] - 1)
        assert row["tools/errors"] == sum(r["tool_errors"] for r in step) > 0
        assert row["tools/calls"] == 2 * row["tools/errors"] / len(step)
        assert row["response_length/mean"] == sum(len(r["log_probs"]) for r in step) / len(step)
    assert all(entry_of(name) for name in alone[1])


def test_a_run_stopped_between_two_updates_goes_on_to_the_same_end() -> None:
    whole, expected, rollouts = run("train.steps=2")
    shelf, config = Shelf(), config_of(*SETTINGS, "train.steps=2", "logging.rollouts_per_step=-1")
    asked = iter([False, True])
    stopped = trainer_of(config, environment=Echo(), checkpoints=shelf, stop=lambda: next(asked, True))
    assert not stopped.run()
    position, state = shelf.saved[-1]
    assert position == Position(0, 0, 1)
    assert any(rollout["outside"] for group in state.step.about["rollouts"] for rollout in group)
    continued, rows, again = run("train.steps=2", "checkpoint.load=latest", state=state, policy=stopped.policy)
    assert again == rollouts and rows == expected[-len(rows) :]
    assert torch.equal(continued.policy.logits_VV, whole.policy.logits_VV)


def test_evaluation_asks_the_environment_too() -> None:
    environment = Echo()
    trainer = trainer_of(config_of(*SETTINGS), environment=environment)
    asked = default_set(trainer.config, Prompts(5), rewards_of(trainer.config))
    found = [rollout for group in asked.answered(trainer.parts.source).groups for rollout in group.rollouts]
    assert {text for _, text in environment.asked} and len(environment.asked) >= 5
    assert [rollout.id for rollout in found] == [0, 1, 2, 3, 4] and all(rollout.turns for rollout in found)


@pytest.mark.parametrize(
    ("settings", "answer", "turns", "said"),
    [
        (("rollout.max_turns=2",), None, 2, ""),
        ((), lambda rollout: Turn("B" * 8), 1, ""),  # no room
        ((), lambda rollout: Turn(error="it is broken") if rollout.id % 3 == 0 else DONE, 1, "it is broken"),
        ((), lambda rollout: Turn("?") if rollout.id % 3 == 0 else DONE, 1, "character '?'"),
        ((), lambda rollout: Turn("\ud800") if rollout.id % 3 == 0 else DONE, 1, "cannot be used"),
        ((), lambda rollout: Turn("B" * 100_001) if rollout.id % 3 == 0 else DONE, 1, "more than 100,000"),
    ],
)
def test_a_limit_or_a_fault_ends_the_conversation(
    settings: tuple[str, ...], answer: Any, turns: int, said: str
) -> None:
    trainer = trainer_of(config_of(*SETTINGS, *settings), environment=Echo(5, answer))
    rollouts = [rollout for group in trainer.sample(1) for rollout in group.rollouts]
    assert max(len(rollout.outside) + 1 for rollout in rollouts) == turns
    failed = [rollout for rollout in rollouts if rollout.environment_error]
    assert bool(failed) == bool(said)
    for rollout in failed:
        assert said in rollout.environment_error and rollout.id % 3 == 0 and rollout.truncated
    ended = [rollout for rollout in rollouts if rollout.tokens[-1] == TOKENIZER.eos_id]
    assert ended and all(rollout.truncated == (not said or rollout in failed) for rollout in ended)


def test_an_environment_that_nearly_always_fails_stops_the_run_on_all_ranks() -> None:
    broken = Echo(answer=lambda rollout: Turn(error="it is broken"))

    def sample(ranks: Ranks) -> str:
        with pytest.raises(DataError) as error:
            trainer_of(config_of(*SETTINGS), ranks, environment=broken).sample(1)
        return str(error.value)

    one, two = Replicas(2).run(sample)
    assert one == two and "it is broken" in one and "rollout 32:" in one


# ------------------------------------------------------------------------------------------------ a user's own


def host(messages: list[dict[str, str]], response: str, answer: str, said: str) -> Any:
    """An environment that does what the rollout's answer says."""
    wrong: dict[str, Callable[[], Any]] = {
        "raises": lambda: 1 // 0,
        "hangs": lambda: time.sleep(1000),
        "exits": lambda: sys.exit(0),
        "dies": lambda: os._exit(3),
        "is a set": lambda: {1, 2},
        "is a number": lambda: 3,
        "has no such field": lambda: {"text": "x"},
        "ends": lambda: None,
        "calls": lambda: {"content": f"{said} {messages[-1]['content']}", "role": "tool", "calls": 1},
        "asks": lambda: f"after {len(messages)}, {response}",
    }
    return wrong[answer]()


def test_a_users_environment_costs_at_most_its_rollout() -> None:
    limit = time_factor()
    expected = {
        "raises": Turn(error="ZeroDivisionError: integer division or modulo by zero"),
        "calls": Turn("you said a", "tool", calls=1),
        "hangs": Turn(error=f"its process gave no result within rollout.reply_timeout_s={limit:g} s"),
        "exits": Turn(error="SystemExit: 0"),
        "dies": Turn(error="its process ended with status 3"),
        "is a set": Turn(error="TypeError: Object of type set is not JSON serializable"),
        "is a number": Turn(
            error="TypeError: it returned 3; expected a text, a dict with a 'content', or None at the end"
        ),
        "has no such field": Turn(
            error="ValueError: it returned {'text': 'x'}; of a dict, content, role, done, calls, failed are known, not "
            "'text'"
        ),
        "ends": DONE,
        "asks": Turn("after 1, a", "user"),
    }
    rollouts = [
        Rollout(i, Prompt(i, "A", (2,), answer), [4], [-1.0], False, 0, "a") for i, answer in enumerate(expected)
    ]
    for rollout in rollouts:
        rollout.turns.append({"role": "assistant", "content": "a", "sampled": True})
    name, parameters = f"{__name__}:host", {"said": "you said"}
    environment = UserEnvironment(name, parameters, timeout_s=limit, memory_gib=4, seed=0)
    environment.use_workers(2)
    try:
        assert dict(zip(expected, environment.replies(rollouts), strict=True)) == expected
    finally:
        environment.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("rollout.environment=calculater",), "did you mean 'calculator'"),
        (("rollout.environment=no.such:f",), "environment 'no.such:f' cannot be used"),
        (("rollout.environment_arguments.mark=x",), "does not suit rollout.environment=calculator: "),
        (("rollout.environment=single_turn", "rollout.max_turns=3"), "rollout.max_turns=3 has no effect"),
        (("rollout.reply_timeout_s=3",), "rollout.reply_timeout_s=3"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        environment_of(config_of(*SETTINGS, *settings), TOKENIZER)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", "24"),
        (" 1,000 * .5", "500"),
        ("2*(3+4)-1", "13"),
        ("-3--4", "1"),
        ("1/3", "0.3333333333"),
        ("0.1+0.2", "0.3"),
        ("12.", "12"),
        ("7/(2-2)", "e"),
        ("2**9", "e"),
        ("1//2", "e"),
        ("1 2", "e"),
        ("(1", "e"),
        ("", "e"),
        ("__import__('os')", "e"),
        ("9" * 201, "e"),
        ("(" * 100 + "1" + ")" * 99, "e"),
    ],
)
def test_the_calculator_is_exact_and_runs_nothing(expression: str, value: str) -> None:
    rollout = Rollout(0, Prompt(0, "", (2,), ""), [4], [-1.0], False, 0, f"so <<{expression}>>")
    expected = Turn(value, "assistant", calls=1, failed=int(value == "e"))
    assert Calculator(error="e").replies([rollout]) == [expected]
    rollout.text += "24"
    assert Calculator().replies([rollout]) == [DONE]
