"""Prompts of the rows of a data set: filtered and tokenised once, their tokens in memory-mapped arrays."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from gspo_megatron.base.batches import Prompt
from gspo_megatron.base.errors import ConfigError, DataError, plural
from gspo_megatron.base.files import written_aside
from gspo_megatron.data.cache import ArrayWriter, Cache, arrays, sha256_of
from gspo_megatron.data.examples import Example, RowReader
from gspo_megatron.data.rows import RowError, Rows
from gspo_megatron.data.token_ids import Tokenizer

LISTED = 3
"""Places that are kept for each reason to leave rows out."""
BLOCK = 4096
"""Prompts written together."""


@dataclass(frozen=True)
class Filters:
    """Which rows become prompts.

    Attributes:
        max_tokens: longest prompt.
        overlong: `drop` leaves longer ones out, `error` refuses them.
        duplicates: `drop` keeps the first of prompts with the same text, `keep` all.
        bad_rows: `drop` leaves out rows that are no prompt, `error` refuses them.
        size: at most this many prompts; None: all.
    """

    max_tokens: int
    overlong: str = "error"
    duplicates: str = "keep"
    bad_rows: str = "error"
    size: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("overlong", "error drop"), ("duplicates", "keep drop"), ("bad_rows", "error drop")):
            value, (first, second) = getattr(self, name), choices.split()
            if value not in (first, second):
                raise ConfigError(f"data.{name}={value!r} must be {first!r} or {second!r}")

    def rule(self, reason: str) -> str:
        """What becomes of a row that is left out for this reason: `error`, `drop` or `keep`."""
        rules = {"too long": self.overlong, "duplicate": self.duplicates}
        return rules.get(reason, self.bad_rows)


class Read(NamedTuple):
    """What became of a row: its example and tokens, or why it is left out."""

    row: int
    place: str
    example: Example | None
    tokens: list[int]
    error: RowError | None = None


def read_rows(rows: Rows, reader: RowReader, tokenizer: Tokenizer, filters: Filters) -> Iterator[Read]:
    """Every row that is not blank, in order, until filters.size of them are prompts."""
    seen: set[bytes] = set()
    kept = 0
    for number in range(len(rows)):
        if kept == filters.size:
            return
        place = rows.place(number)
        try:
            record = rows[number]
            if record is None:
                continue
            example = reader(record, place)
        except RowError as error:
            yield Read(number, place, None, [], error)
            continue
        tokens: list[int] = []
        try:
            # A chat template writes BOS itself, where it has one.
            tokens = _encoded(tokenizer, example.text, place, of_chat=reader.chat is not None)
            _check_length(tokens, filters, place)
            mark = hashlib.blake2b(example.text.encode(), digest_size=8).digest()
            if mark in seen:
                raise RowError(f"{place}: the prompt stands in an earlier row, too", "duplicate")
            seen.add(mark)
        except RowError as error:
            yield Read(number, place, example, tokens, error)
            kept += error.reason == "duplicate" and filters.duplicates == "keep"
            continue
        kept += 1
        yield Read(number, place, example, tokens)


class RowPrompts:
    """The prompts of `rows`, in their order; `source[i].id == i`.

    Attributes:
        dropped: rows left out, by reason.
        digest: of the rows.
        duplicates: prompts that stand in several rows and are kept.

    Raises:
        DataError: a row that is not a prompt or is too long, with its place, unless the filters drop it; no prompt at
            all.
    """

    def __init__(
        self, name: str, rows: Rows, reader: RowReader, tokenizer: Tokenizer, filters: Filters, cache: Cache
    ) -> None:
        self.name, self._rows, self._reader = name, rows, reader
        self._tokenizer, self._filters, self._cache = tokenizer, filters, cache
        self.identity = {
            "rows": rows.identity,
            "reader": reader.identity,
            "tokenizer": tokenizer.identity,
            "filters": asdict(filters),
        }
        self.digest = sha256_of(rows.identity)
        found = arrays(cache, "prompts", self.identity, self._write, num_bytes=rows.num_bytes)
        self.folder, self.about = found.folder, found.about
        self._row, self._start, self._tokens = (found.values[name] for name in ("rows", "starts", "tokens"))
        self.dropped: Mapping[str, int] = self.about["dropped"]
        self.duplicates: int = self.about["duplicates"]

    @property
    def size(self) -> int:
        return len(self._row)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < self.size:
            raise IndexError(f"prompt {index} of {self.size}")
        row = int(self._row[index])
        record, place = self._rows[row], self._rows.place(row)
        assert record is not None, place
        text, answer, solution, messages, metadata = self._reader(record, place)
        tokens = tuple(self._tokens[int(self._start[index]) : int(self._start[index + 1])].tolist())
        return Prompt(index, text, tokens, answer, solution, messages, metadata)

    def place(self, index: int) -> str:
        """Where the row of a prompt stands."""
        return self._rows.place(int(self._row[index]))

    def remembered(self, key: Any, find: Callable[[], list[str]]) -> list[str]:
        """What `find` returns; of prompts in the cache it is kept there by `key`, and found once."""
        if self.folder is None:
            return find()
        path = self.folder / f"found-{sha256_of(key)[:32]}.json"
        with self._cache.locked(self.folder.name):
            if not path.is_file():
                with written_aside(path) as file:
                    json.dump(find(), file)
        found: list[str] = json.loads(path.read_text())
        return found

    def _write(self, writer: ArrayWriter) -> dict[str, Any]:
        """Row numbers, where the tokens of each prompt begin, and the tokens."""
        dropped, places = Counter[str](), dict[str, list[str]]()
        duplicates, num_tokens, longest = 0, 0, 0
        block_rows: list[int] = []
        starts: list[int] = [0]
        tokens: list[int] = []

        def flush() -> None:
            writer.append("rows", np.array(block_rows, np.int64))
            writer.append("starts", np.array(starts, np.int64))
            writer.append("tokens", np.array(tokens, np.int32))
            for each in (block_rows, starts, tokens):
                each.clear()

        for read in read_rows(self._rows, self._reader, self._tokenizer, self._filters):
            if read.error and self._leaves_out(read.error):
                dropped[read.error.reason] += 1
                if dropped[read.error.reason] <= LISTED:
                    places.setdefault(read.error.reason, []).append(str(read.error))
                continue
            duplicates += read.error is not None
            num_tokens += len(read.tokens)
            longest = max(longest, len(read.tokens))
            block_rows.append(read.row)
            tokens.extend(read.tokens)
            starts.append(num_tokens)
            if len(block_rows) == BLOCK:
                flush()
        flush()
        if not num_tokens:
            listed = "".join(f"\n  {text}" for texts in places.values() for text in texts)
            raise DataError(
                f"{self.name} contains no prompts; expected one object per row"
                + (f". Of its rows, {counted(dropped)} were left out:{listed}" if dropped else "")
            )
        return {"dropped": dict(dropped), "places": places, "duplicates": duplicates, "longest": longest}

    def _leaves_out(self, error: RowError) -> bool:
        """
        Raises:
            RowError: the filters do not let the row be left out.
        """
        rule = self._filters.rule(error.reason)
        if rule == "error":
            raise error
        return rule == "drop"


def counted(reasons: Mapping[str, int]) -> str:
    """`3 too long, 1 duplicate`."""
    return ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())


def _encoded(tokenizer: Tokenizer, text: str, place: str, *, of_chat: bool) -> list[int]:
    """
    Raises:
        RowError: the tokenizer rejects the text or makes nothing of it, or BOS stands twice at the beginning: the
            model was trained on one.
    """
    try:
        tokens = (tokenizer.encode if of_chat else tokenizer.encode_prompt)(text)
    except DataError as error:
        raise RowError(f"{place}: {error}", "tokenizer") from error
    if not tokens:
        raise RowError(
            f"{place}: the prompt {text[:60]!r} has no tokens; a response needs at least one to follow", "empty"
        )
    if tokenizer.bos_id is not None and tokens[:2] == [tokenizer.bos_id] * 2:
        raise RowError(
            f"{place}: the prompt begins with two BOS tokens (id {tokenizer.bos_id}); the chat template or "
            "data.prompt_template writes one that the text, or the template itself, has already: remove it there",
            "two BOS tokens",
        )
    return tokens


def _check_length(tokens: list[int], filters: Filters, place: str) -> None:
    if len(tokens) > filters.max_tokens:
        raise RowError(
            f"{place}: the prompt has {plural(len(tokens), 'token')}, the limit is {filters.max_tokens} "
            "(data.max_prompt_tokens, or what rollout.max_new_tokens leaves of model.max_sequence_length); raise it, "
            "or leave such prompts out with data.overlong=drop",
            "too long",
        )
