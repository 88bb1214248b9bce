"""What a user's reward changes in its process stays with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from gspo_megatron.base.errors import printable, shortened


@contextmanager
def contained() -> Iterator[None]:
    """On leaving, torch's grad mode and default dtype and the working folder are what they were.

    Code that loads a reward model often turns gradients off for the whole process, after which an update would change
    nothing; code that runs programs changes the folder, and relative paths of the run would lead elsewhere. Random
    number generators are left alone: their state belongs to the run and is saved with it.
    """
    import torch  # not above: the processes that judge rewards import this file, and start in milliseconds without it

    grad_mode, dtype, folder = torch.is_grad_enabled(), torch.get_default_dtype(), os.getcwd()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad_mode)
        torch.set_default_dtype(dtype)
        os.chdir(folder)


def described(error: BaseException) -> str:
    """A user's error in one message: its own text may raise, be megabytes long, or steer the terminal."""
    try:
        text = str(error)
    except BaseException as second:
        text = f"its text cannot be had, {type(second).__name__}"
    return f"{type(error).__name__}: {plain(text)}"


def plain(text: str, most: int = 2000) -> str:
    """Text of a user's code, short and without characters that steer the terminal."""
    return printable(shortened(text, most))
