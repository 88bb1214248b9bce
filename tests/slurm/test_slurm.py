"""examples/slurm/*.sbatch on a real Slurm: a cluster of two nodes, which start.sh starts on this machine.

The undisturbed run proceeds alongside the others; what happens to those must not show in their metrics.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.testing.commands import metrics, rollouts
from gspo_megatron.testing.time_limits import time_factor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
STEPS = 40  # of tiny.yaml

pytestmark = pytest.mark.slurm


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60 * time_factor()).stdout


class Job:
    """A run of an example's batch script with a tiny model, below `directory`, one process on each node."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        max_crashes: int = 0,
        site: str = "",
        script: str = "train.sbatch",
        config: Path = HERE / "tiny.yaml",
    ) -> None:
        """`site`: the text of its site file, which then has to bring the environment, too."""
        self.directory, self.run = directory, directory / "run"
        directory.mkdir()
        inherited = "ALL"
        if site:
            (directory / "site.sh").write_text(site)
            inherited = "SITE=site.sh"
        # Nodes without GPUs, that jobs share; the limit is an hour, so that no signal comes by itself.
        options = [
            "--gpus-per-node=0",
            "--oversubscribe",
            "--time=60",
            f"--export={inherited},MAX_CRASHES={max_crashes}",
        ]
        command = [str(ROOT / "examples/slurm" / script), "--config", str(config), f"run.dir={self.run}"]
        self.id = slurm("sbatch", "--parsable", f"--chdir={directory}", *options, *command, *arguments).strip()

    def shows(self, field: str) -> str:
        """A field of what Slurm knows about the job."""
        fields = slurm("scontrol", "--oneliner", "show", "job", self.id).split()
        return dict(part.split("=", 1) for part in fields if "=" in part)[field]

    def update(self, **fields: str) -> None:
        slurm("scontrol", "update", f"jobid={self.id}", *(f"{name}={value}" for name, value in fields.items()))

    def rows(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def kill_one_process(self) -> None:
        found = slurm("pgrep", "-f", f"python[^ ]* -u -m gspo_megatron.train .*run.dir={self.run}( |$)").split()
        assert len(found) == 2, "one process on each node"
        os.kill(int(found[-1]), signal.SIGKILL)

    def log(self) -> str:
        return "".join(path.read_text() for path in self.directory.glob("gspo-*.log"))

    def wait_until(self, what: str, reached: Callable[[], bool], timeout_s: float = 240) -> None:
        started = time.monotonic()
        while True:
            limit_s = timeout_s * time_factor()
            # Asked first: a job that has ended changes nothing any more.
            state = self.shows("JobState")
            if reached():
                return
            assert state not in ENDED, f"{state} before {what}\n{self.log()[-5000:]}"
            late = f"{state}, but not {what} after {limit_s:.0f} s\n{self.log()[-5000:]}"
            assert time.monotonic() - started < limit_s, late
            time.sleep(0.5)

    def wait_for_rows(self, number: int) -> None:
        self.wait_until(f"{number} rows of metrics", lambda: self.rows() >= number)

    def wait_for_state(self, state: str) -> None:
        self.wait_until(f"the state {state}", lambda: self.shows("JobState") == state)

    def start_again(self) -> None:
        """Slurm has put the job back into the queue, to start in two minutes: starts it sooner."""
        self.wait_for_state("PENDING")
        # A node refuses a start in the second in which the job's earlier life ended ("credential revoked").
        time.sleep(3)
        self.update(StartTime="now", TimeLimit="60")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    directory = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SLURM_CONF", str(directory / "slurm.conf"))
        # What jobs inherit: torchrun, the rewards of tiny.yaml, and no more threads than cores.
        environment.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        environment.setenv("PYTHONPATH", f"{ROOT}:{HERE}")
        subprocess.run([HERE / "start.sh", directory], check=True, timeout=300 * time_factor())
        try:
            yield
        finally:
            subprocess.run([HERE / "stop.sh", directory], check=True, timeout=120 * time_factor())


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("jobs") / "undisturbed")


def assert_ends_like(undisturbed: Job, job: Job) -> None:
    for each in (undisturbed, job):
        each.wait_for_state("COMPLETED")
        assert each.rows() == STEPS + 1
    compare = [sys.executable, ROOT / "tools/compare_runs.py", undisturbed.run, job.run]
    compared = subprocess.run(compare, capture_output=True, text=True)
    assert compared.returncode == 0, compared.stdout + compared.stderr


def test_a_wrong_setting_fails_the_job_once(undisturbed: Job, tmp_path: Path) -> None:
    job = Job(tmp_path / "job", "parallel.tp=3", max_crashes=3)
    job.wait_for_state("FAILED")
    assert (job.shows("Restarts"), job.shows("ExitCode")) == ("0", "2:0")
    assert "ConfigError" in job.log()


def test_a_job_that_slurm_requeues_ends_as_if_undisturbed(undisturbed: Job, tmp_path: Path) -> None:
    job = Job(tmp_path / "job")
    job.wait_for_rows(5)
    slurm("scontrol", "requeue", job.id)
    job.start_again()
    assert_ends_like(undisturbed, job)
    assert job.shows("Restarts") == "1"
    assert "continuing after" in job.log()


