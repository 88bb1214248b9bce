from __future__ import annotations

import re
from random import Random
from typing import Any

import pytest

from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.data.generated import (
    TASKS,
    Example,
    GeneratedPrompts,
    Task,
    eval_examples,
    find_task,
    is_held_out,
    train_example,
)
from gspo_megatron.data.tokenizers import CharacterTokenizer
from gspo_megatron.rewards.rules import REWARDS


def examples(task: Task, count: int = 300) -> list[Example]:
    return [train_example(task, 0, index) for index in range(count)] + eval_examples(task, 0, 100)


@pytest.mark.parametrize("name", TASKS)
def test_the_solution_earns_the_reward_and_is_written_in_the_alphabet(name: str) -> None:
    task = TASKS[name]
    judge = REWARDS[task.reward]
    for prompt, answer, solution in examples(task):
        assert set(prompt + solution) <= set(task.alphabet)
        assert judge(prompt=prompt, response=solution, answer=answer) == 1
        assert judge(prompt=prompt, response=solution[:-1], answer=answer) == 0


def test_answers_follow_the_rule_of_the_task() -> None:
    for prompt, answer, _ in examples(find_task("sort_digits")):
        assert [int(digit) for digit in answer] == sorted(map(int, prompt.removesuffix(">")))
    for prompt, answer, _ in examples(find_task("reverse")):
        assert answer + ">" == "".join(reversed(prompt.removesuffix(">"))) + ">"
    for prompt, answer, _ in examples(find_task("addition")):
        a, b = map(int, prompt.removesuffix(">").split("+"))
        assert int(answer) == a + b
    targets = {int(example.answer.partition("=")[2]) for example in examples(find_task("countdown"))}
    assert min(targets) >= 0 and max(targets) <= 30 and len(targets) > 25


@pytest.mark.parametrize("name", ["sort_digits", "reverse"])
def test_every_length_of_the_range_occurs_and_no_other(name: str) -> None:
    default = {len(example.prompt) - 1 for example in examples(find_task(name))}
    longer = {len(example.prompt) - 1 for example in examples(find_task(name, min_length=6, max_length=11))}
    assert default == set(range(3, 9))
    assert longer == set(range(6, 12))


@pytest.mark.parametrize("name", TASKS)
def test_train_and_eval_share_no_prompt_whatever_their_seeds_and_lengths(name: str) -> None:
    train = {train_example(find_task(name, max_length=3), 0, index).prompt for index in range(500)}
    held_out = {example.prompt for seed in (0, 1) for example in eval_examples(find_task(name, max_length=4), seed, 60)}
    assert len(train) > 300
    assert not train & held_out
    assert not any(map(is_held_out, train))


def test_about_a_tenth_is_held_out() -> None:
    share = sum(is_held_out(f"{number}>") for number in range(20_000)) / 20_000
    assert 0.09 < share < 0.11


def test_eval_has_no_duplicates_and_grows_only_at_its_end() -> None:
    task = find_task("sort_digits", max_length=3)
    small, large = eval_examples(task, 0, 20), eval_examples(task, 0, 60)
    assert len({example.prompt for example in large}) == 60
    assert large[:20] == small
    assert eval_examples(task, 1, 20) != small


def test_a_prompt_depends_on_task_lengths_seed_and_index_alone() -> None:
    """The literals hold the promise across Python versions: a resumed run has to see the same prompts."""
    task = find_task("sort_digits")
    assert [train_example(task, 0, index).prompt for index in (2, 0, 1)] == ["36361>", "00949>", "0137>"]
    assert train_example(task, 1, 0).prompt != train_example(task, 0, 0).prompt
    assert len({train_example(task, 0, index).prompt for index in range(200)}) > 190


def test_a_task_with_too_few_held_out_prompts_says_how_many_it_has() -> None:
    possible = sum(is_held_out(f"{number:03d}>") for number in range(1000))
    with pytest.raises(DataError, match=f"lengths 3-3 has about {possible} held-out prompts, but 500 were requested"):
        eval_examples(find_task("sort_digits", max_length=3), 0, 500)


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"unknown task 'sort_digit'; did you mean 'sort_digits'\?"):
        find_task("sort_digit")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_lenght": 4}, "no parameter 'max_lenght'; did you mean 'max_length'?"),
        ({"min_length": 9}, "min_length=9 to max_length=8"),
        ({"min_length": 0}, "1 <= min_length"),
        ({"max_length": "7"}, "whole numbers"),
        ({"max_length": 10**9}, "max_length=1000000000 must be at most 1000"),
    ],
)
def test_task_parameters_that_cannot_be(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        find_task("sort_digits", **parameters)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_that_may_be_too_long_are_refused_before_the_run(name: str) -> None:
    """None that is drawn is longer than the one that is checked, and that length is allowed."""
    task, tokenizer = find_task(name), CharacterTokenizer()
    most = len(task.longest(task.max_length))
    drawn = max(len(task.make(Random(seed), task.max_length).prompt) for seed in range(300))
    assert drawn == most or (name == "countdown" and drawn <= most)
    settings: dict[str, Any] = {"seed": 0, "split": "train", "size": None}
    GeneratedPrompts(task, tokenizer, **settings, max_prompt_tokens=most)
    with pytest.raises(DataError, match=f"has {most} tokens, the limit is {most - 1}"):
        GeneratedPrompts(task, tokenizer, **settings, max_prompt_tokens=most - 1)
