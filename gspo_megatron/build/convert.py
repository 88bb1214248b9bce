"""What `gspo_megatron.convert` does: a checkpoint to a Hugging Face folder, and a folder looked at and tried out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

from gspo_megatron.base.errors import CheckpointError, ConfigError, DataError, memory_size, plural
from gspo_megatron.build.inputs import settle_model
from gspo_megatron.build.scoring import open_scorer
from gspo_megatron.build.trainer import device_of, folder_files
from gspo_megatron.checkpoint.contents import files_of, read_about, saved_sections
from gspo_megatron.checkpoint.conversion import CheckpointWeights, ResumableExport, source_of
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.checkpoint.export import EXPORTED, FILE_BYTES, FolderFiles
from gspo_megatron.checkpoint.hugging_face import HuggingFaceFolder
from gspo_megatron.checkpoint.inspection import Row, inspect
from gspo_megatron.checkpoint.manifest import verify
from gspo_megatron.checkpoint.names import CHECKPOINTS
from gspo_megatron.checkpoint.reference import transformers_log_probs
from gspo_megatron.config.hugging_face import folder_settings
from gspo_megatron.config.loading import SETTINGS, load_config
from gspo_megatron.config.model import ModelConfig
from gspo_megatron.data.responses import Response
from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.models.families import family_of
from gspo_megatron.models.shape import ModelShape
from gspo_megatron.monitor.console import Console

TEXT = (
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? From 9:40 to 13:00 there are 3 hours and 20 "
    "minutes, and 5 more to 13:05, so it takes 3 hours and 25 minutes, that is 205 minutes.\n\n"
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n\n"
    "Über allen Gipfeln ist Ruh'. 山高月小,水落石出。 ∑ i² = n(n+1)(2n+1)/6"
)
"""What `verify` scores by default: prose, code, other scripts."""


# ---------------------------------------------------------------------------------------------------------- to-hf


def find_checkpoint(path: Path) -> Path:
    """A checkpoint, verified: `path` itself, or the newest one where it is a run or its checkpoints.

    Raises:
        CheckpointError: there is none, or it is damaged. An older one is only taken by its own name.
    """
    for directory in (path / CHECKPOINTS, path):
        newest, damaged = CheckpointDirectory(directory, keep=1).newest()
        if newest and damaged:
            raise CheckpointError(
                f"newer checkpoints are damaged: {'; '.join(damaged)}; the newest intact one is older, name it if you "
                f"want that: convert to-hf {newest} OUT"
            )
        if newest:
            return newest
        if directory.name == CHECKPOINTS and damaged:
            raise CheckpointError(f"{directory} has no intact checkpoint: {'; '.join(damaged)}; name another run")
    verify(path)
    return path


def to_folder(
    checkpoint: Path,
    out: Path,
    console: Console,
    *,
    dtype: str = "bf16",
    like: Path | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes a checkpoint as a complete Hugging Face folder. A conversion that was interrupted goes on where it was.

    Args:
        like: the folder whose config.json, generation config and tokenizer it gets; by default what the run used.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete, or the folder cannot be written.
        ConfigError: `out` exists already.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name another folder, or remove it")
    checkpoint = find_checkpoint(checkpoint)
    about = read_about(checkpoint)
    saved = saved_sections(checkpoint, about)
    shape = shape_of(saved["model"])
    files = files_beside(saved, shape, like)
    weights = CheckpointWeights(files_of(checkpoint, about), shape, family_of(shape).rules, EXPORTED[dtype])
    export = ResumableExport(out, source_of(checkpoint), file_bytes=file_bytes)
    export.begin(weights.stored)
    total = sum(stored.num_bytes for stored in weights.stored.values())
    if export.kept:
        console.say(f"{len(export.kept):,} of {len(weights.stored):,} tensors were written before")
    with console.progress(total, f"{checkpoint.name} -> {out}") as advance:
        weights.write(export, advance)
    export.commit(files.content(EXPORTED[dtype]), files.copied)
    parameters = count_parameters(shape).total
    console.say(f"{out}: {checkpoint.name}, {parameters:,} parameters in {dtype}, {memory_size(total / (1 << 30))}")


def shape_of(saved: dict[str, Any]) -> ModelShape:
    """The shape of the model of section `model` of a checkpoint's settings. A setting that is newer than the checkpoint
    has its default."""
    known = {name: value for name, value in saved.items() if f"model.{name}" in SETTINGS}
    return ModelConfig(**{f.name: known[f.name] for f in fields(ModelConfig) if f.name in known}).shape


def files_beside(saved: dict[str, Any], shape: ModelShape, like: Path | None) -> FolderFiles:
    """What the folder holds besides weights.

    Raises:
        CheckpointError: the run's tokenizer, or the folder that it started from, is no longer where it was.
    """
    if like:
        return FolderFiles.like(like)
    spec, hf = saved["data"]["tokenizer"], saved["model"].get("hf")
    try:
        return folder_files(shape, load_tokenizer(spec), spec, hf)
    except (DataError, CheckpointError) as error:
        raise CheckpointError(
            f"what the run used is not here any more: {error}; name a folder with config.json and tokenizer by --like, "
            "or call this from the folder where the run was started"
        ) from error


# -------------------------------------------------------------------------------------------------------- inspect


def inspect_folder(path: Path, console: Console) -> bool:
    """Prints what a folder holds, and what becomes of it; whether that is a whole model.

    Raises:
        ConfigError, CheckpointError: it is not a folder of a family that is implemented.
    """
    settings = folder_settings(path)
    shape = ModelShape(**settings)
    found = inspect(HuggingFaceFolder(path), shape)
    active = count_parameters(shape).active(shape.experts_per_token)
    sizes = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "family")
    say = partial(say_wrapped, console)
    say(f"family {shape.family}: {sizes}")
    say(f"parameters: {found.expected:,}, of which a token passes through {active:,}")
    for row in found.rows:
        for line in lines_of(row):
            console.say(line)
    for line in (*found.notes, *found.problems):
        say(line)
    if found.whole:
        console.say("this is a whole model, by its headers; its numbers were not read")
    else:
        usable = f"{found.parameters:,} of {found.expected:,} parameters can be used"
        console.say(f"not a whole model: {len(found.problems):,} problems; {usable}")
    return found.whole


WIDTH = 80
"""Columns of a terminal that everything of `inspect` fits in. A name is never broken, so it can be copied."""


def say_wrapped(console: Console, text: str) -> None:
    for line in wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False):
        console.say(line)


def lines_of(row: Row) -> Iterator[str]:
    """What of the folder becomes what here."""
    formats = ", ".join(row.formats)
    for name, size in zip(row.rule.theirs, row.theirs, strict=True):
        about = f"{list(size)} {formats}"
        if len(name) + len(about) < WIDTH:
            yield f"{name} {about}"
        else:
            yield from (name, f"  {about}")
    operation = type(row.rule.op).__name__
    yield f" -> {row.rule.ours}"
    yield f"    by {operation}, {row.found:,} of {row.expected:,}"


# --------------------------------------------------------------------------------------------------------- verify


class Verdict(NamedTuple):
    """Log-probs here and by transformers, of every token but the first."""

    tokens: list[int]
    ours: list[float]
    theirs: list[float]

    @property
    def worst(self) -> int:
        """The token with the largest difference, numbered like `ours`."""
        return max(range(len(self.ours)), key=lambda i: abs(self.ours[i] - self.theirs[i]))

    @property
    def difference(self) -> float:
        return abs(self.ours[self.worst] - self.theirs[self.worst])


def verify_folder(path: Path, text: str, console: Console) -> Verdict:
    """Scores a text here and by transformers, both in float32 on the CPU, on one process.

    Raises:
        ConfigError, CheckpointError, DataError: the folder cannot be used, or transformers is missing.
    """
    config = load_config(None, [f"model.hf={path}", "precision.device=cpu", "precision.dtype=fp32"])
    tokenizer = load_tokenizer(str(path))
    tokens = tokenizer.encode_prompt(text)[: config.model.max_sequence_length]
    if len(tokens) < 2:
        raise DataError(f"the text {text[:60]!r} has {plural(len(tokens), 'token')}; a comparison needs at least 2")
    longest = max(len(tokens), config.model.max_sequence_length)
    config = load_config(
        None,
        [
            *(f"model.hf={path}", "precision.device=cpu", "precision.dtype=fp32", "rollout.max_new_tokens=1"),
            f"train.tokens_per_micro_batch={longest}",
        ],
    )
    theirs = transformers_log_probs(path, tokens)
    device = device_of(config)
    with open_scorer(settle_model(config, 1), device, console) as scorer:
        [ours] = scorer.log_probs([Response(str(path), {}, tokens, 1)])
    verdict = Verdict(tokens, ours, theirs)
    here = tokenizer.decode([tokens[verdict.worst + 1]])
    console.say(
        f"{plural(len(ours), 'token')}: the worst difference of a log-prob is {verdict.difference:.1e}, at token "
        f"{verdict.worst + 1} ({here!r}: {ours[verdict.worst]:.5f} here, {theirs[verdict.worst]:.5f} by transformers)"
    )
    return verdict