def test_the_time_limit_is_announced_and_the_job_goes_on_afterwards(undisturbed: Job, tmp_path: Path) -> None:
    job = Job(tmp_path / "job")
    job.wait_for_rows(3)
    # The script asks for a signal five minutes before the limit. Slurm looks every half minute.
    job.update(TimeLimit="5")
    job.start_again()
    assert job.rows() <= STEPS
    assert "exit status 75, requeued" in job.log()
    assert_ends_like(undisturbed, job)
    assert job.shows("Restarts") == "1"
    assert "continuing after" in job.log()


SITE = f"""
export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}:{HERE}
srun --ntasks-per-node=1 bash -c 'echo data > "staged-$SLURM_NODEID"'
torchrun_options+=(--log-dir "logs/$life" --tee 3)
after_job() {{ echo "$1 $2" >> told; }}
"""


def test_a_job_that_crashes_is_requeued_until_it_is_given_up(undisturbed: Job, tmp_path: Path) -> None:
    """It inherits nothing: its site file brings the environment, stages data, asks for logs, is called at both ends."""
    job = Job(tmp_path / "job", max_crashes=1, site=SITE)
    job.wait_for_rows(3)
    job.kill_one_process()
    job.start_again()
    job.wait_for_rows(6)
    job.kill_one_process()
    job.wait_for_state("FAILED")
    assert job.shows("Restarts") == "1"
    assert "crash 2 in a row, given up" in job.log()
    assert "gspo-" + job.id + ": site.sh" in job.log()
    assert [path.name for path in sorted(job.directory.glob("staged-*"))] == ["staged-0", "staged-1"]
    assert [line.split()[1] for line in (job.directory / "told").read_text().splitlines()] == ["requeued", "ended"]
    # torchrun: logs/LIFE/ID_RANDOM/attempt_0/LOCAL_RANK/stdout.log, on each node.
    logs = [len(list(job.directory.glob(f"logs/{life}/*/attempt_0/0/stdout.log"))) for life in range(2)]
    assert logs == [2, 2] and "step 2/40" in "".join(
        p.read_text() for p in job.directory.glob("logs/0/*/*/0/stdout.log")
    )


# --- train_served.sbatch: an engine on the first node, training on the second ---

SERVED: dict[str, Any] = {"script": "train_served.sbatch", "config": HERE / "served.yaml"}
VLLM = ROOT / ".venv-engine/bin/python"


@pytest.mark.skipif(not VLLM.exists(), reason="vLLM is not installed: make venv-engine")
def test_a_job_with_an_engine_node_is_requeued_and_ends_as_if_undisturbed(cluster: None, tmp_path: Path) -> None:
    # The two nodes are one machine: over the network, all the same.
    job = Job(tmp_path / "job", "engine.channel=broadcast", "--", f"engine.python={VLLM}", **SERVED)
    job.wait_until("3 rows of metrics", lambda: job.rows() >= 3, timeout_s=400)
    slurm("scancel", "--signal=USR1", job.id)
    job.start_again()
    assert "exit status 75, requeued" in job.log()
    assert job.rows() < 9
    job.wait_until("the state COMPLETED", lambda: job.shows("JobState") == "COMPLETED", timeout_s=400)
    assert job.shows("Restarts") == "1"
    assert "continuing after" in job.log() and job.log().count("ready: engine.addresses=[http://") == 2
    assert not subprocess.run(["pgrep", "-f", f"run.dir={job.run}|{job.run}/engine"], capture_output=True).stdout
    # The product's own sampler draws the same tokens.
    own = tmp_path / "own"
    settings = ["--config", str(SERVED["config"]), "rollout.engine=collective", f"run.dir={own}"]
    command = [sys.executable, "-m", "gspo_megatron.train", *settings]
    # As many threads as in the job: more would add in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(metrics(own)) == len(metrics(job.run)) == 9
    for of_job, of_own in zip(metrics(job.run), metrics(own), strict=True):
        assert [of_job.get(key) for key in ("loss", "grad_norm", "step")] == [
            of_own.get(key) for key in ("loss", "grad_norm", "step")
        ]
    drawn = [[[(r["id"], r["tokens"], r["reward"]) for r in step] for step in rollouts(run)] for run in (job.run, own)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 8


def test_a_wrong_setting_of_the_engines_fails_the_job_once(cluster: None, tmp_path: Path) -> None:
    # A training that is still starting does not hear that it is to end, and waits so long for its engines.
    wait = "engine.start_timeout_s=5"
    job = Job(tmp_path / "job", wait, "--", "engine.count=2", max_crashes=3, **SERVED)
    job.wait_for_state("FAILED")
    assert (job.shows("Restarts"), job.shows("ExitCode")) == ("0", "2:0")
    assert "engine.count=2: this command starts one engine" in job.log()
    assert "the engines ended with status 2; the training saves and ends" in job.log()
