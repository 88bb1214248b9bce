"""Sources of prompts: a table with a row for each scheme, such as `task:`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gspo_megatron.base.batches import Prompt
from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.chat import ChatTemplate
from gspo_megatron.data.examples import RowReader
from gspo_megatron.data.files import rows_of_files
from gspo_megatron.data.generated import GeneratedPrompts, find_task
from gspo_megatron.data.hub import HubRows
from gspo_megatron.data.prompts import Filters, RowPrompts
from gspo_megatron.data.rows import Rows
from gspo_megatron.data.token_ids import Tokenizer
from gspo_megatron.data.user_rows import NAME, UserRows


class PromptSource(Protocol):
    """Prompts by index: `source[i].id == i` for 0 <= i < size."""

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows left out, by reason."""

    @property
    def digest(self) -> str:
        """Of the content; empty for prompts that are generated."""

    @property
    def size(self) -> int | None:
        """The number of prompts; None for an endless source."""

    def __getitem__(self, index: int) -> Prompt: ...


@dataclass(frozen=True)
class DataSpec:
    """A source of prompts, and how to read it.

    Attributes:
        source: `scheme:name` (`task:sort_digits`), the path of a file, or `module:function`.
        split: `train` or `eval`.
        size: the number of prompts: exact for the eval split of a task, an upper bound for a file. None: all.
        max_prompt_tokens: longest prompt.
        cache: where what is derived from large files is kept.
        task and the fields after it: settings of section `data` with the same names, which not every source reads.
    """

    source: str
    split: str
    max_prompt_tokens: int
    size: int | None = None
    task: Mapping[str, Any] = field(default_factory=dict)
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    solution_field: str | None = None
    prompt_template: str = "{prompt}"
    messages_field: str | None = None
    chat: bool = False
    chat_arguments: Mapping[str, Any] = field(default_factory=dict)
    chat_date: str | None = None
    overlong: str = "error"
    duplicates: str = "keep"
    bad_rows: str = "error"
    cache: Cache = field(default_factory=Cache)

    @property
    def name(self) -> str:
        """What follows the scheme."""
        return self.source.removeprefix(f"{scheme_of(self.source)}:")

    @property
    def is_generated(self) -> bool:
        """Whether its prompts are of a task, which has as many as are asked for."""
        return scheme_of(self.source) == "task"


class Source(NamedTuple):
    """A row of SOURCES.

    Attributes:
        open: (spec, tokenizer, seed of the run) -> its prompts.
        reads: the settings of section `data` that this source reads and others may not.
        reward: (spec) -> the default reward.
        rows: (spec) -> the rows that its prompts are made of; None for prompts of no rows.
    """

    open: Callable[[DataSpec, Tokenizer, int], PromptSource]
    reads: frozenset[str]
    reward: Callable[[DataSpec], str]
    rows: Callable[[DataSpec], Rows] | None = None


def _open_task(spec: DataSpec, tokenizer: Tokenizer, seed: int) -> PromptSource:
    task, limit = find_task(spec.name, **spec.task), spec.max_prompt_tokens
    return GeneratedPrompts(task, tokenizer, split=spec.split, seed=seed, size=spec.size, max_prompt_tokens=limit)


def reader_of(spec: DataSpec, tokenizer: Tokenizer) -> RowReader:
    """Which fields of the source's rows are what."""
    return RowReader(
        prompt_field=spec.prompt_field,
        answer_field=spec.answer_field,
        solution_field=spec.solution_field,
        prompt_template=spec.prompt_template,
        chat=chat_of(spec, tokenizer),
        messages_field=spec.messages_field,
    )


def filters_of(spec: DataSpec) -> Filters:
    """Which of them become prompts."""
    return Filters(
        spec.max_prompt_tokens,
        overlong=spec.overlong,
        duplicates=spec.duplicates,
        bad_rows=spec.bad_rows,
        size=spec.size,
    )


