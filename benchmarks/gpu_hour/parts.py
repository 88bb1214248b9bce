"""The parts of `make gpu-hour`, in the order in which they run: what each starts, what it needs, what its numbers mean.

A part is a command in a process of its own, with its own time limit. It leaves a JSON file; `values` picks from that
file the numbers that docs/status.md shows, each beside its target.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
UPDATE = Path(__file__).parent / "qwen3_30b_4_layers.yaml"
SMALLER = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.head_dim=8",
    "model.num_experts=8",
    "model.experts_per_token=2",
    "model.expert_ffn_size=16",
    "model.vocab_size=99",
    "model.max_sequence_length=64",
    "precision.device=cpu",
    "data.task={min_length: 5, max_length: 12}",
    "rollout.max_new_tokens=16",
    "rollout.prompts_per_step=4",
    "train.tokens_per_micro_batch=64",
)
"""Makes a rehearsal of UPDATE."""

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """value `sign` bound, as in "ratio_to_plain >= 0.97"."""

    sign: str
    bound: float

    def met(self, value: float) -> bool:
        return value >= self.bound if self.sign == ">=" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Shown:
    """A number of docs/status.md: its key among the values of a part, its name, and its target, if it has one."""

    key: str
    name: str
    target: Target | None = None
    form: str = ".3g"


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        about: what it shows, in one line.
        minutes: its time limit on a GPU.
        command: of (file for the result, whether this is a rehearsal on the CPU), what to run.
        shown: the numbers that docs/status.md shows.
        values: of (the result file), those numbers by key, and whatever else is worth keeping.
        gpus: how many it needs.
        needs_te: it compares Transformer Engine with something, so it is skipped where that is missing.
        fp8: the value of precision.fp8 that it needs.
    """

    name: str
    about: str
    minutes: float
    command: Callable[[Path, bool], list[str]]
    shown: tuple[Shown, ...]
    values: Callable[[Path], Values]
    gpus: int = 1
    needs_te: bool = False
    fp8: str = "none"


