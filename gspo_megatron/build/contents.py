"""What a run reads, by its content: data, tokenizer, and modules of rewards and environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from gspo_megatron.base.files import digest_of
from gspo_megatron.build.eval_sets import setting_of
from gspo_megatron.build.inputs import Inputs
from gspo_megatron.build.programs import reward_names
from gspo_megatron.run.state import Contents

OF_A_TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt")
"""The files of a Hugging Face folder that can be its tokenizer's."""


def contents_of(inputs: Inputs) -> Contents:
    """Digests of what the settings name. What is generated, is not a file or cannot be read has none."""
    digests = {"data.train": inputs.train_prompts.digest}
    digests |= {setting_of(each): each.prompts.digest for each in inputs.sets}
    digests = {name: digest for name, digest in digests.items() if digest}
    for name, files in _files(inputs):
        with suppress(OSError):
            if files:
                digests[name] = digest_of(*files)
    return Contents(digests, inputs.train_prompts.size)


def _files(inputs: Inputs) -> Iterator[tuple[str, list[Path]]]:
    """(setting, files in order): of data.tokenizer, and the modules of rewards and of rollout.environment."""
    config = inputs.config
    yield "data.tokenizer", _files_of(Path(config.data.tokenizer), OF_A_TOKENIZER)
    for kind, names in (("reward", reward_names(config)), ("environment", [config.rollout.environment])):
        for name in sorted({name.partition(":")[0] for name in names if ":" in name}):
            yield f"{kind} module {name}", _file_of_module(name)


def _file_of_module(name: str) -> list[Path]:
    spec = None
    with suppress(Exception):  # importing the packages around a module runs user code
        spec = find_spec(name)
    return [Path(spec.origin)] if spec and spec.origin and spec.has_location else []


def _files_of(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The file, or the files in a folder; none where the path is no path, such as a long alphabet (characters:...)."""
    if os.path.isdir(path):
        return sorted(file for pattern in patterns for file in path.glob(pattern) if file.is_file())
    return [path] if os.path.isfile(path) else []
