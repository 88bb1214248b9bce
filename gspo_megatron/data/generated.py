"""Generated tasks with rule-based answers, in compact text so that a tiny character model is fast.

    sort_digits  `3122>`       -> `1223`      reverse    `cab>`      -> `bac`
    addition     `12+345>`     -> `357`       countdown  `7,5,3=9>`  -> `7+5-3` or any other correct expression

A prompt is held out by a rule on its text alone (`is_held_out`), so the train and eval splits are disjoint whatever
their seeds and length ranges are.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

from gspo_megatron.base.batches import Prompt
from gspo_megatron.base.errors import ConfigError, DataError, did_you_mean, plural
from gspo_megatron.data.token_ids import Tokenizer

PARAMETERS = ("min_length", "max_length")
"""The parameters of a task that a run may set."""

LONGEST = 1000
"""The largest length that a run may set: more would take seconds a prompt."""

HELD_OUT_SHARE = 10
"""One prompt in this many is held out."""

MAX_FRUITLESS_DRAWS = 10_000
"""Draws without a new held-out prompt after which a task counts as exhausted."""


class Example(NamedTuple):
    """A prompt, what its reward compares the response with, and one correct response to learn from."""

    prompt: str
    answer: str
    solution: str


@dataclass(frozen=True)
class Task:
    """A rule that makes examples of any length in [min_length, max_length].

    `make(random, length)` draws one; its docstring says what `length` counts. `longest(length)` is a prompt of the
    most characters. `alphabet` holds every character of its
    prompts and correct responses; `reward` names the reward that scores a response.
    """

    name: str
    make: Callable[[Random, int], Example]
    longest: Callable[[int], str]
    alphabet: str
    min_length: int = 3
    max_length: int = 8
    reward: str = "exact_match"

    def draw(self, random: Random) -> Example:
        return self.make(random, random.randint(self.min_length, self.max_length))


def sort_digits(random: Random, length: int) -> Example:
    """`length` digits, to be written in ascending order."""
    digits = random.choices(string.digits, k=length)
    answer = "".join(sorted(digits))
    return Example("".join(digits) + ">", answer, answer)


def reverse(random: Random, length: int) -> Example:
    """`length` lower-case letters, to be written from the last to the first."""
    letters = "".join(random.choices(string.ascii_lowercase, k=length))
    return Example(letters + ">", letters[::-1], letters[::-1])


def addition(random: Random, length: int) -> Example:
    """Two whole numbers of at most `length` digits, to be added."""
    a, b = random.randrange(10**length), random.randrange(10**length)
    return Example(f"{a}+{b}>", str(a + b), str(a + b))


def countdown(random: Random, length: int) -> Example:
    """`length` numbers from 1 to 20, each to be used once, in any order, with + and - to reach a target from 0 to 30.

    The answer is the exercise itself (`7,5,3=9`): several expressions are correct, so the reward evaluates the
    response.
    """
    numbers = [random.randint(1, 20) for _ in range(length)]
    while True:
        order = random.sample(numbers, length)
        signs = [1, *random.choices((1, -1), k=length - 1)]
        target = sum(sign * number for sign, number in zip(signs, order, strict=True))
        if 0 <= target <= 30:
            break
    exercise = f"{','.join(map(str, numbers))}={target}"
    solution = "".join(f"{'+' if sign > 0 else '-'}{number}" for sign, number in zip(signs, order, strict=True))
    return Example(exercise + ">", exercise, solution.removeprefix("+"))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sort_digits", sort_digits, lambda n: "7" * n + ">", string.digits + ">"),
        Task("reverse", reverse, lambda n: "x" * n + ">", string.ascii_lowercase + ">"),
        Task("addition", addition, lambda n: f"{'7' * n}+{'7' * n}>", string.digits + "+>", 1, 3),
        Task(
            "countdown", countdown, lambda n: ",".join(["17"] * n) + "=17>", string.digits + "+-,=>", 3, 3, "countdown"
        ),
    )
}


def find_task(name: str, /, **parameters: Any) -> Task:
    """The task of that name, with other lengths where `parameters` has min_length or max_length.

    Raises:
        DataError: unknown name. Suggests the closest one.
        ConfigError: unknown parameter, or lengths that are not a range.
    """
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}{did_you_mean(name, TASKS) or '.'} Known: {', '.join(TASKS)}")
    for key in parameters:
        if key not in PARAMETERS:
            raise ConfigError(f"task {name} has no parameter {key!r}{did_you_mean(key, PARAMETERS)}")
    task = replace(TASKS[name], **parameters)
    lengths = (task.min_length, task.max_length)
    if not all(isinstance(length, int) for length in lengths) or not 1 <= task.min_length <= task.max_length:
        raise ConfigError(
            f"task {name} from min_length={task.min_length} to max_length={task.max_length}: expected whole numbers, "
            "1 <= min_length <= max_length"
        )
    if task.max_length > LONGEST:
        raise ConfigError(f"task {name}: max_length={task.max_length} must be at most {LONGEST}")
    return task


def is_held_out(prompt: str) -> bool:
    """The first 8 bytes of sha256(prompt), as a number, are divisible by HELD_OUT_SHARE."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def train_example(task: Task, seed: int, index: int) -> Example:
    """Example `index` of the endless train split. It depends on nothing but the task, its lengths, seed and index."""
    random = _random(task, seed, f"train {index}")
    while is_held_out((example := task.draw(random)).prompt):
        pass
    return example


