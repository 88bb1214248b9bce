"""A Python that the model runs programs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from gspo_megatron.environments.environment import DONE, Turn

if TYPE_CHECKING:
    from gspo_megatron.base.batches import Rollout


class Ran(NamedTuple):
    """What became of a program.

    Attributes:
        output: what it printed.
        failure: why it did not run to its end, for the model; empty where it did.
        error: why it was not run at all, which says nothing about it.
    """

    output: str
    failure: str = ""
    error: str = ""


class PythonTool:
    """Runs a program that a turn ends with, and writes what it printed behind it, in the model's own message:

        <python>print(6 * 7)</python><output>42</output>

    Every program starts afresh; nothing is kept from one to the next. A turn that does not end with a program is the
    last.

    Args:
        run: runs a program in a sandbox.
        begin, end: the marks of a program.
        answer: what is written behind it; `{output}` stands for what it printed, and why it failed where it did.
        most_characters: of that output; the middle of a longer one is left out.

    Raises:
        ValueError: an empty mark, an answer without {output}, or fewer characters than 20.
    """

    def __init__(
        self,
        run: Callable[[str], Ran],
        begin: str = "<python>",
        end: str = "</python>",
        answer: str = "<output>{output}</output>",
        most_characters: int = 2000,
    ) -> None:
        if not begin or not end:
            raise ValueError(f"begin={begin!r} and end={end!r} must not be empty")
        if "{output}" not in answer:
            raise ValueError(f"answer={answer!r} must contain {{output}}")
        if type(most_characters) is not int or most_characters < 20:
            raise ValueError(f"most_characters={most_characters!r} must be a whole number, at least 20")
        self.run, self.begin, self.end, self.answer = run, begin, end, answer
        self.most_characters, self.stop = most_characters, (end,)
        self._threads: ThreadPoolExecutor | None = None

    def replies(self, rollouts: Sequence[Rollout]) -> list[Turn]:
        """See `Environment.replies`."""
        texts = [rollout.text for rollout in rollouts]
        return list(self._threads.map(self._reply, texts) if self._threads else map(self._reply, texts))

    def use_workers(self, count: int) -> None:
        """See `Environment.use_workers`: up to `count` programs run at once."""
        self.close()
        self._threads = ThreadPoolExecutor(count, "python")

    def close(self) -> None:
        """See `Environment.close`."""
        if self._threads:
            self._threads.shutdown()
            self._threads = None

    def _reply(self, text: str) -> Turn:
        _, found, program = text.removesuffix(self.end).rpartition(self.begin)
        if not found or not text.endswith(self.end):
            return DONE
        ran = self.run(program)
        if ran.error:
            return Turn(calls=1, error=ran.error)
        output = "\n".join(part for part in (ran.output.strip("\n"), ran.failure) if part)
        content = self.answer.replace("{output}", self._shortened(output))
        return Turn(content, "assistant", calls=1, failed=int(bool(ran.failure)))

    def _shortened(self, output: str) -> str:
        if len(output) <= self.most_characters:
            return output
        half = (self.most_characters - 5) // 2
        return f"{output[:half]} ... {output[-half:]}"
