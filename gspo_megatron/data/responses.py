"""Responses to score, from a JSONL file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gspo_megatron.base.errors import DataError, plural
from gspo_megatron.data.jsonl import read_records
from gspo_megatron.data.rows import text_field
from gspo_megatron.data.token_ids import Tokenizer

FORMS = '{"tokens": [...], "prompt_length": k} or {"prompt": "...", "response": "..."}'
ADDED = "log_probs"
"""The field that scoring adds to a line."""


class Response(NamedTuple):
    """A line: its object, and the tokens of prompt and response, the first `prompt_length` of which are the prompt."""

    place: str
    record: dict[str, Any]
    tokens: list[int]
    prompt_length: int


def read_responses(path: str | Path, tokenizer: Tokenizer, *, vocab_size: int, max_tokens: int) -> Iterator[Response]:
    """The responses of a JSONL file, in order.

    A line has token ids, or text: `tokens` and `prompt_length` count where it has both. Text is encoded as in
    training, prompt and response each on its own; an end of sequence counts only where the response spells it out.

    Raises:
        DataError: with file and line, a line that has neither form, or that cannot be scored: no prompt, an id
            outside the vocabulary, more than `max_tokens` tokens.
    """
    for place, record in read_records(path):
        if ADDED in record:
            raise DataError(f"{place}: has a field {ADDED!r} already, which scoring adds; rename it")
        if "tokens" in record:
            tokens, prompt_length = _given(record, place)
        elif "prompt" in record and "response" in record:
            tokens, prompt_length = _encoded(record, tokenizer, place)
        else:
            raise DataError(f"{place}: has the fields {', '.join(record) or 'none'}; expected {FORMS}")
        if prompt_length < 1:
            raise DataError(f"{place}: the prompt has no tokens; a response needs at least one to follow")
        if len(tokens) > max_tokens:
            raise DataError(
                f"{place}: prompt and response have {len(tokens)} tokens, more than {max_tokens}, the limit of "
                "model.max_sequence_length and train.tokens_per_micro_batch; raise them, or leave the line out"
            )
        if wrong := [token for token in tokens if not 0 <= token < vocab_size]:
            raise DataError(
                f"{place}: token id {wrong[0]} is outside the model's vocabulary, 0 to {vocab_size - 1}; do the tokens "
                "belong to this model?"
            )
        yield Response(place, record, tokens, prompt_length)


def _given(record: dict[str, Any], place: str) -> tuple[list[int], int]:
    tokens, prompt_length = record["tokens"], record.get("prompt_length")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise DataError(f"{place}: field 'tokens' is {str(tokens)[:60]}; expected a list of token ids")
    if type(prompt_length) is not int or not 0 <= prompt_length <= len(tokens):
        raise DataError(
            f"{place}: field 'prompt_length' is {prompt_length!r}; expected how many of the "
            f"{plural(len(tokens), 'token')} are the prompt"
        )
    return tokens, prompt_length


def _encoded(record: dict[str, Any], tokenizer: Tokenizer, place: str) -> tuple[list[int], int]:
    prompt, response = (text_field(record, name, place) for name in ("prompt", "response"))
    try:
        tokens = tokenizer.encode_prompt(prompt)
        return [*tokens, *tokenizer.encode(response)], len(tokens)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
