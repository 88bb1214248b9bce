"""Where prompts come from, generated tasks or JSONL files, and the order in which a run takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Protocol

from gspo_megatron.data.tasks import Example, Task, eval_examples, find_task, train_example
from gspo_megatron.data.tokenizers import Tokenizer
from gspo_megatron.types import ConfigError, DataError, Prompt, did_you_mean


class PromptSource(Protocol):
    """Prompts by index: `source[i].id == i` for 0 <= i < size."""

    dropped: int
    """Prompts left out because they are too long."""

    @property
    def size(self) -> int | None:
        """The number of prompts; None where they never end."""

    def __getitem__(self, index: int) -> Prompt: ...


class GeneratedPrompts:
    """The prompts of a generated task: a fixed list of `size` for the split "eval"; for "train" endless, or with a
    `size` the first that many.

    Errors: DataError when the tokenizer lacks a character of the task, or the task has fewer than `size` held-out
    prompts; ConfigError for another split, or eval without a size.
    """

    dropped = 0

    def __init__(
        self, task: Task, tokenizer: Tokenizer, *, split: str, seed: int, size: int | None, max_prompt_tokens: int
    ) -> None:
        if split not in ("train", "eval"):
            raise ConfigError(f"split {split!r} of task {task.name} must be 'train' or 'eval'")
        tokenizer.encode(task.alphabet)
        self.size = size
        self._task, self._tokenizer, self._seed, self._limit = task, tokenizer, seed, max_prompt_tokens
        self._examples: list[Example] | None = None
        if split == "eval":
            if size is None:
                raise ConfigError(f"the eval split of task {task.name} needs a size: how many prompts to hold out")
            self._examples = eval_examples(task, seed, size)

    def __getitem__(self, index: int) -> Prompt:
        """Errors: DataError for a prompt of more than max_prompt_tokens tokens."""
        example = self._examples[index] if self._examples is not None else train_example(self._task, self._seed, index)
        tokens = self._tokenizer.encode(example.prompt)
        if len(tokens) > self._limit:
            raise DataError(
                f"prompt {example.prompt!r} of task {self._task.name} has {len(tokens)} tokens, the limit is "
                f"{self._limit}; raise data.max_prompt_tokens or lower data.task.max_length"
            )
        return Prompt(index, example.prompt, tuple(tokens), example.answer, example.solution)


class JsonlPrompts:
    """The prompts of a JSONL file: one JSON object a line, blank lines skipped, at most the first `size` prompts.

    `prompt_template` is the text the model sees: `{prompt}` in it stands for the prompt field, `{name}` for any other
    field of the object. Braces around anything but a word are left alone. The solution is the answer unless it has a
    field of its own. A prompt of more than `max_prompt_tokens` tokens is an error, or with overlong="drop" left out and
    counted in `dropped`.

    Errors: DataError with file and line for a line that is no JSON object, lacks a field, or has a prompt that is empty
    or that the tokenizer refuses; for a missing or empty file. ConfigError for a template without a field or an unknown
    `overlong`.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        *,
        prompt_field: str = "prompt",
        answer_field: str = "answer",
        solution_field: str | None = None,
        prompt_template: str = "{prompt}",
        max_prompt_tokens: int,
        overlong: str = "error",
        size: int | None = None,
    ) -> None:
        if overlong not in ("error", "drop"):
            raise ConfigError(f"data.overlong={overlong!r} must be 'error' or 'drop'")
        if not FIELD.search(prompt_template):
            raise ConfigError(
                f"data.prompt_template={prompt_template!r} has no {{prompt}}: all prompts would be the same"
            )
        self.dropped = 0
        self._prompts: list[Prompt] = []
        for place, record in read_records(path):
            if size is not None and len(self._prompts) == size:
                break
            text = _fill(prompt_template, prompt_field, record, place)
            answer = text_field(record, answer_field, place)
            solution = text_field(record, solution_field, place) if solution_field else answer
            tokens = _encode(tokenizer, text, place)
            if len(tokens) <= max_prompt_tokens:
                self._prompts.append(Prompt(len(self._prompts), text, tuple(tokens), answer, solution))
            elif overlong == "drop":
                self.dropped += 1
            else:
                raise DataError(
                    f"{place}: the prompt has {len(tokens)} tokens, the limit is {max_prompt_tokens}; raise "
                    "data.max_prompt_tokens, or leave such prompts out with data.overlong=drop"
                )
        if not self._prompts:
            raise DataError(
                f"{path} holds no prompt; expected one JSON object a line ({self.dropped} prompts were dropped because "
                f"they have more than {max_prompt_tokens} tokens)"
            )

    @property
    def size(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]


