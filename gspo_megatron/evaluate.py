"""Evaluates a model: `torchrun ... -m gspo_megatron.evaluate --config FILE [--checkpoint C | --hf FOLDER]`.

Samples responses to held-out sets, data.eval and those of eval.sets, and writes into a folder SET.jsonl, every response
with its reward, and table.json and table.md: accuracy, pass@k, maj@k and more, with confidence intervals. Any layout,
and one process without torchrun. Everything is checked before the model is built. Exit status: 0 done; 1 the processes
did not meet, or an error in the code; 2 settings, data or a checkpoint cannot work.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.command import KNOWN_ERRORS, Parser, report, reported
from gspo_megatron.build.evaluating import open_evaluator
from gspo_megatron.build.inputs import settle_evaluation
from gspo_megatron.build.scoring import check_weights
from gspo_megatron.build.trainer import device_of
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.stop import QUIT

EXAMPLE = """example, the best checkpoint of a run on another set, 8 responses to each prompt:
  python -m gspo_megatron.evaluate --config runs/demo/config.yaml --checkpoint best --sets mine \\
    'eval.sets.mine={source: test.jsonl, n: 8, k: [1, 8]}'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    # Megatron-Core warns about every missing optional package.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        options = parsed(argv)
        config = load_config(options.config, overrides_of(options), hf=options.hf)
        check_weights(config, "responses")
        folder = output_of(options, config)
        device = device_of(config)
        console = Console(on=device.rank == 0)
        inputs = settle_evaluation(config, device.world_size, options.sets)
        for warning in (*device.warnings, *inputs.warnings):
            console.warn(warning)
        with open_evaluator(inputs, device, console) as evaluator:
            evaluator.write(folder or Path(config.run.dir) / "eval" / evaluator.weights.name)
        return 0
    except KNOWN_ERRORS as error:
        return reported(error)
    except KeyboardInterrupt:
        report("interrupted; the table was not written")
        return QUIT


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="gspo_megatron.evaluate",
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file of the run, such as RUN/config.yaml")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="C", help="latest, best, or a path (default: checkpoint.load)")
    weights.add_argument("--hf", metavar="FOLDER", help="a Hugging Face folder instead, with a model of any size")
    parser.add_argument("--sets", nargs="+", metavar="NAME", default=[], help="some of the sets (default: all)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the results (default: RUN/eval/ and the weights' name)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    options = parser.parse_intermixed_args(argv)
    # --sets takes every word after it; a name has no equals sign.
    options.overrides += [word for word in options.sets if "=" in word]
    options.sets = [word for word in options.sets if "=" not in word]
    return options


def overrides_of(options: argparse.Namespace) -> list[str]:
    """Those of the command line, and what --checkpoint or --hf stand for."""
    own = list(options.overrides)
    if options.checkpoint is not None:
        own.append(f"checkpoint.load={options.checkpoint}")
    if options.hf is not None:
        own.append("checkpoint.load=none")
        # The tokenizer of the folder, unless the user names another.
        if (Path(options.hf) / "tokenizer.json").is_file() and not any(o.startswith("data.tokenizer=") for o in own):
            own.append("data.tokenizer=auto")
    return own


def output_of(options: argparse.Namespace, config: Config) -> Path | None:
    """The folder that --output names.

    Raises:
        ConfigError: nothing can be written there, or into the run directory without it.
    """
    asked: Path | None = options.output
    folder = asked or Path(config.run.dir) / "eval"
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        key = f"--output {asked}" if asked else f"{folder}, where results go without --output,"
        raise ConfigError(f"{key} cannot be written: {place} is not a writable folder; name another with --output")
    return asked


if __name__ == "__main__":
    sys.exit(main())
