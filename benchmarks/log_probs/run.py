"""Log-probs of given tokens, forward and backward: this project compared with other frameworks in one run.

    run="python -m benchmarks.log_probs.run"
    $run --output benchmarks/results/log_probs_cpu.json --markdown docs/benchmarks.md
    $run --from benchmarks/results/log_probs_*.json --markdown docs/benchmarks.md    # measures nothing
    $run --scaling --output benchmarks/results/log_probs_scaling.json                # and a plot next to it

The other frameworks can be installed outside the environment, so that their dependencies cannot clash with it:

    pip install --no-deps --target peers verl liger-kernel triton && export PYTHONPATH=$PWD/peers

(Transformer Engine needs a GPU, and Liger's Hopper kernels `nvidia-cutlass-dsl`.) What cannot run has a row that says
why, never a number; so does a method whose log-probs or gradients are wrong when compared with float64 on a small shape
just before it is timed.

What is measured, for N rows, hidden size H and vocabulary V, split over t tensor- and sequence-parallel ranks:

time        of forward + backward, median. The methods take turns, so that other load affects all; a ratio to Megatron-
            Core's native path is taken within each turn, and the median of those is given.
memory      peak of forward + backward above what is in use before: resident in a fresh process for each method on the
            CPU, allocated by torch on an accelerator. Hidden states, weight and its fp32 main_grad are inputs of all.
collectives calls and bytes of a forward and of a backward on one rank, as they reach torch's process group (a
            TorchDispatchMode sees them, whatever function they come from). Bytes are those of the whole tensor: what
            an all-gather returns, what a reduce-scatter or an all-reduce is given. Ranks that share cores show
            collectives, not speed.
error       of the mean log-ratio of a response of 1,000 tokens under a small update of the weight, against float64 on
            the same inputs; the largest over --responses. Targets have probabilities of 0.5 to 1 and logits near 20.

Gradients end in main_grad for all: this project's are added there as they are made, those of a method that returns
`.grad` are added afterwards, as Megatron's backward hook does. Rows lie in 32 sequences, each with one constant
gradient for its response, as GSPO has them. With --response-share below 1 a part of each sequence is a prompt; with
--dead above 0 a part of the sequences has gradient 0. The others are given all rows, as in their frameworks, so their
work is the same whatever these shares are: only Megatron-Core's native path is measured again for them. On the CPU
torch.compile is off, as in every run of this project there; with it Megatron-Core's fused path was 7 % faster in a
trial.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.log_probs.measures import TIMEOUT_S, Case, measure_errors, measure_memory, measure_times
from benchmarks.log_probs.methods import METHODS, REFERENCE
from benchmarks.log_probs.tables import plot, tables
from benchmarks.reports import machine, median_ratio, versions, write_between_marks
from gspo_megatron.device import Device, open_device
from gspo_megatron.testing.local_ranks import run_distributed

CPU_SHAPES = ((2048, 512, 151_936),)
ACCELERATOR_SHAPES = ((32_768, 2048, 151_936), (32_768, 4096, 151_936))
QUICK_SHAPES = ((256, 64, 8192),)
PACKAGES = ("torch", "megatron-core", "triton", "verl", "liger-kernel", "transformer-engine")
HOW: dict[str, Any] = {"like_torchrun": True, "timeout_s": TIMEOUT_S}


def run_case(case: Case, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measures a case; returns what is written to JSON, by method."""
    turns = options.repeats if case.ranks == 1 else 1
    by_rank = run_distributed(measure_times, case.ranks, case, names, turns, fresh=case.device != "cpu", **HOW)
    results: dict[str, dict[str, Any]] = by_rank[0]
    able = [name for name in names if results[name]["status"] == "ok"]
    for name in able:
        # A step is done when the last rank is.
        seconds = [max(turn) for turn in zip(*(ranks[name]["seconds"] for ranks in by_rank), strict=True)]
        results[name] |= {"seconds": seconds, "seconds_median": statistics.median(seconds)}
        if case.ranks == 1 and case.device == "cpu":
            results[name]["peak_extra_mib"] = run_distributed(measure_memory, 1, case, name, **HOW)[0]
    if case.ranks == 1 and case.every_row_counts and options.responses and not options.scaling:
        for dtype in sorted({case.dtype, "bf16"}, reverse=True):
            rounded = replace(case, dtype=dtype)
            errors = run_distributed(
                measure_errors, 1, rounded, able, options.responses, fresh=case.device != "cpu", **HOW
            )[0]
            for name, error in errors.items():
                results[name].setdefault("mean_log_ratio_error", {})[dtype] = error
    if REFERENCE in able:
        add_ratios([results[name] for name in able], results[REFERENCE])
    return {"case": asdict(case), "methods": results}