def eval_examples(task: Task, seed: int, size: int) -> list[Example]:
    """The first `size` examples of the held-out split, without duplicates; a larger size only appends to them.

    Raises:
        DataError: the task has fewer held-out prompts.
    """
    random = _random(task, seed, "eval")
    examples: dict[str, Example] = {}
    fruitless = 0
    while len(examples) < size:
        example = task.draw(random)
        fruitless += 1
        if is_held_out(example.prompt) and example.prompt not in examples:
            examples[example.prompt] = example
            fruitless = 0
        if fruitless == MAX_FRUITLESS_DRAWS:
            raise DataError(
                f"task {task.name} with lengths {task.min_length}-{task.max_length} has about "
                f"{plural(len(examples), 'held-out prompt')}, but {size} were requested; lower data.eval_size or raise "
                "data.task.max_length"
            )
    return list(examples.values())


def _random(task: Task, seed: int, stream: str) -> Random:
    """Seeded with text, which Python hashes in full: neighbouring seeds and indices give unrelated streams."""
    return Random(f"{task.name} {task.min_length}-{task.max_length} seed {seed} {stream}")


class GeneratedPrompts:
    """The prompts of a generated task: for split "eval" a fixed list of `size`; for "train" the first `size`, or an
    endless supply without one.

    Raises:
        DataError: the tokenizer lacks a character of the task, its longest prompt has more than `max_prompt_tokens`
            tokens, or it has fewer than `size` held-out prompts.
        ConfigError: another split, or "eval" without a size.
    """

    dropped: Mapping[str, int] = MappingProxyType({})
    digest = ""

    def __init__(
        self, task: Task, tokenizer: Tokenizer, *, split: str, seed: int, size: int | None, max_prompt_tokens: int
    ) -> None:
        if split not in ("train", "eval"):
            raise ConfigError(f"split {split!r} of task {task.name} is not 'train' or 'eval'")
        self._task, self._tokenizer, self._seed, self._limit = task, tokenizer, seed, max_prompt_tokens
        tokenizer.encode(task.alphabet)
        self._check(task.longest(task.max_length), len(tokenizer.encode_prompt(task.longest(task.max_length))))
        self.size = size
        self._examples: list[Example] | None = None
        if split == "eval":
            if size is None:
                raise ConfigError(f"the eval split of task {task.name} needs a size: how many prompts to hold out")
            self._examples = eval_examples(task, seed, size)

    def __getitem__(self, index: int) -> Prompt:
        """Prompt `index`.

        Raises:
            DataError: it has more than max_prompt_tokens tokens, which a tokenizer that joins characters may hide from
                the check of the longest one.
        """
        example = self._examples[index] if self._examples is not None else train_example(self._task, self._seed, index)
        tokens = self._tokenizer.encode_prompt(example.prompt)
        self._check(example.prompt, len(tokens))
        return Prompt(index, example.prompt, tuple(tokens), example.answer, example.solution)

    def _check(self, prompt: str, num_tokens: int) -> None:
        if num_tokens > self._limit:
            shown = repr(prompt if len(prompt) <= 60 else f"{prompt[:60]}...")
            raise DataError(
                f"prompt {shown} of task {self._task.name} has {num_tokens} tokens, the limit is {self._limit} "
                "(data.max_prompt_tokens, or what rollout.max_new_tokens leaves of model.max_sequence_length); raise "
                "it, or lower data.task.max_length"
            )