def chat_of(spec: DataSpec, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that turns the conversations of `spec` into text; None where its prompts are text already.

    Raises:
        ConfigError: the tokenizer has no chat template, or arguments for one that is not used.
    """
    if not (spec.chat or spec.messages_field):
        if spec.chat_arguments:
            raise ConfigError(
                f"data.chat_arguments={dict(spec.chat_arguments)} would not be used: set data.chat=true or "
                "data.messages_field, or leave it out"
            )
        return None
    if tokenizer.chat_template is None:
        asked = f"data.messages_field={spec.messages_field}" if spec.messages_field else "data.chat=true"
        raise ConfigError(
            f"{asked} needs a tokenizer with a chat template, and data.tokenizer has none; use a Hugging Face folder "
            "with chat_template.jinja, or write the whole text with data.prompt_template"
        )
    if spec.chat_date and not tokenizer.chat_template.tells_day:
        raise ConfigError(
            f"data.chat_date={spec.chat_date} has no effect: {tokenizer.chat_template.name} does not call "
            "strftime_now; remove it"
        )
    today = date.fromisoformat(spec.chat_date) if spec.chat_date else None
    return tokenizer.chat_template.with_arguments(spec.chat_arguments, today)


OF_ROWS = frozenset(
    {
        *("prompt_field", "answer_field", "solution_field", "prompt_template"),
        *("overlong", "duplicates", "bad_rows"),
        *("messages_field", "chat", "chat_arguments", "chat_date"),
    }
)


def of_rows(rows: Callable[[DataSpec], Rows]) -> Source:
    """A source of rows with fields."""

    def prompts(spec: DataSpec, tokenizer: Tokenizer, seed: int) -> PromptSource:
        reader, filters = reader_of(spec, tokenizer), filters_of(spec)
        return RowPrompts(spec.name, rows(spec), reader, tokenizer, filters, spec.cache)

    return Source(prompts, OF_ROWS, lambda spec: "exact_match", rows)


SOURCES: dict[str, Source] = {
    "task": Source(_open_task, frozenset({"task"}), lambda spec: find_task(spec.name, **spec.task).reward),
    "file": of_rows(lambda spec: rows_of_files(spec.name, spec.cache)),
    "jsonl": of_rows(lambda spec: rows_of_files(spec.name, spec.cache, "jsonl")),
    "parquet": of_rows(lambda spec: rows_of_files(spec.name, spec.cache, "parquet")),
    "hf": of_rows(lambda spec: HubRows(spec.name, spec.split, spec.cache)),
    "python": of_rows(lambda spec: UserRows(spec.name, spec.split)),
}
"""By scheme. A source without one is a file, or a function where it is written as `module:function`."""


def scheme_of(source: str) -> str:
    """The row of SOURCES that `source` belongs to."""
    scheme, colon, _ = source.partition(":")
    if colon and scheme in SOURCES:
        return scheme
    return "python" if NAME.fullmatch(source) and not Path(source).exists() else "file"


def open_source(spec: DataSpec, tokenizer: Tokenizer, *, seed: int) -> PromptSource:
    """The prompts of `spec`.

    Raises:
        ConfigError: a size below 1, or parameters that a task does not have.
        DataError: no such task or file, or one that cannot be used.
    """
    if spec.size is not None and spec.size < 1:
        raise ConfigError(f"{spec.size} {spec.split} prompts were requested; expected at least 1")
    return SOURCES[scheme_of(spec.source)].open(spec, tokenizer, seed)


def checked_tokens(prompt: Prompt, response: Seq[int], vocab_size: int) -> list[int]:
    """Prompt and response, end to end.

    Raises:
        DataError: an id outside the vocabulary.
    """
    tokens = [*prompt.tokens, *response]
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        position, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < vocab_size)
        raise DataError(
            f"prompt {prompt.id} ({prompt.text[:60]!r}): token {position} of {len(tokens)} has id {token}, but "
            f"model.vocab_size={vocab_size} has ids 0 to {vocab_size - 1}; does data.tokenizer belong to the model?"
        )
    return tokens
