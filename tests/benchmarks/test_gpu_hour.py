"""`make gpu-hour`: every part runs here in a tiny rehearsal, and nothing that one part does stops the others."""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import check_layout
import pytest
import torch

from benchmarks.gpu_hour import __main__ as gpu_hour
from benchmarks.gpu_hour import measure, runs, status
from benchmarks.gpu_hour.parts import BY_NAME, PARTS, ROOT, Part, Shown, Target, derived
from gspo_megatron.base.batches import MicroBatch, UpdateBatch
from gspo_megatron.device.facts import Facts, Gpu, Package
from gspo_megatron.testing.local_ranks import run_distributed
from gspo_megatron.testing.time_limits import time_factor

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.2)
NODE = Facts(
    torch=Package("2.13.0"),
    torch_cuda=(13, 0),
    gpus=(H100,),
    driver="580.159.04",
    driver_cuda=(13, 0),
    transformer_engine=Package("2.18.0"),
)


def run_module(module: str, arguments: list[str]) -> int:
    return int(importlib.import_module(module).main(arguments))


@pytest.mark.parametrize("name", list(BY_NAME))
def test_every_part_rehearses_its_own_command(name: str, tmp_path: Path) -> None:
    """The command as the runner starts it, in a process that has everything imported; then its values are read."""
    part, output = BY_NAME[name], tmp_path / "result"
    command = part.command(output, True)
    program = command[command.index("ignore") + 1 :]
    if "pytest" in program:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120 * time_factor())
        assert done.returncode == 0 and "test_the_cuda_lane_trains[bf16]" in done.stdout, done.stdout + done.stderr
    elif program[0] == "-m":
        assert run_distributed(run_module, 1, program[1], program[2:], like_torchrun=True) == [0]
    else:
        assert program[0] == "tools/check_layout.py" and (ROOT / program[0]).is_file()
        with redirect_stdout(io.StringIO()) as said:
            assert check_layout.main([*program[1:3], *program[3:]]) == 0, said.getvalue()
    values = part.values(output)
    assert values and {shown.key for shown in part.shown} <= {*values, "ratio_to_bf16"}
    assert all(math.isfinite(value) for value in values.values() if isinstance(value, float))


def test_on_one_gpu_the_parts_fit_28_minutes() -> None:
    assert sum(part.minutes for part in PARTS if part.gpus == 1) <= 28


def test_the_numbers_of_the_issue_are_the_targets() -> None:
    targets = {(part.name, shown.key): shown.target for part in PARTS for shown in part.shown}
    assert targets["update", "ratio_to_plain"] == Target(">=", 0.97)
    assert targets["update_blockwise", "ratio_to_bf16"] == Target(">=", 1.15)
    assert targets["log_probs", "recompute_ms"] == Target("<=", 120)
    assert targets["log_probs", "stored_ms"] == Target("<=", 92)
    assert targets["fp8_blockwise", "ratio_noise"] == Target("<=", 1e-6)


# --- the measures can find what they are for ---


def what_a_wrong_gradient_looks_like() -> dict[str, Any]:
    """Of a policy whose log-probs move between the two forwards, and of one whose gradient is another's."""
    options = measure.parser().parse_args(["first_ratio", "--output", "x", "--rehearse"])
    bench = measure.Bench.open(options)
    batch = bench.batch(bench.lengths)
    policy = bench.policy(te=False)
    first = measure.look(policy, batch)
    with torch.no_grad():
        policy.model[0].decoder.layers[0].self_attention.linear_qkv.weight.mul_(1.05)
    second = measure.look(policy, batch)
    moved = measure.Found(first.old, second.new, second.gradients)
    return {
        "noise": (measure.ratio_noise(batch, first), measure.ratio_noise(batch, moved)),
        "cosine": measure.cosine(first.gradients, second.gradients),
        "same": measure.cosine(first.gradients, first.gradients),
        "error": measure.relative_error(second.gradients, first.gradients),
        "worst": measure.worst(second.gradients, first.gradients),
        "rms": measure.rms(second.old, first.old),
    }


