"""`python -m gspo_megatron.doctor` as a user runs it, and the processes that it asks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gspo_megatron import doctor
from gspo_megatron.device import gather
from gspo_megatron.device.checkup import CHECKS
from gspo_megatron.testing.time_limits import time_factor

ROOT = Path(__file__).parents[1]


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gspo_megatron.doctor", *arguments]
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | environment
    limit_s = 200 * time_factor()
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=limit_s)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is on a machine without a GPU")
def test_here_a_run_can_start_on_the_cpu(tmp_path: Path) -> None:
    done = run_doctor("--dir", str(tmp_path), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and set(found["findings"]) == {check.name for check in CHECKS}
    facts = found["facts"]
    assert facts["torch"]["version"] == torch.__version__ and facts["megatron"]["version"].startswith("0.1")
    assert all(have is not None for name, (_, have) in facts["pins"].items() if name == "numpy")
    if importlib.util.find_spec("triton"):
        assert facts["kernel"]["seconds"] > 0.1 and facts["kernel"]["architecture"] == 90


def test_what_is_wrong_ends_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_doctor("--dir", str(tmp_path / "file" / "runs"), RANK="0")
    assert done.returncode == 1
    assert "Not ready: environment, disk." in done.stdout
    assert "-> unset RANK, or start with torchrun" in done.stdout


def test_no_probe_is_waited_for_longer_than_its_limit(tmp_path: Path) -> None:
    """One hangs with a child of its own, one crashes, one prints no JSON, one answers."""
    for name, code in {
        "hangs": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])",
        "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "raises": "raise ImportError('libcudart.so.13: cannot open shared object file')",
        "answers": "print('noise'); print('{\"version\": \"1\"}')",
    }.items():
        (tmp_path / f"probe_{name}.py").write_text(code)
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        found = gather.ask({n: (f"probe_{n}",) for n in ("hangs", "crashes", "raises", "answers")}, 10.0)
    assert time.monotonic() - started < 30
    assert found["hangs"] == {"error": "no answer within 10 s"}
    assert found["crashes"] == {"error": "crashed (SIGSEGV)"}
    assert found["raises"]["error"].startswith("ImportError: libcudart.so.13")
    assert found["answers"] == {"version": "1"}


def test_a_package_that_half_works_says_what_is_missing(tmp_path: Path) -> None:
    """As the Transformer Engine of a wheel without its compiled part: its own words, not only that it failed."""
    folder = tmp_path / "halfway"
    folder.mkdir()
    (folder / "__init__.py").write_text("__version__ = '2.18.0'")
    (folder / "pytorch.py").write_text("import halfway_compiled_part")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert "halfway_compiled_part" in gather.imported("halfway.pytorch")["error"]
        assert gather.imported("no_such_package_at_all") == {"version": None, "error": None}


def test_memory_in_use_is_that_of_the_visible_gpus() -> None:
    used = [1.0, 20.0, 3.0]
    assert gather.seen(used, None) == used
    assert gather.seen(used, "2, 1") == [3.0, 20.0]
    assert gather.seen(used, "GPU-1f2e") == gather.seen(used, "") == gather.seen(used, "7") == []


def test_lines_say_what_to_do() -> None:
    finding = doctor.Finding(doctor.State.LIMIT, "found", "problem", "advice " * 20)
    assert doctor.table([("check", finding)]).splitlines() == [
        "limit  check               found",
        " " * 27 + "problem",
        " " * 27 + "-> " + " ".join(["advice"] * 12),
        " " * 30 + " ".join(["advice"] * 8),
    ]
