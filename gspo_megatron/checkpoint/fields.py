"""The fields of run.json, each with what it must hold: a file may have been edited, or sealed by another program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gspo_megatron.base.errors import CheckpointError, shortened

LARGEST = 2**53
"""Counts above this are not exact in JSON of other programs, and no run gets there."""


class Field(NamedTuple):
    """What a value must be, in words and as a test."""

    is_a: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


COUNT = Field("a whole number from 0 to 2^53", lambda value: type(value) is int and 0 <= value <= LARGEST)
FLAG = Field("true or false", lambda value: type(value) is bool)
NUMBER = Field("a number", _is_number)
TEXT = Field("text", lambda value: type(value) is str)
LIST = Field("a list", lambda value: type(value) is list)
OBJECT = Field("an object", lambda value: type(value) is dict)
OBJECTS = Field(
    "an object of objects", lambda value: type(value) is dict and all(type(x) is dict for x in value.values())
)
NUMBERS = Field("a list of numbers", lambda value: type(value) is list and all(map(_is_number, value)))


def _by_name(field: Field, is_a: str) -> Field:
    return Field(is_a, lambda value: type(value) is dict and all(map(field.fits, value.values())))


NUMBER_BY_NAME = _by_name(NUMBER, "an object of numbers")
COUNT_BY_NAME = _by_name(COUNT, "an object of whole numbers from 0 to 2^53")
NUMBERS_BY_NAME = _by_name(NUMBERS, "an object of lists of numbers")
BY_COUNT = Field(
    "objects with lists of counts by a count",
    lambda value: OBJECTS.fits(value) and all(_is_by_count(key, x[key]) for x in value.values() for key in x),
)
COUNTS = Field("a list of three counts", lambda value: _is_counts(value, 3))


def _is_counts(value: Any, length: int) -> bool:
    return type(value) is list and len(value) == length and all(map(COUNT.fits, value))


def _is_by_count(key: Any, value: Any) -> bool:
    return key.isdecimal() and type(value) is list and all(map(COUNT.fits, value))


def optional(field: Field) -> Field:
    """`field`, or null, or nothing at all."""
    return Field(f"{field.is_a}, or null", lambda value: value is None or field.fits(value))


def check_fields(about: Any, fields: Mapping[str, Field], where: str) -> None:
    """
    Raises:
        CheckpointError: `about` is no object, or lacks a field, or has one that is something else.
    """
    if type(about) is not dict:
        raise CheckpointError(f"{where} is {shortened(repr(about), 60)}, not an object; {_INSTEAD}")
    for name, field in fields.items():
        if not field.fits(about.get(name)):
            found = f"is {shortened(repr(about[name]), 60)}" if name in about else "is missing"
            raise CheckpointError(f"{where}: {name} {found}; expected {field.is_a}; {_INSTEAD}")


_INSTEAD = "the file was edited, or is not this program's: use another checkpoint"