def test_a_difference_shows() -> None:
    [found] = run_distributed(what_a_wrong_gradient_looks_like, 1, like_torchrun=True)
    still, moved = found["noise"]
    assert still == 0 and moved > 1e-6
    assert found["same"] == pytest.approx(1) and found["cosine"] < 1 - 1e-9
    assert found["error"] > 1e-4 and found["rms"] > 1e-6
    assert max(found["worst"].values()) >= found["error"]


def test_steps_that_did_not_run_are_not_equal() -> None:
    rows = [{"step": step, "loss": 0.5 * step} for step in range(runs.STEPS + 1)]
    both = runs.after_resume(rows, rows[3:])
    assert [(a["step"], b["step"]) for a, b in both] == [(3, 3), (4, 4)]
    for continued, missing in (([], [3, 4]), (rows[:3], [3, 4]), (rows[:4], [4])):
        with pytest.raises(ValueError, match=rf"the continued run has no rows of the steps {re.escape(str(missing))}"):
            runs.after_resume(rows, continued)
    with pytest.raises(ValueError, match=r"the whole run has no rows of the steps \[4\]"):
        runs.after_resume(rows[:4], rows)


def test_kernels_that_were_all_skipped_miss_a_target() -> None:
    result = {"state": "measured", "values": {"failed": 0, "passed": 0, "skipped": 70}}
    assert status.missed({"kernels": result}) == ["kernels: tests that passed is 0, the target is >= 1"]


def test_the_ratio_is_gspos() -> None:
    """exp of the mean over a sequence, not over a micro-batch, of log-probs that are larger by 0.1 and 0.2."""
    m = MicroBatch.__new__(MicroBatch)
    object.__setattr__(m, "trained_lengths", [2, 3])
    object.__setattr__(m, "sequence_R", torch.tensor([0, 0, 1, 1, 1]))
    old = torch.zeros(5)
    new = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2])
    batch = UpdateBatch([m], 2, 5)
    noise = measure.ratio_noise(batch, measure.Found([old], [new], {}))
    assert noise == pytest.approx(math.expm1(0.2), rel=1e-6)


# --- the runner ---


def part(name: str, code: str, **more: Any) -> Part:
    command = lambda output, rehearse: [sys.executable, "-c", code, str(output)]  # noqa: E731
    shown = (Shown("x", "a number", Target("<=", 1)),)
    values = lambda output: json.loads(output.read_text())["values"]  # noqa: E731
    return Part(name, "about", more.pop("minutes", 1.0), command, shown, values, **more)


