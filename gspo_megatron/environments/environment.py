"""What an environment is: it answers a turn of the model, or ends the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from gspo_megatron.base.batches import Rollout

LONGEST = 100_000
"""Characters of an answer. A longer one is a mistake, and no response has room for it."""


@dataclass(frozen=True)
class Turn:
    """What an environment answers.

    Attributes:
        content: the text; nothing is added where it is empty.
        role: whose message it is, such as `tool` or `user`, in the words of the chat template where the prompt is a
            conversation. `assistant`: the text goes on in the model's own message, as a result that a calculator
            writes into it.
        done: the conversation has ended, and nothing is added.
        calls: tools that were called.
        failed: those of them without a result; `content` says so to the model.
        error: the environment itself failed: the conversation ends here, counted and named.
    """

    content: str = ""
    role: str = "tool"
    done: bool = False
    calls: int = 0
    failed: int = 0
    error: str = ""


DONE = Turn(done=True)
RETURNED: dict[str, type] = {"content": str, "role": str, "done": bool, "calls": int, "failed": int}
"""What a user's function may return in a dict, and the types of its values."""


class Environment(Protocol):
    """Answers conversations. It keeps nothing between two calls: what it needs to know is in the rollout, so that a
    conversation is the same on every layout and after a resume.

    Attributes:
        stop: texts that end a turn, besides rollout.stop.
    """

    @property
    def stop(self) -> Sequence[str]: ...

    def replies(self, rollouts: Sequence[Rollout]) -> list[Turn]:
        """One answer to the last turn of each rollout, whose `text` it is; `turns` has the conversation so far."""

    def use_workers(self, count: int) -> None:
        """Answers in up to `count` processes, where it needs any."""

    def close(self) -> None:
        """Ends the processes that it has started."""


class InProcess:
    """What an environment is that needs no process."""

    stop: Sequence[str] = ()

    def use_workers(self, count: int) -> None:
        """See `Environment.use_workers`."""

    def close(self) -> None:
        """See `Environment.close`."""


def turn_of(value: Any) -> Turn:
    """What a user's function returned: None where the conversation has ended, the text of a user's message, or a dict
    with the fields of a `Turn`.

    Raises:
        TypeError, ValueError: anything else.
    """
    if value is None:
        return DONE
    if isinstance(value, str):
        value = {"content": value, "role": "user"}
    shown = repr(value)[:60]
    if type(value) is not dict:
        raise TypeError(f"it returned {shown}; expected a text, a dict with a 'content', or None at the end")
    for name, part in value.items():
        if name not in RETURNED:
            raise ValueError(f"it returned {shown}; of a dict, {', '.join(RETURNED)} are known, not {name!r}")
        if type(part) is not RETURNED[name] or (type(part) is int and part < 0):
            raise TypeError(f"it returned {name}={part!r:.60}; expected a value of type {RETURNED[name].__name__}")
    if value.get("content") and value.get("done"):
        raise ValueError(f"it returned {shown}; a conversation that is done has no further content")
    return Turn(**value)
