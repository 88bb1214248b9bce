"""Conversations as text: the chat templates of Hugging Face folders, rendered by Jinja in its sandbox.

The environment is the one that transformers documents for templates (Chat templates, "Writing a chat template"):
trim_blocks, lstrip_blocks, loop controls, `raise_exception`, `strftime_now` and a `tojson` that escapes nothing.
`strftime_now` tells one day for a whole run, and midnight: a prompt must not depend on the rank, or on when a run is
continued. tests/data/test_hugging_face.py compares the text with transformers' own.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time, timezone
from typing import Any, ClassVar, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gspo_megatron.base.errors import DataError

LIMIT_S = 10.0
"""A conversation whose text takes longer is refused: a template can loop."""
STAND_IN = "gspo-megatron-stand-in-48d1"
"""A text that nobody says: it is found again in what a template writes."""
ROLES = "system, user, assistant or tool"


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what an assistant wrote; its text is that of its body."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja template from messages to the text of a prompt, ending where the assistant's turn begins.

    Args:
        source: the template.
        special: special tokens that it may name, such as `bos_token`.
        name: what messages call it.
        arguments: its own parameters, such as `enable_thinking`.
        today: the day that `strftime_now` tells; None: the present one, in UTC.

    Attributes:
        tells_day: whether its text may depend on `today`.

    Raises:
        DataError: not a Jinja template.
    """

    def __init__(
        self,
        source: str,
        special: Mapping[str, str],
        *,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        today: date | None = None,
    ) -> None:
        self.source, self.name, self._special, self.arguments = source, name, dict(special), dict(arguments or {})
        midnight = datetime.combine(today or datetime.now(timezone.utc).date(), time())
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": midnight.strftime}
        self.tells_day = "strftime_now" in source
        day = str(midnight) if self.tells_day else None
        self.identity = [source, self._special, self.arguments, day]
        """What decides its texts, as JSON."""
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"{name}, line {error.lineno}, is not a Jinja template: {error}") from error

    def with_arguments(self, arguments: Mapping[str, Any], today: date | None = None) -> ChatTemplate:
        return ChatTemplate(self.source, self._special, name=self.name, arguments=arguments, today=today)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text of a conversation, followed by the beginning of the assistant's turn.

        Raises:
            DataError: messages without role or content, or a template that raises or takes longer than LIMIT_S.
        """
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise DataError(f"message {number} is {str(message)[:60]!r}; expected an object with a role ({ROLES})")
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
        try:
            with _time_limit(LIMIT_S):
                return self._template.render(**(self._special | given | self.arguments))
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise DataError(f"{self.name} does not take this conversation ({type(error).__name__}: {error})") from error
        except TimeoutError as error:
            raise DataError(f"{self.name} was not done after {LIMIT_S:g} s; does it loop?") from error

    def after_turn(self, messages: Sequence[Mapping[str, Any]], reply: Mapping[str, Any]) -> str:
        """The text between what the assistant said in reply to `messages` and its next turn: the end of its message,
        the message `reply`, and the beginning of the turn.

        Found behind a stand-in for what the assistant said, whose own tokens never become text again.

        Raises:
            DataError: as `render`, or the template does not write the assistant's text once.
        """
        text = self.render([*messages, {"role": "assistant", "content": STAND_IN}, reply])
        if text.count(STAND_IN) != 1:
            raise DataError(f"{self.name} writes what an assistant said {text.count(STAND_IN)} times, expected once")
        return text.partition(STAND_IN)[2]


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after `seconds`. Only the main thread can be interrupted; in others there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> NoReturn:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
