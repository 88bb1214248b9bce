"""Prompts from a JSONL file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gspo_megatron.base.batches import Prompt
from gspo_megatron.base.errors import ConfigError, DataError, did_you_mean, shortened
from gspo_megatron.data.chat import ChatTemplate
from gspo_megatron.data.token_ids import Tokenizer


class JsonlPrompts:
    """The prompts of a JSONL file: one JSON object per line, blank lines skipped, at most the first `size` prompts.

    `prompt_template` is the text the model sees: `{prompt}` in it stands for the prompt field, `{name}` for any other
    field of the object. `{{word}}` is the literal `{word}`; other braces stay as they are. With `chat` that text is
    what the user says in a conversation, unless `messages_field` names a field that holds a whole one. The solution is
    the answer unless `solution_field` is given. A prompt of more than `max_prompt_tokens` tokens is an error, or, with
    overlong="drop", left out and counted in `dropped`.

    Raises:
        DataError: a line that is not a JSON object, lacks a field, or has a prompt that is empty or that the tokenizer
            rejects (with file and line); a missing or empty file.
        ConfigError: a template without a field, or an unknown `overlong`.
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
        chat: ChatTemplate | None = None,
        messages_field: str | None = None,
        max_prompt_tokens: int,
        overlong: str = "error",
        size: int | None = None,
    ) -> None:
        if overlong not in ("error", "drop"):
            raise ConfigError(f"data.overlong={overlong!r} must be 'error' or 'drop'")
        if not fields_of(prompt_template):
            raise ConfigError(
                f"data.prompt_template={prompt_template!r} has no {{prompt}}: all prompts would be the same; add it"
            )
        self.dropped = 0
        self._prompts: list[Prompt] = []
        for place, record in read_records(path):
            if size is not None and len(self._prompts) == size:
                break
            if messages_field:
                messages = messages_of(record, messages_field, place)
            else:
                text = _fill(prompt_template, prompt_field, record, place)
                messages = [{"role": "user", "content": text}]
            if chat:
                text = _rendered(chat, messages, place)
            answer = text_field(record, answer_field, place)
            solution = text_field(record, solution_field, place) if solution_field else answer
            # A chat template writes BOS itself, where it has one.
            tokens = _encode(tokenizer.encode if chat else tokenizer.encode_prompt, text, place)
            _check_bos(tokens, tokenizer, place)
            if len(tokens) <= max_prompt_tokens:
                self._prompts.append(Prompt(len(self._prompts), text, tuple(tokens), answer, solution))
            elif overlong == "drop":
                self.dropped += 1
            else:
                raise DataError(
                    f"{place}: the prompt has {len(tokens)} tokens, the limit is {max_prompt_tokens} "
                    "(data.max_prompt_tokens, or what rollout.max_new_tokens leaves of model.max_sequence_length); "
                    "raise it, or leave such prompts out with data.overlong=drop"
                )
        if not self._prompts:
            raise DataError(
                f"{path} contains no prompts; expected one JSON object per line ({self.dropped} prompts were dropped "
                f"because they have more than {max_prompt_tokens} tokens)"
            )

    @property
    def size(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]


FIELD = re.compile(r"\{\{(?P<literal>\w+)\}\}|\{(?P<name>\w+)\}")
"""A field in a prompt template, or a word in literal braces."""


def fields_of(template: str) -> list[str]:
    """The fields that a prompt template names."""
    return [match["name"] for match in FIELD.finditer(template) if match["name"]]


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) for every line of a JSONL file that is not blank; `place` is "file:line", for messages.

    Raises:
        DataError: a missing file (suggests the closest name in its folder), text that is not UTF-8, or a line that is
            not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        found = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
        near = "." if path.exists() else did_you_mean(path.name, names) or "."
        raise DataError(f"the file {path} {found}{near} Expected a JSONL file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"the file {path} cannot be read ({error})") from error
    with file as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig")
                record = json.loads(text) if text.strip() else None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not JSON in UTF-8 ({error}); expected one object per line") from error
            if isinstance(record, dict):
                yield place, record
            elif text.strip():
                raise DataError(f"{place}: found {text.strip()[:60]!r}; expected a JSON object, {{...}}")


def text_field(record: dict[str, Any], name: str, place: str) -> str:
    """Field `name` as text; a number is converted.

    Raises:
        DataError: a missing field, or one of another type.
    """
    if name not in record:
        near = did_you_mean(name, record) or "."
        raise DataError(f"{place}: no field {name!r}{near} Fields: {shortened(', '.join(record)) or 'none'}")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{place}: field {name!r} is {json.dumps(value)[:60]}; expected text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{place}: field {name!r} is {value}, which JSON does not have; write the number, or text")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {name!r} has half a surrogate pair, {text[error.start]!a}, which is not text; remove "
            "it, or write the whole character"
        ) from error
    return text


def _fill(template: str, prompt_field: str, record: dict[str, Any], place: str) -> str:
    prompt = text_field(record, prompt_field, place)
    if not prompt.strip():
        raise DataError(f"{place}: field {prompt_field!r} is empty; expected a prompt")

    def written(match: re.Match[str]) -> str:
        if match["literal"]:
            return f"{{{match['literal']}}}"
        return prompt if match["name"] == "prompt" else text_field(record, match["name"], place)

    return FIELD.sub(written, template)


def messages_of(record: dict[str, Any], name: str, place: str) -> list[dict[str, Any]]:
    """Field `name` as a conversation.

    Raises:
        DataError: a missing field, or one that is not a list of messages.
    """
    if name not in record:
        near = did_you_mean(name, record) or "."
        raise DataError(f"{place}: no field {name!r}{near} Fields: {shortened(', '.join(record)) or 'none'}")
    value = record[name]
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{place}: field {name!r} is {json.dumps(value)[:60]}; expected messages, "
            '[{"role": "user", "content": "..."}]'
        )
    return value


def _rendered(chat: ChatTemplate, messages: list[dict[str, Any]], place: str) -> str:
    try:
        return chat.render(messages)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _encode(encode: Callable[[str], list[int]], text: str, place: str) -> list[int]:
    try:
        tokens = encode(text)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    if not tokens:
        raise DataError(f"{place}: the prompt {text[:60]!r} has no tokens; a response needs at least one to follow")
    return tokens


def _check_bos(tokens: list[int], tokenizer: Tokenizer, place: str) -> None:
    """
    Raises:
        DataError: BOS stands twice at the beginning. The model was trained on one.
    """
    if tokenizer.bos_id is not None and tokens[:2] == [tokenizer.bos_id] * 2:
        raise DataError(
            f"{place}: the prompt begins with two BOS tokens (id {tokenizer.bos_id}); the chat template or "
            "data.prompt_template writes one that the text, or the template itself, has already: remove it there"
        )
