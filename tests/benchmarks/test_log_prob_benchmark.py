"""benchmarks/log_probs: it measures what it claims, and reports no numbers for a method that is wrong or missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.log_probs.measures import (
    SEQUENCES,
    TOLERANCE,
    Case,
    deviations,
    measure_memory,
    measure_times,
    open_case,
)
from benchmarks.log_probs.methods import METHODS, REFERENCE, Inputs, LogProbs, Method, open_log_softmax
from benchmarks.log_probs.run import HOW, main
from benchmarks.log_probs.tables import linearity, tables
from gspo_megatron.base.batches import IGNORED
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.testing.local_ranks import run_distributed

TINY = Case(rows=64, hidden=16, vocab=96, device="cpu", dtype="fp32", threads=1)


def test_quick_run(tmp_path: Path) -> None:
    output, document = tmp_path / "quick.json", tmp_path / "doc.md"
    document.write_text("ahead\n<!-- log-probs -->\nold\n<!-- end of log-probs -->\nbehind\n")
    shares = ["--tp", "1", "2", "--response-share", "1", "0.5", "--dead", "0"]
    written = ["--output", str(output), "--markdown", str(document)]
    assert main(["--quick", "--device", "cpu", "--repeats", "2", "--responses", "1", *shares, *written]) == 0

    cases = {(x["case"]["ranks"], x["case"]["response_share"]): x for x in json.loads(output.read_text())["cases"]}
    assert list(cases) == [(1, 1.0), (1, 0.5), (2, 1.0), (2, 0.5)]
    methods = cases[1, 1.0]["methods"]
    assert list(methods) == list(METHODS)
    for name, found in methods.items():
        if found["status"] != "ok":
            assert list(found) == ["status"]
            continue
        assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0
        assert found["peak_extra_mib"] > 0 and found["time_ratio"] > 0
        errors = found["mean_log_ratio_error"]
        assert errors["fp32"] < 1e-6
        # Logits near 20 lie 0.125 apart in bf16.
        assert (errors["bf16"] < 1e-6) == METHODS[name].is_ours
    assert methods[REFERENCE]["time_ratio"] == methods[REFERENCE]["memory_ratio"] == 1
    # Logits are 8 MiB; ours hold a block of 2 MiB of them, and no gradient of the weight of 2 MiB.
    assert methods[REFERENCE]["peak_extra_mib"] > 8 > 4 > methods["ours, recompute"]["peak_extra_mib"]
    assert methods["Transformer Engine"]["status"] == "needs a GPU"

    text = document.read_text()
    assert text.startswith("ahead\n<!-- log-probs -->\n`python -m benchmarks.log_probs.run --quick")
    assert text.endswith("<!-- end of log-probs -->\nbehind\n")
    assert "| Transformer Engine | needs a GPU |" in text
    assert "| H200, (32768, 2048, 151936), bf16 | not yet measured |" in text
    hidden, per_row, stats = 4 * 256 * 64, 4 * 256, 4 * 2 * 2 * 256
    assert collectives(cases[2, 1.0], REFERENCE) == (
        {"allgather": 1, "allreduce": 3, "bytes": hidden + 3 * per_row},
        {"allgather": 1, "reduce_scatter": 1, "bytes": 2 * hidden},
    )
    for share in (1.0, 0.5):
        assert collectives(cases[2, share], "ours, recompute") == (
            {"allgather": 2, "bytes": share * (hidden + stats)},
            {"reduce_scatter": 1, "bytes": share * hidden},
        )


def collectives(case: Any, name: str) -> tuple[dict[str, int], dict[str, int]]:
    found = case["methods"][name]["collectives"]
    return found["forward"], found["backward"]


def deviations_of_all(case: Case) -> dict[str, dict[str, float] | str]:
    device, inputs = open_case(case)
    found: dict[str, dict[str, float] | str] = {}
    for name, method in METHODS.items():
        missing = method.missing(device.torch_device, case.ranks)
        found[name] = missing or deviations(inputs, method.open(inputs))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_method_is_right(ranks: int) -> None:
    """Values and gradients against float64, prompts and sequences without gradient among the rows."""
    case = Case(64, 16, 96, "cpu", "fp32", 1, ranks, response_share=0.5, dead_share=0.25)
    for found in run_distributed(deviations_of_all, ranks, case, **HOW):
        assert {REFERENCE, "ours, recompute"} <= {name for name, x in found.items() if not isinstance(x, str)}
        for name, x in found.items():
            if not isinstance(x, str):
                assert max(x.values()) < TOLERANCE[METHODS[name].gradients], (name, x)


# --- methods that are not what they say ---


def open_without_weight_gradient(inputs: Inputs) -> LogProbs:
    log_softmax = open_log_softmax(inputs)
    return lambda x: log_softmax(replace(x, weight_VpH=x.weight_VpH.detach()))


def open_slightly_off(inputs: Inputs) -> LogProbs:
    log_softmax = open_log_softmax(inputs)
    return lambda x: 1.001 * log_softmax(x)


def open_that_fails(inputs: Inputs) -> LogProbs:
    def log_probs(x: Inputs) -> Tensor:
        raise NotImplementedError("no such device\nand more")

    return log_probs


def open_for_its_inputs(inputs: Inputs) -> LogProbs:
    log_softmax = open_log_softmax(inputs)

    def log_probs(x: Inputs) -> Tensor:
        assert len(x.targets_N) == len(inputs.targets_N), "opened for another shape"
        return log_softmax(x)

    return log_probs


def open_with_50_mib(inputs: Inputs) -> LogProbs:
    log_softmax = open_log_softmax(inputs)

    def log_probs(x: Inputs) -> Tensor:
        torch.ones(50 * 2**18).mul_(2)
        return log_softmax(x)

    return log_probs


OTHERS = [
    Method("without weight gradient", open_without_weight_gradient),
    Method("slightly off", open_slightly_off),
    Method("fails", open_that_fails),
    Method("absent", open_log_softmax, packages=("no_such_package",)),
    Method("50 MiB", open_with_50_mib),
    Method("for its inputs", open_for_its_inputs),
]


def measure_others(case: Case) -> dict[str, dict[str, Any]]:
    METHODS.update({method.name: method for method in OTHERS})
    return measure_times(case, [method.name for method in OTHERS], 1)


def memory_of_50_mib(case: Case) -> float:
    METHODS.update({method.name: method for method in OTHERS})
    return measure_memory(case, "50 MiB")


def ours_that_fails(case: Case) -> None:
    METHODS["ours, recompute"] = Method("ours, recompute", open_that_fails, is_ours=True)
    measure_times(case, ["ours, recompute"], 1)


def test_what_is_wrong_or_absent_gets_no_number() -> None:
    # More rows than those of the trial.
    found = run_distributed(measure_others, 1, replace(TINY, rows=256), **HOW)[0]
    assert [found.pop(name)["status"] for name in ("50 MiB", "for its inputs")] == ["ok", "ok"]
    assert all(list(x) == ["status"] for x in found.values())
    assert "gradient of weight off by 1e+00" in found["without weight gradient"]["status"]
    assert found["slightly off"]["status"].startswith("wrong: log-probs off by 1e-03")
    assert found["fails"]["status"] == "NotImplementedError: no such device"
    assert found["absent"]["status"] == "not installed (no_such_package)"


def test_own_failures_are_raised() -> None:
    with pytest.raises(RuntimeError, match="no such device"):
        run_distributed(ours_that_fails, 1, TINY, **HOW)


def test_memory_is_that_of_the_step() -> None:
    assert run_distributed(memory_of_50_mib, 1, TINY, **HOW)[0] == pytest.approx(50, abs=2)


def rows_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    _, inputs = open_case(case)
    return inputs.targets_N, inputs.scored_targets_N, inputs.d_log_probs_N


def test_shares_of_rows() -> None:
    case = Case(320, 8, 64, "cpu", "fp32", 1, response_share=0.3, dead_share=0.25)
    targets_N, scored_N, gradient_N = run_distributed(rows_of, 1, case, **HOW)[0]
    is_scored_SL = (scored_N != IGNORED).view(SEQUENCES, -1)
    assert is_scored_SL.tolist() == [[False] * 7 + [True] * 3] * SEQUENCES
    assert (scored_N == targets_N).view(SEQUENCES, -1).equal(is_scored_SL)
    has_gradient_SL = (gradient_N != 0).view(SEQUENCES, -1)
    assert has_gradient_SL.any(1).sum() == 24
    # All of a response or none of it: GSPO clips sequences.
    assert has_gradient_SL.equal(is_scored_SL & has_gradient_SL.any(1)[:, None])


# --- the command ---


def test_rows_must_divide() -> None:
    with pytest.raises(ConfigError, match="33 rows"):
        main(["--shapes", "33,8,64", "--device", "cpu", "--tp", "1"])


def entry(rows: int, vocab: int, seconds: float, mib: float) -> dict[str, Any]:
    numbers = {"status": "ok", "seconds_median": seconds, "peak_extra_mib": mib, "time_ratio": 1.0, "memory_ratio": 1.0}
    case = {**vars(TINY), "rows": rows, "vocab": vocab}
    return {"case": case, "methods": {"ours, recompute": numbers, REFERENCE: numbers}}


def test_linearity() -> None:
    entries = [entry(100, 64, 1.0, 30.0), entry(200, 64, 2.0, 31.0), entry(400, 64, 4.4, 29.5), entry(400, 32, 9.9, 30)]
    # Least squares through the origin: 2260 / 210,000 s a token; 2.0 s is 7.08 % below that line.
    wanted = "Time is 10.8 ms a token, within 7.08 % at every length; extra memory lies between 30 and 31 MiB."
    assert linearity(entries) == wanted


def test_an_accelerator_measured_elsewhere_takes_its_row() -> None:
    case = {**vars(TINY), "rows": 32768, "hidden": 2048, "vocab": 151936, "device": "cuda", "dtype": "bf16"}
    numbers = entry(1, 1, 0.1, 200.0)["methods"]
    result = {"command": "c", "machine": "16 cores of x; NVIDIA H200, nccl, torch.bfloat16", "versions": {"torch": "2"}}
    text = tables([{**result, "cases": [{"case": case, "methods": numbers}]}])
    assert "| **ours, recompute** | 1.00 | 100.0 ms |" in text
    assert "H200, (32768, 2048, 151936), bf16 | not yet measured" not in text
    assert "H200, (32768, 4096, 151936), bf16 | not yet measured" in text
