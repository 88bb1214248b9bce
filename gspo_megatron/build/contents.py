"""What a run reads, by its content: data, tokenizer and reward modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from gspo_megatron.base.files import digest_of
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.data.sources import scheme_of
from gspo_megatron.run.state import Contents

OF_A_TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt")
"""The files of a Hugging Face folder that can be its tokenizer's."""


def contents_of(inputs: Inputs) -> Contents:
    """Digests of the files that the settings name. What is no file, or cannot be read, has none."""
    digests = {}
    for name, files in _files(inputs):
        with suppress(OSError):
            if files:
                digests[name] = digest_of(*files)
    return Contents(digests, inputs.train_prompts.size)


def _files(inputs: Inputs) -> Iterator[tuple[str, list[Path]]]:
    """(setting, files in order): of data.train, data.eval, data.tokenizer and the modules of reward.functions."""
    data = inputs.config.data
    for name, source in (("data.train", data.train), ("data.eval", data.eval)):
        if source is not None:
            yield name, _files_of(Path(source.removeprefix(f"{scheme_of(source)}:")), ("*",))
    yield "data.tokenizer", _files_of(Path(data.tokenizer), OF_A_TOKENIZER)
    for name in sorted({name.partition(":")[0] for name in inputs.config.reward.functions if ":" in name}):
        spec = None
        with suppress(Exception):  # importing the packages around a module runs user code
            spec = find_spec(name)
        yield f"reward module {name}", [Path(spec.origin)] if spec and spec.origin and spec.has_location else []


def _files_of(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The file, or the files in a folder."""
    if path.is_dir():
        return sorted(file for pattern in patterns for file in path.glob(pattern) if file.is_file())
    return [path] if path.is_file() else []