def load_prompts(
    spec: str,
    tokenizer: Tokenizer,
    *,
    split: str,
    seed: int,
    max_prompt_tokens: int,
    size: int | None = None,
    task_parameters: Mapping[str, Any] | None = None,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    solution_field: str | None = None,
    prompt_template: str = "{prompt}",
    overlong: str = "error",
) -> PromptSource:
    """The prompts that `spec` names: a generated task ("task:sort_digits") or the path of a JSONL file.

    `split` ("train" or "eval"), `seed` and `task_parameters` concern tasks only; the fields, the template and
    `overlong` files only. `size` is exact for a task's eval split and an upper bound for a file.
    Errors: those of find_task, GeneratedPrompts and JsonlPrompts; ConfigError for a size below 1.
    """
    if size is not None and size < 1:
        raise ConfigError(f"{size} {split} prompts were asked for; expected at least 1")
    if spec.startswith("task:"):
        task = find_task(spec.removeprefix("task:"), **(task_parameters or {}))
        return GeneratedPrompts(task, tokenizer, split=split, seed=seed, size=size, max_prompt_tokens=max_prompt_tokens)
    return JsonlPrompts(
        spec,
        tokenizer,
        prompt_field=prompt_field,
        answer_field=answer_field,
        solution_field=solution_field,
        prompt_template=prompt_template,
        max_prompt_tokens=max_prompt_tokens,
        overlong=overlong,
        size=size,
    )


class PromptOrder:
    """Position k of a run -> index of a prompt: k itself in an endless source, else pi_e[k - e * size], e = k // size.

    pi_e is a permutation that depends on (seed, e) alone. Any position may be asked for at any time, so a resumed run
    needs only the number k, whatever layout it resumes on.
    """

    def __init__(self, size: int | None, seed: int) -> None:
        self._size, self._seed = size, seed
        self._epoch = -1
        self._permutation: list[int] = []

    def __getitem__(self, position: int) -> int:
        if self._size is None:
            return position
        epoch, offset = divmod(position, self._size)
        if epoch != self._epoch:
            random = Random(f"order {self._seed} epoch {epoch}")
            # Sorting by random() and not shuffle(): only random() is promised to stay the same in later Pythons.
            self._permutation = sorted(range(self._size), key=lambda _: random.random())
            self._epoch = epoch
        return self._permutation[offset]


FIELD = re.compile(r"\{(\w+)\}")
"""A place in a prompt template."""


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) for every line of a JSONL file that is not blank; `place` is "file:line", for messages.

    Errors: DataError for a missing file (with the nearest name in its folder), text that is not UTF-8, a line that is
    not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        found = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"the file {path} {found}{did_you_mean(path.name, names)}; expected a JSONL file")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig")
                record = json.loads(text) if text.strip() else None
            except ValueError as error:
                raise DataError(f"{place}: not JSON in UTF-8 ({error}); expected one object a line") from error
            if isinstance(record, dict):
                yield place, record
            elif text.strip():
                raise DataError(f"{place}: found {text.strip()[:60]!r}; expected a JSON object, {{...}}")


def text_field(record: dict[str, Any], name: str, place: str) -> str:
    """Field `name` as text; a number is written out. Errors: DataError for a missing field or another type."""
    if name not in record:
        near = did_you_mean(name, record)
        raise DataError(f"{place}: no field {name!r}{near}; its fields are {', '.join(record) or 'none'}")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{place}: field {name!r} is {json.dumps(value)[:60]}; expected text or a number")
    return str(value)


def _fill(template: str, prompt_field: str, record: dict[str, Any], place: str) -> str:
    prompt = text_field(record, prompt_field, place)
    if not prompt.strip():
        raise DataError(f"{place}: field {prompt_field!r} is empty; expected a prompt")
    return FIELD.sub(lambda match: prompt if match[1] == "prompt" else text_field(record, match[1], place), template)


def _encode(tokenizer: Tokenizer, text: str, place: str) -> list[int]:
    try:
        tokens = tokenizer.encode(text)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    if not tokens:
        raise DataError(f"{place}: the prompt {text[:60]!r} has no tokens; expected some for the response to follow")
    return tokens
