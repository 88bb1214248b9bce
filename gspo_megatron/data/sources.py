"""Where prompts come from, generated tasks or JSONL files, and the order in which a run takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from gspo_megatron.base.batches import Prompt
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.data.generated import GeneratedPrompts, find_task
from gspo_megatron.data.jsonl import JsonlPrompts
from gspo_megatron.data.tokenizers import Tokenizer


class PromptSource(Protocol):
    """Prompts by index: `source[i].id == i` for 0 <= i < size."""

    dropped: int
    """Prompts left out because they are too long."""

    @property
    def size(self) -> int | None:
        """The number of prompts; None where they never end."""

    def __getitem__(self, index: int) -> Prompt: ...


def load_prompts(
    spec: str,
    tokenizer: Tokenizer,
    *,
    split: str,
    seed: int,
    max_prompt_tokens: int,
    size: int | None = None,
    task_parameters: Mapping[str, Any] | None = None,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    solution_field: str | None = None,
    prompt_template: str = "{prompt}",
    overlong: str = "error",
) -> PromptSource:
    """The prompts that `spec` names: a generated task ("task:sort_digits") or the path of a JSONL file.

    `split` ("train" or "eval"), `seed` and `task_parameters` concern tasks only; the fields, the template and
    `overlong` files only. `size` is exact for a task's eval split and an upper bound for a file.
    Errors: those of find_task, GeneratedPrompts and JsonlPrompts; ConfigError for a size below 1.
    """
    if size is not None and size < 1:
        raise ConfigError(f"{size} {split} prompts were asked for; expected at least 1")
    if spec.startswith("task:"):
        task = find_task(spec.removeprefix("task:"), **(task_parameters or {}))
        return GeneratedPrompts(task, tokenizer, split=split, seed=seed, size=size, max_prompt_tokens=max_prompt_tokens)
    return JsonlPrompts(
        spec,
        tokenizer,
        prompt_field=prompt_field,
        answer_field=answer_field,
        solution_field=solution_field,
        prompt_template=prompt_template,
        max_prompt_tokens=max_prompt_tokens,
        overlong=overlong,
        size=size,
    )
