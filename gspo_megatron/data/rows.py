"""Rows of a data set: objects by number, each with a place that messages name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from gspo_megatron.base.errors import DataError, did_you_mean, shortened

Record = dict[str, Any]


class RowError(DataError):
    """A row that cannot be used.

    Attributes:
        reason: a word or two, by which such rows are counted.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Rows(Protocol):
    """Attributes:
    identity: what names the content, as JSON: equal for equal rows.
    num_bytes: size of the data.
    """

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def num_bytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record | None:
        """The row; None for a blank line.

        Raises:
            RowError: it is not an object.
            DataError: the data changed since it was opened.
        """

    def place(self, index: int) -> str:
        """Where the row stands, such as `train.jsonl:17`."""


def existing_file(path: str | Path, expected: str = "a JSONL file") -> Path:
    """`path`, where it is a regular file.

    Raises:
        DataError: it is not. Suggests the closest name in its folder.
    """
    path = Path(path)
    if path.is_file():
        return path
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    found = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
    near = "." if path.exists() else did_you_mean(path.name, names) or "."
    raise DataError(f"the file {path} {found}{near} Expected {expected}")


def state_of(path: Path) -> dict[str, Any]:
    """What tells one version of a file from another without reading it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        path.open("rb").close()
        found = path.stat()
    except OSError as error:
        raise DataError(f"the file {path} cannot be read ({error})") from error
    return {"path": str(path.resolve()), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


# --- fields of a row ---


def text_field(record: Record, name: str, place: str) -> str:
    """Field `name` as text; a number is converted.

    Raises:
        RowError: a missing field, or one of another type.
    """
    value = _field(record, name, place)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(f"{place}: field {name!r} is {_shown(value)}; expected text or a number", "wrong type")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(
            f"{place}: field {name!r} is {value}, which JSON does not have; write the number, or text", "wrong type"
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{place}: field {name!r} has half a surrogate pair, {text[error.start]!a}, which is not text; remove "
            "it, or write the whole character",
            "not text",
        ) from error
    return text


def messages_field(record: Record, name: str, place: str) -> list[dict[str, Any]]:
    """Field `name` as a conversation.

    Raises:
        RowError: a missing field, or one that is not a list of messages.
    """
    value = _field(record, name, place)
    if not isinstance(value, list) or not value:
        raise RowError(
            f'{place}: field {name!r} is {_shown(value)}; expected messages, [{{"role": "user", "content": "..."}}]',
            "wrong type",
        )
    return value


def other_fields(record: Record, used: Iterable[str]) -> Record:
    """What is left of a row, as JSON: a table's dates and decimals become text, its bytes hexadecimal digits."""
    used = set(used)
    return {name: _json_of(value) for name, value in record.items() if name not in used}


def _field(record: Record, name: str, place: str) -> Any:
    if name not in record:
        near = did_you_mean(name, record) or "."
        raise RowError(
            f"{place}: no field {name!r}{near} Fields: {shortened(', '.join(record)) or 'none'}", "missing field"
        )
    return record[name]


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def _json_of(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {str(name): _json_of(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_of(each) for each in value]
    return value.hex() if isinstance(value, bytes) else str(value)
