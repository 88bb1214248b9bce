"""Hugging Face folders: `python -m gspo_megatron.convert to-hf CHECKPOINT OUT | inspect FOLDER | verify FOLDER`.

to-hf writes a run's checkpoint, saved on any layout, as a complete folder; inspect shows what a folder's tensors
become, and what is missing or extra; verify compares log-probs of a text with transformers. One process, no GPU. Exit
status: 0 done; 1 inspect or verify found something wrong; 2 files cannot be used.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from gspo_megatron.base.errors import DataError
from gspo_megatron.build.command import KNOWN_ERRORS, Parser, report, reported
from gspo_megatron.build.convert import TEXT, inspect_folder, to_folder, verify_folder
from gspo_megatron.checkpoint.export import EXPORTED
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.stop import FAILED, QUIT

TOLERANCE = 1e-3
"""Largest difference that `verify` accepts; float32 alone makes 1e-5 to 1e-4 of it in a large model."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    console = Console()
    try:
        options = parsed(argv)
        if options.what == "to-hf":
            size = int(options.max_file_gb * 1e9)
            to_folder(options.checkpoint, options.out, console, dtype=options.dtype, like=options.like, file_bytes=size)
            return 0
        if options.what == "inspect":
            return 0 if inspect_folder(options.folder, console) else FAILED
        verdict = verify_folder(options.folder, text_of(options.text), console)
        return 0 if verdict.difference <= options.tolerance else FAILED
    except KNOWN_ERRORS as error:
        return reported(error)
    except KeyboardInterrupt:
        report("interrupted; the same command goes on")
        return QUIT


def file_size(text: str) -> float:
    """A size in GB."""
    size = float(text)
    if not 0 < size < math.inf:
        raise ValueError
    return size


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="gspo_megatron.convert", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    to_hf = commands.add_parser("to-hf", help="a run's checkpoint to a Hugging Face folder")
    to_hf.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step_000010, or RUN for its newest one")
    to_hf.add_argument("out", type=Path, help="the folder to write")
    to_hf.add_argument("--dtype", choices=tuple(EXPORTED), default="bf16", help="number format of the weights")
    to_hf.add_argument("--like", type=Path, help="folder whose config.json and tokenizer it gets; default: the run's")
    to_hf.add_argument("--max-file-gb", type=file_size, default=5.0, help="largest safetensors file (default: 5)")
    look = commands.add_parser("inspect", help="what a folder holds and becomes")
    check = commands.add_parser("verify", help="log-probs of a text, here and by transformers")
    for each in (look, check):
        each.add_argument("folder", type=Path, help="Hugging Face folder")
    check.add_argument("--text", type=Path, help="text file to score; default: a paragraph of prose, code and scripts")
    check.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"largest difference (default: {TOLERANCE})")
    return parser.parse_args(argv)


def text_of(file: Path | None) -> str:
    """
    Raises:
        DataError: the file cannot be read.
    """
    try:
        return TEXT if file is None else file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"--text {file} cannot be read ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