def add_ratios(results: Sequence[dict[str, Any]], reference: dict[str, Any]) -> None:
    for result in results:
        result["time_ratio"] = median_ratio(result["seconds"], reference["seconds"])
        if "peak_extra_mib" in result:
            result["memory_ratio"] = result["peak_extra_mib"] / reference["peak_extra_mib"]


def cases(options: argparse.Namespace, device: Device) -> list[tuple[Case, list[str]]]:
    """The cases with their methods: all methods where every row counts, else ours and the reference."""
    own = CPU_SHAPES if device.on_cpu else ACCELERATOR_SHAPES
    shapes = options.shapes or (QUICK_SHAPES if options.quick else own)
    setting = {"device": device.torch_device.type, "dtype": options.dtype, "threads": options.threads}
    whole = [Case(rows, hidden, vocab, **setting) for rows, hidden, vocab in shapes]
    if options.scaling:
        # Tokens at one vocabulary, then vocabularies at one number of tokens.
        by_tokens = [replace(whole[0], rows=whole[0].rows * part // 4) for part in (1, 2, 3, 4, 6, 8)]
        found = by_tokens + [replace(whole[0], vocab=whole[0].vocab // part) for part in (8, 4, 2)]
        return [(case, [REFERENCE, "ours, recompute"]) for case in found]
    ranks = options.tp or ((1, 2, 4) if device.on_cpu else (1,))
    found = [
        replace(case, ranks=tp, response_share=share, dead_share=dead)
        for case, tp, share, dead in itertools.product(whole, ranks, options.response_share, options.dead)
    ]
    return [(case, chosen_methods(case)) for case in found]


def chosen_methods(case: Case) -> list[str]:
    """The methods that the case affects. Several ranks show collectives, which do not depend on what is kept."""
    if case.ranks == 1:
        return [name for name, x in METHODS.items() if x.is_ours or name == REFERENCE or case.every_row_counts]
    return [REFERENCE, "ours, recompute", "Megatron-Core, fused"] if case.every_row_counts else ["ours, recompute"]


def measure(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures all cases; returns what is written to JSON."""
    device = open_device(options.device, options.dtype or "fp32")
    if options.dtype is None:
        options.dtype = "fp32" if device.on_cpu else "bf16"
        device = open_device(options.device, options.dtype)
    # What is imported before the first rank starts need not be imported by each of them.
    importlib.import_module("megatron.core.tensor_parallel.layers")
    chosen = cases(options, device)
    for case, _ in chosen:
        case.check()
    measured = []
    for case, names in chosen:
        measured.append(run_case(case, names, options))
        times = [f"{name} {x['time_ratio']:.2f}" for name, x in measured[-1]["methods"].items() if "time_ratio" in x]
        print(f"{len(measured)} of {len(chosen)}: time / native: {', '.join(times)}", file=sys.stderr, flush=True)
    head = {"machine": machine(device, options.threads), "versions": versions(PACKAGES), "command": command}
    return {**head, "scaling" if options.scaling else "cases": measured}


def shape_of(text: str) -> tuple[int, int, int]:
    rows, hidden, vocab = map(int, text.split(","))
    return rows, hidden, vocab


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="N,H,V", help="rows, hidden size, vocabulary")
    parser.add_argument("--quick", action="store_true", help="a small shape; its times mean nothing")
    parser.add_argument("--tp", type=int, nargs="+", help="ranks that share the vocabulary (default on the CPU: 1 2 4)")
    parser.add_argument("--response-share", type=float, nargs="+", default=[1.0, 0.5, 0.2])
    parser.add_argument("--dead", type=float, nargs="+", default=[0.0, 0.3], help="share of sequences without gradient")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32 on the CPU, else bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="turns of every method")
    parser.add_argument("--responses", type=int, default=2, help="responses whose mean log-ratio is compared; 0: none")
    parser.add_argument("--scaling", action="store_true", help="time and memory over tokens and vocabulary instead")
    parser.add_argument("--output", type=Path, help="JSON file for the results; --scaling draws its plot next to it")
    parser.add_argument("--from", dest="results", type=Path, nargs="+", help="measure nothing; show these results")
    parser.add_argument("--markdown", type=Path, help="file whose text between the log-probs marks is replaced")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.results:
        results = [json.loads(path.read_text()) for path in options.results]
    else:
        results = [measure(options, shlex.join(["python", "-m", "benchmarks.log_probs.run", *argv]))]
        if options.output:
            options.output.write_text(json.dumps(results[0], indent=1) + "\n")
            if options.scaling:
                plot(results[0]["scaling"], options.output.with_suffix(".png"))
    text = tables(results)
    print(text)
    if options.markdown:
        write_between_marks(options.markdown, "log-probs", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