GOOD = "import sys, json; json.dump({'values': {'x': 0.5}}, open(sys.argv[1], 'w'))"
MARKS = f"before\n<!-- {status.MARK} -->\nold\n<!-- end of {status.MARK} -->\nafter\n"


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that runs these parts on a machine with these facts; (status, results by part, the page)."""

    def run(*parts: Part, facts: Facts = NODE, arguments: tuple[str, ...] = ()) -> tuple[int, dict[str, Any], str]:
        for module in (status, gpu_hour):
            monkeypatch.setattr(module, "PARTS", parts, raising=False)
        monkeypatch.setattr(gpu_hour, "chosen", lambda names: list(parts))
        monkeypatch.setattr(gpu_hour, "gather", lambda *where, **limit: facts)
        page = tmp_path / "status.md"
        if not page.exists():
            page.write_text(MARKS)
        code = gpu_hour.main(["--output", str(tmp_path / "out"), "--markdown", str(page), *arguments])
        found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
        return code, found, page.read_text()

    return run


def test_a_failure_does_not_stop_the_rest(runner: Any) -> None:
    started = time.monotonic()
    code, found, page = runner(
        part("raises", "raise RuntimeError('CUDA error: an illegal memory access')"),
        part("hangs", "import time; print('still here', flush=True); time.sleep(600)", minutes=0.05),
        part("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        part("says_nothing", "pass"),
        part("good", GOOD),
    )
    assert code == 1 and time.monotonic() - started < 60 * time_factor()
    assert {name: result["state"] for name, result in found.items()} == {
        "raises": "failed",
        "hangs": "failed",
        "crashes": "failed",
        "says_nothing": "failed",
        "good": "measured",
    }
    assert found["raises"]["reason"] == "exit status 1: RuntimeError: CUDA error: an illegal memory access"
    assert found["hangs"]["reason"] == "not done after 3 s, its own limit: still here"
    assert found["crashes"]["reason"].startswith("SIGSEGV")
    assert "cannot be read" in found["says_nothing"]["reason"]
    assert found["good"]["values"] == {"x": 0.5} and found["good"]["machine"].startswith("1 x NVIDIA H100")
    assert "| `good` | a number | <= 1 | 0.5 |" in page and page.startswith("before\n") and page.endswith("after\n")
    assert "failed: SIGSEGV" in page


def test_what_is_left_at_the_deadline_is_cut(runner: Any) -> None:
    code, found, page = runner(part("good", GOOD), arguments=("--minutes", "0.1"))
    assert code == 0 and found["good"]["state"] == "cut"
    assert "cut: the 0.1 minutes were over" in page


@pytest.mark.parametrize(
    ("needs", "facts", "reason"),
    [
        ({"gpus": 2}, NODE, "needs 2 GPUs, here is 1"),
        ({"needs_te": True}, replace(NODE, transformer_engine=Package()), "not installed"),
        ({"needs_te": True}, replace(NODE, transformer_engine=Package("2.18.0", "ImportError: x.so")), "x.so"),
        ({"fp8": "blockwise"}, replace(NODE, torch_cuda=(12, 8)), "12.9"),
    ],
)
def test_what_cannot_run_says_why(runner: Any, needs: dict[str, Any], facts: Facts, reason: str) -> None:
    code, found, page = runner(part("one", GOOD, **needs), part("good", GOOD), facts=facts)
    assert code == 0 and found["one"]["state"] == "skipped" and reason in found["one"]["reason"]
    assert found["good"]["state"] == "measured" and f"skipped: {found['one']['reason']}" in page


def test_a_skipped_part_leaves_an_earlier_measurement(runner: Any) -> None:
    runner(part("one", GOOD))
    _, found, page = runner(part("one", GOOD, gpus=2))
    assert found["one"]["state"] == "measured" and "0.5" in page


def test_a_missed_target_is_said(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, page = runner(part("bad", GOOD.replace("0.5", "2.5")))
    assert code == 1 and "| 2.5, **missed** |" in page
    assert "bad: a number is 2.5, the target is <= 1" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured(runner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, page = runner(part("good", GOOD), facts=Facts())
    assert (code, found) == (2, {}) and page == MARKS
    assert "gspo_megatron.doctor" in capsys.readouterr().out


def test_a_rehearsal_never_reaches_the_page(runner: Any) -> None:
    code, found, page = runner(part("good", GOOD), facts=Facts(), arguments=("--rehearse",))
    assert code == 0 and found["good"]["rehearsal"] and page == MARKS
    with pytest.raises(SystemExit):
        gpu_hour.parsed(["--rehearse"])


def test_fp8_is_compared_with_bf16() -> None:
    found = derived({"update": {"tokens_per_second": 100.0}, "update_blockwise": {"tokens_per_second": 120.0}})
    assert found["update_blockwise"]["ratio_to_bf16"] == pytest.approx(1.2)


def test_the_page_is_what_the_results_say() -> None:
    """docs/status.md holds the table of the committed results, or of none."""
    table = status.table(status.results_in(gpu_hour.RESULTS))
    assert f"<!-- {status.MARK} -->\n{table}<!-- end of {status.MARK} -->" in gpu_hour.STATUS.read_text()
    assert all(f"| `{part.name}` |" in table for part in PARTS)