def _module(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", *arguments]


# --- commands ---


def _measure(name: str, *arguments: str, output: Path, rehearse: bool) -> list[str]:
    rehearsal = ["--rehearse"] if rehearse else []
    return _module("benchmarks.gpu_hour.measure", name, "--output", str(output), *arguments, *rehearsal)


def measured(name: str, *arguments: str) -> Callable[[Path, bool], list[str]]:
    return lambda output, rehearse: _measure(name, *arguments, output=output, rehearse=rehearse)


def _kernel_tests(output: Path, rehearse: bool) -> list[str]:
    # Without a GPU the tests are collected: their files import, their marks and parameters are right.
    how = ["--collect-only"] if rehearse else []
    return _module(
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        f"--junitxml={output}",
        *how,
        "tests/log_probs",
        "tests/device",
    )


def _runs(output: Path, rehearse: bool) -> list[str]:
    return _module("benchmarks.gpu_hour.runs", "--output", str(output), *(["--rehearse"] if rehearse else []))


def _context_parallel(output: Path, rehearse: bool) -> list[str]:
    where = [] if rehearse else ["precision.device=cuda", "precision.dtype=bf16"]
    tool = [sys.executable, "-W", "ignore", "tools/check_layout.py", "--config", "examples/cpu_tiny_moe.yaml"]
    small = ["rollout.prompts_per_step=4", "rollout.group_size=2"] if rehearse else []
    return [*tool, "--layout", "cp=2", *where, *small]


def _log_prob_benchmark(output: Path, rehearse: bool) -> list[str]:
    shape = ["--quick", "--device", "cpu", "--tp", "1"] if rehearse else ["--shapes", "32768,2048,151936", "--tp", "1"]
    every_row = ["--response-share", "1.0", "--dead", "0.0", "--responses", "0", "--repeats", "1" if rehearse else "5"]
    return _module("benchmarks.log_probs.run", *shape, *every_row, "--output", str(output))


def update_of(fp8: str) -> Callable[[Path, bool], list[str]]:
    def command(output: Path, rehearse: bool) -> list[str]:
        steps = ["--steps", "1", "--warmup", "1"] if rehearse else ["--steps", "8", "--warmup", "2"]
        # FP8 needs a GPU; the command is otherwise the same.
        settings = SMALLER if rehearse else (f"precision.fp8={fp8}",)
        step = _module("benchmarks.step", "--config", str(UPDATE.relative_to(ROOT)), "--against", "pretraining", *steps)
        return [*step, "--output", str(output), *settings]

    return command


# --- what they found ---


def values_of_json(output: Path) -> Values:
    return dict(json.loads(output.read_text())["values"])


def values_of_tests(output: Path) -> Values:
    if not output.exists():  # collected only
        return {"failed": 0, "passed": 0}
    (suite,) = ET.parse(output).getroot().iter("testsuite")
    number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return {"failed": failed, "passed": number["tests"] - failed - number["skipped"], "skipped": number["skipped"]}


def values_of_layout(output: Path) -> Values:
    """check_layout says it with its exit status: where that is not 0, the part has failed."""
    return {"equal": 1}


def values_of_log_probs(output: Path) -> Values:
    result = json.loads(output.read_text())
    methods = result["cases"][0]["methods"]
    ours = {"recompute_ms": "ours, recompute", "stored_ms": "ours, all kept", "native_ms": "Megatron-Core, native"}
    return {
        key: 1e3 * methods[name]["seconds_median"] for key, name in ours.items() if "seconds_median" in methods[name]
    }


def values_of_update(output: Path) -> Values:
    result = json.loads(output.read_text())
    per_second = {work: result["tokens"][work] / seconds for work, seconds in result["seconds"].items()}
    return {
        "ratio_to_plain": 1 / result["ratio"],
        "ratio_to_plain_every_token": 1 / result["ratio_every_token"],
        "tokens_per_second": per_second["update"],
        "plain_tokens_per_second": per_second["pretraining"],
        "peak_memory_gib": result.get("peak_memory_gib"),
        "layers": result.get("layers"),
    }


# --- the table ---

AT_ONCE = Target("<=", 0)
RATIO_NOISE = Shown("ratio_noise", "largest abs(ratio - 1) of a first update", Target("<=", 1e-6), ".1e")


def fp8_parts(fp8: str, minutes: float) -> tuple[Part, ...]:
    shown = (
        Shown("gradient_cosine", "cosine of its gradient with bf16's", Target(">=", 0.95), ".4f"),
        Shown("log_prob_error", "root mean square of its log-probs minus bf16's", None, ".1e"),
        RATIO_NOISE,
    )
    about = f"FP8 {fp8} against bf16: log-probs, gradient, and the ratio of a first update"
    command = measured("fp8", "--fp8", fp8)
    return (Part(f"fp8_{fp8}", about, minutes, command, shown, values_of_json, needs_te=True, fp8=fp8),)


def empty_expert(fp8: str) -> Part:
    name = "empty_expert" if fp8 == "none" else f"empty_expert_{fp8}"
    shown = (Shown("gradient_cosine", "cosine of its gradient with the local layers'", Target(">=", 0.95), ".4f"),)
    about = f"experts without a token ({'bf16' if fp8 == 'none' else f'FP8 {fp8}'}): one sequence of 3 tokens"
    command = measured("empty_expert", "--fp8", fp8)
    return Part(name, about, 0.75, command, shown, values_of_json, needs_te=True, fp8=fp8)


def decode(fp8: str) -> Part:
    name = "decode" if fp8 == "none" else f"decode_{fp8}"
    about = f"decoding with the training model ({'bf16' if fp8 == 'none' else f'FP8 {fp8}'}), 2 layers of 30B, 256 rows"
    shown = (Shown("tokens_per_second", "tokens/s", None, ",.0f"),)
    return Part(name, about, 1.5, measured("decode", "--fp8", fp8), shown, values_of_json, fp8=fp8)


PARTS: tuple[Part, ...] = (
    Part(
        "kernels",
        "the tests marked gpu of the log-prob kernels and the device, with this machine's Triton",
        2.5,
        _kernel_tests,
        (
            Shown("failed", "tests that failed", AT_ONCE, "d"),
            Shown("passed", "tests that passed", Target(">=", 1), "d"),
        ),
        values_of_tests,
    ),
    Part(
        "te_against_local",
        "Transformer Engine's layers against Megatron's local ones in bf16: same weights, both against fp32",
        1,
        measured("te_against_local"),
        (
            Shown("log_prob_error_ratio", "its log-prob error / that of the local layers", Target("<=", 2), ".2f"),
            Shown("gradient_error_ratio", "its gradient error / that of the local layers", Target("<=", 2), ".2f"),
        ),
        values_of_json,
        needs_te=True,
    ),
    Part(
        "same_forward_twice",
        "the same forward and backward twice: are they equal to the last bit?",
        1,
        measured("same_forward_twice"),
        (
            Shown("log_probs_that_differ", "log-probs that differ", AT_ONCE, "d"),
            Shown("gradients_that_differ", "gradients that differ", None, "d"),
        ),
        values_of_json,
    ),
    Part(
        "same_forward_twice_deterministic",
        "the same with precision.deterministic=true",
        1,
        measured("same_forward_twice", "--deterministic"),
        (
            Shown("log_probs_that_differ", "log-probs that differ", AT_ONCE, "d"),
            Shown("gradients_that_differ", "gradients that differ", AT_ONCE, "d"),
        ),
        values_of_json,
    ),
    Part(
        "first_ratio",
        "old log-probs, then the first update, in bf16",
        1,
        measured("first_ratio"),
        (RATIO_NOISE,),
        values_of_json,
    ),
    Part(
        "context_parallel",
        "cp=2 against one process, by tools/check_layout.py",
        2,
        _context_parallel,
        (Shown("equal", "loss and gradients equal (1) within bf16's rounding", Target(">=", 1), "d"),),
        values_of_layout,
        gpus=2,
    ),
    Part(
        "runs",
        "the demo in float32 on the CPU and the GPU; in bf16, continued from a checkpoint",
        3,
        _runs,
        (
            Shown("responses", "responses of the first step, float32", None, "d"),
            Shown("responses_that_differ", "of these, other than on the CPU", None, "d"),
            Shown("steps_that_differ", "steps after a resume that differ", AT_ONCE, "d"),
        ),
        values_of_json,
    ),
    *fp8_parts("blockwise", 1.5),
    *fp8_parts("tensorwise", 1.5),
    empty_expert("none"),
    empty_expert("blockwise"),
    empty_expert("tensorwise"),
    decode("none"),
    decode("blockwise"),
    Part(
        "log_probs",
        "log-probs forward + backward at (32768, 2048, 151936) in bf16",
        2.5,
        _log_prob_benchmark,
        (
            Shown("recompute_ms", "recompute, ms", Target("<=", 120), ".1f"),
            Shown("stored_ms", "stored, ms", Target("<=", 92), ".1f"),
            Shown("native_ms", "Megatron-Core's native path, ms", None, ".1f"),
        ),
        values_of_log_probs,
    ),
    Part(
        "update",
        "an update of Qwen3-30B-A3B reduced to 4 layers, bf16, against plain Megatron-Core on the same tokens",
        3.5,
        update_of("none"),
        (
            Shown("ratio_to_plain", "tokens/s, update / plain Megatron-Core", Target(">=", 0.97), ".3f"),
            Shown("tokens_per_second", "tokens/s", None, ",.0f"),
            Shown("peak_memory_gib", "peak memory, GiB", None, ".1f"),
        ),
        values_of_update,
    ),
    Part(
        "update_blockwise",
        "the same in FP8 blockwise",
        3.5,
        update_of("blockwise"),
        (
            Shown("ratio_to_bf16", "tokens/s, FP8 / bf16", Target(">=", 1.15), ".3f"),
            Shown("ratio_to_plain", "tokens/s, update / plain Megatron-Core in FP8", None, ".3f"),
            Shown("tokens_per_second", "tokens/s", None, ",.0f"),
        ),
        values_of_update,
        needs_te=True,
        fp8="blockwise",
    ),
)
"""In the order in which a wrong result makes the later ones meaningless. Those of one GPU take 28 minutes at most."""

BY_NAME = {part.name: part for part in PARTS}


def derived(values: Mapping[str, Values]) -> dict[str, dict[str, Any]]:
    """The values with those that compare two parts."""
    found = {name: dict(of) for name, of in values.items()}
    if {"update", "update_blockwise"} <= found.keys():
        bf16, fp8 = (float(found[name]["tokens_per_second"]) for name in ("update", "update_blockwise"))
        found["update_blockwise"]["ratio_to_bf16"] = fp8 / bf16
    return found


def chosen(names: Sequence[str] | None) -> list[Part]:
    return [part for part in PARTS if not names or part.name in names]
