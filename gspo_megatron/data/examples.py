"""A row as an example: the text that the model sees, the answer, the solution, and what else the reward may want."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.data.chat import ChatTemplate
from gspo_megatron.data.rows import Record, RowError, messages_field, other_fields, text_field

FIELD = re.compile(r"\{\{(?P<literal>\w+)\}\}|\{(?P<name>\w+)\}")
"""A field in a prompt template, or a word in literal braces."""


def fields_of(template: str) -> list[str]:
    """The fields that a prompt template names."""
    return [match["name"] for match in FIELD.finditer(template) if match["name"]]


class Example(NamedTuple):
    """The parts of a `Prompt` that a row decides; without tokens."""

    text: str
    answer: str
    solution: str
    messages: tuple[dict[str, Any], ...]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class RowReader:
    """Which fields of a row are what.

    `prompt_template` is the text the model sees: `{prompt}` in it stands for the prompt field, `{name}` for any other
    field of the row. `{{word}}` is the literal `{word}`; other braces stay as they are. With `chat` that text is what
    the user says in a conversation, unless `messages_field` names a field that holds a whole one. The solution is the
    answer unless `solution_field` is given. Fields that are none of these are metadata.

    Raises:
        ConfigError: a template without a field.
    """

    prompt_field: str = "prompt"
    answer_field: str = "answer"
    solution_field: str | None = None
    prompt_template: str = "{prompt}"
    chat: ChatTemplate | None = None
    messages_field: str | None = None

    def __post_init__(self) -> None:
        if not fields_of(self.prompt_template):
            raise ConfigError(
                f"data.prompt_template={self.prompt_template!r} has no {{prompt}}: all prompts would be the same; add "
                "it"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the texts, as JSON."""
        asked = {name: value for name, value in vars(self).items() if name != "chat"}
        return asked | {"chat": self.chat and self.chat.identity}

    def __call__(self, record: Record, place: str) -> Example:
        """The example of a row.

        Raises:
            RowError: a field that is missing or of another type, an empty prompt, or a conversation that the template
                refuses.
        """
        messages: list[dict[str, Any]] = []
        if self.messages_field:
            messages = messages_field(record, self.messages_field, place)
        else:
            text = self._filled(record, place)
            if self.chat:
                messages = [{"role": "user", "content": text}]
        if self.chat:
            try:
                text = self.chat.render(messages)
            except DataError as error:
                raise RowError(f"{place}: {error}", "chat template") from error
        answer = text_field(record, self.answer_field, place)
        solution = text_field(record, self.solution_field, place) if self.solution_field else answer
        used = (self.messages_field or self.prompt_field, self.answer_field, self.solution_field or "")
        return Example(text, answer, solution, tuple(messages), other_fields(record, used))

    def _filled(self, record: Record, place: str) -> str:
        prompt = text_field(record, self.prompt_field, place)
        if not prompt.strip():
            raise RowError(f"{place}: field {self.prompt_field!r} is empty; expected a prompt", "empty")

        def written(match: re.Match[str]) -> str:
            if match["literal"]:
                return f"{{{match['literal']}}}"
            return prompt if match["name"] == "prompt" else text_field(record, match["name"], place)

        return FIELD.sub(written, self.prompt_template)
