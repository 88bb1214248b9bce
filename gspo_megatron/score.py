"""Scores responses: `torchrun ... -m gspo_megatron.score --config FILE --input IN.jsonl --output OUT.jsonl`.

A line of IN.jsonl is {"tokens": [...], "prompt_length": k} or {"prompt": "...", "response": "..."}; OUT.jsonl has the
same objects in the same order, each with "log_probs": [...], the natural logarithm of the probability of each response
token under the model of the settings, softmax(z / rollout.temperature). Any layout, and one process without torchrun.
Every line is checked before the model is built, and OUT.jsonl appears when it is complete. Exit status: 0 done; 1 the
processes did not meet, or an error in the code; 2 settings, a line or a checkpoint cannot work.
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
from gspo_megatron.build.inputs import settle_model
from gspo_megatron.build.scoring import check_weights, longest_response, open_scorer
from gspo_megatron.build.trainer import device_of
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.responses import read_responses
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.stop import QUIT

EXAMPLE = """example, with the newest checkpoint of a run:
  torchrun --nproc_per_node 2 -m gspo_megatron.score --config runs/demo/config.yaml checkpoint.load=latest \\
    --input in.jsonl --output out.jsonl
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    # Megatron-Core warns about every missing optional package.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        options = parsed(argv)
        config = load_config(options.config, options.overrides)
        check_weights(config)
        check_output(options.input, options.output)
        device = device_of(config)
        console = Console(on=device.rank == 0)
        inputs = settle_model(config, device.world_size)
        config = inputs.config
        for warning in device.warnings:
            console.warn(warning)
        if config.rollout.temperature != 1:
            console.warn(f"log-probs are of softmax(z / T) with rollout.temperature={config.rollout.temperature}")
        assert config.model.vocab_size is not None, "settle_model sets model.vocab_size"
        limits = {"vocab_size": config.model.vocab_size, "max_tokens": longest_response(config)}
        # Read twice: once to refuse bad lines before anything is computed, once to score them piece by piece.
        total = sum(1 for _ in read_responses(options.input, inputs.tokenizer, **limits))
        with open_scorer(inputs, device, console) as scorer:
            scorer.write(read_responses(options.input, inputs.tokenizer, **limits), options.output, total)
        return 0
    except KNOWN_ERRORS as error:
        return reported(error)
    except KeyboardInterrupt:
        report("interrupted; nothing was written")
        return QUIT


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="gspo_megatron.score",
        description=__doc__.split("\n\n")[0],
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file of the run, such as RUN/config.yaml")
    parser.add_argument("--input", required=True, type=Path, help="JSONL file of responses")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write; an older one is replaced")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    return parser.parse_intermixed_args(argv)


def check_output(source: Path, output: Path) -> None:
    """Raises:
    ConfigError: the output cannot be written, or is the input.
    """
    if output.exists() and source.exists() and output.samefile(source):
        raise ConfigError(f"--output {output} is the input; name another file")
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ConfigError(f"--output {output} cannot be written; name a file in a folder that exists and is writable")


if __name__ == "__main__":
    sys.exit(main())
