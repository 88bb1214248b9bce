"""What starts a run on a cluster: launch.sh, train.sbatch without a Slurm, and the manifest for Kubernetes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gspo_megatron.config.sections import Config
from gspo_megatron.run import stop
from gspo_megatron.testing.time_limits import time_factor
from gspo_megatron.train import main

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (Path(sys.executable).parent / "torchrun").exists(), reason="torchrun belongs to another environment"
)
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

FAKE_SRUN = """#!/bin/bash
printf '%s\n' "OMP_NUM_THREADS=$OMP_NUM_THREADS" "SLURM_EXPORT_ENV=$SLURM_EXPORT_ENV" "$@"
exit "${SRUN_STATUS:-0}"
"""


def sbatch(folder: Path, *arguments: str, script: str = "train.sbatch", **environment: str) -> list[str]:
    """What the batch script prints, with a srun that prints its arguments, one a line, in a job of two nodes with 16
    cores each."""
    for name, text in (("srun", FAKE_SRUN), ("scontrol", '#!/bin/bash\necho "scontrol $*"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NAME": "gspo", "SLURM_JOB_ID": "1234567", "SLURM_NNODES": "2", "SLURM_CPUS_ON_NODE": "16"}
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "examples/slurm" / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=job | environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_the_batch_script_passes_arguments_and_gpus_on(tmp_path: Path) -> None:
    words = sbatch(tmp_path, "--config", "a b.yaml", "train.steps=3", SLURM_GPUS_ON_NODE="8")
    assert (option(words, "--nnodes"), option(words, "--nproc_per_node")) == ("2", "8")
    assert option(words, "--rdzv_endpoint") == f"{os.uname().nodename}:24567"
    assert words[:2] == ["OMP_NUM_THREADS=2", "SLURM_EXPORT_ENV=ALL"]
    assert words[-1] == "gspo-1234567: exit status 0, not requeued"
    # The user's overrides come last, so that they win.
    program = ["-m", "gspo_megatron.train", "checkpoint.load=latest", "--config", "a b.yaml", "train.steps=3"]
    assert words[-len(program) - 1 : -1] == program


def test_the_batch_script_without_gpus_uses_the_cores(tmp_path: Path) -> None:
    words = sbatch(tmp_path, "--config", "c.yaml")
    assert option(words, "--nproc_per_node") == "16"
    assert words[0] == "OMP_NUM_THREADS=1"


def test_a_requeued_job_has_a_rendezvous_of_its_own(tmp_path: Path) -> None:
    lives = [sbatch(tmp_path), sbatch(tmp_path, SLURM_RESTART_COUNT="1")]
    assert len({option(words, "--rdzv_id") for words in lives}) == 2


def test_a_site_adds_what_it_needs(tmp_path: Path) -> None:
    """examples/slurm/site.sh with all of its lines, those that need a cluster's own commands aside."""
    commented = [line.removeprefix("# ") for line in (ROOT / "examples/slurm/site.sh").read_text().splitlines()]
    site = [line for line in commented if re.match(r"(srun|in|torchrun)_\w+\+?=", line)]
    assert len(site) == 4
    notify = 'after_job() { echo "told: $job $1 $2"; }'
    (tmp_path / "my site.sh").write_text("\n".join([*site, notify, 'echo "on $UNSET"']))
    words = sbatch(tmp_path, "--config", "c.yaml", SITE="my site.sh")
    assert words[0] == "gspo-1234567: my site.sh" and words[1] == "on "
    before, inside = words[: words.index("bash")], words[words.index("bash") :]
    assert [word for word in before if word.startswith("--")] == [
        *("--cpus-per-task=16", "--kill-on-bad-exit=1", "--mpi=none", "--cpu-bind=none"),
        *("--container-image=gspo_megatron.sqsh", f"--container-mounts={tmp_path}:{tmp_path}"),
        *(f"--container-workdir={tmp_path}", "--nv", "--bind", "--pwd"),
    ]
    assert before[-8:] == [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        str(tmp_path),
        "--pwd",
        str(tmp_path),
        "gspo_megatron.sif",
    ]
    assert (option(inside, "--log-dir"), option(inside, "--tee")) == ("logs/gspo-1234567", "3")
    assert words[-2:] == ["gspo-1234567: exit status 0, not requeued", "told: gspo-1234567 0 ended"]


@pytest.mark.parametrize(("status", "how"), [(70, "ended"), (75, "requeued"), (1, "requeued")])
def test_a_site_is_told_how_the_job_goes_on(tmp_path: Path, status: int, how: str) -> None:
    (tmp_path / "site.sh").write_text('after_job() { echo "told: $1 $2"; false; }')
    words = sbatch(tmp_path, SITE="site.sh", SRUN_STATUS=str(status))
    told = words.index(f"told: {status} {how}")
    assert words[told + 1] == "gspo-1234567: after_job failed with 1"
    assert (words[told + 2 :] == ["scontrol requeue 1234567"]) == (how == "requeued")


# --- engines on the first nodes ---

FAKE_STEPS = """#!/bin/bash
if [[ $* == *"--label hostname"* ]]; then printf '%s\n' '2: node-c' '0: node-a' '1: node-b'; exit; fi
name=training; [[ $* == *--job-name=engines* ]] && name=engines
printf '%s\n' "$GSPO_ENGINE_TOKEN" "$@" > "$name.words"
# Until it ends by itself, or a signal for it is left as a file.
for ((tenth = 0; tenth < 300; tenth++)); do
    if [[ -e $name.status ]]; then exit "$(< "$name.status")"; fi
    if [[ -e $name.signal ]]; then
        echo "$name got $(< "$name.signal")"
        exit "$(cat "$name.at_signal" 2> /dev/null || echo 0)"
    fi
    sleep 0.1
done
exit 99
"""
FAKE_SQUEUE = "#!/bin/bash\nprintf '%s\\n' '1234567.batch batch' '1234567.4 engines' '1234567.5 training'\n"
FAKE_SCANCEL = """#!/bin/bash
name=training; [[ $2 == 1234567.4 ]] && name=engines
echo "${1#--signal=}" > "$name.signal"
"""


def served(folder: Path, *arguments: str, **environment: str) -> tuple[list[str], list[str], list[str]]:
    """What train_served.sbatch prints in a job of three nodes, and the words of the engines' and the training's step.
    Steps end when a file says so: `engines.status`, `training.status`; after a signal with `*.at_signal`."""
    job = {"script": "train_served.sbatch", "SLURM_NNODES": "3"} | environment
    for name, text in (("squeue", FAKE_SQUEUE), ("scancel", FAKE_SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "FAKE_SRUN", FAKE_STEPS)
        printed = sbatch(folder, *arguments, **job)
    return printed, *((folder / f"{name}.words").read_text().splitlines() for name in ("engines", "training"))


def test_the_first_nodes_run_engines_and_the_others_train(tmp_path: Path) -> None:
    (tmp_path / "training.status").write_text("0")
    printed, engines, training = served(
        tmp_path, "--config", "a b.yaml", "train.steps=3", "--", "engine.threads=2", SLURM_GPUS_ON_NODE="2"
    )
    assert printed == ["engines got TERM", "gspo-1234567: exit status 0, not requeued"]
    assert {"--nodes=1", "--ntasks=1", "--relative=0", "--kill-on-bad-exit=1", "--cpus-per-task=16"} <= set(engines)
    assert engines[engines.index("serve") + 1 :] == [
        *("--port", "14567", "--config", "a b.yaml", "train.steps=3"),
        *("engine.gpus=[0,1]", "engine.tensor_parallel=2", "engine.threads=2"),
    ]
    assert {"--nodes=2", "--ntasks=2", "--relative=1", "--kill-on-bad-exit=1", "--cpus-per-task=16"} <= set(training)
    assert (option(training, "--nnodes"), option(training, "--nproc_per_node")) == ("2", "2")
    assert option(training, "--rdzv_endpoint") == "node-b:24567"
    program = ["-m", "gspo_megatron.train", "checkpoint.load=latest", "--config", "a b.yaml", "train.steps=3"]
    assert training[-len(program) - 1 :] == [*program, "engine.addresses=[http://node-a:14567]"]
    # The token is in the environment of both, and nowhere else.
    token = engines[0]
    assert len(token) == 32 and training[0] == token
    assert token not in " ".join([*engines[1:], *training[1:], *printed])


def test_several_engine_nodes(tmp_path: Path) -> None:
    (tmp_path / "training.status").write_text("0")
    _, engines, training = served(tmp_path, "--config", "c.yaml", ENGINE_NODES="2")
    assert "--nodes=2" in engines and "--relative=2" in training
    assert training[-1] == "engine.addresses=[http://node-a:14567,http://node-b:14567]"
    assert option(training, "--rdzv_endpoint") == "node-c:24567"
    assert "engine.gpus" not in " ".join(engines)


@pytest.mark.parametrize(
    ("engines", "training", "how"),
    [
        # The engines cannot start: that is why the training ended as it did.
        (2, 75, "exit status 2, not requeued"),
        (1, 75, "exit status 1, requeued"),
        (1, 1, "exit status 1, requeued"),
        (0, 75, "exit status 75, requeued"),
        # It had nothing left to do.
        (1, 0, "exit status 0, not requeued"),
        (1, 70, "exit status 70, not requeued"),
    ],
)
def test_engines_that_end_end_the_training(tmp_path: Path, engines: int, training: int, how: str) -> None:
    (tmp_path / "engines.status").write_text(str(engines))
    (tmp_path / "training.at_signal").write_text("1")
    (tmp_path / "gspo-1234567.0.status").write_text(str(training))
    printed, *_ = served(tmp_path, "--config", "c.yaml")
    assert printed[:3] == [
        f"gspo-1234567: the engines ended with status {engines}; the training saves and ends",
        "training got USR1",
        f"gspo-1234567: {how}",
    ]


def test_all_nodes_for_engines_are_refused(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "examples/slurm/train_served.sbatch"), "--config", "c.yaml"]
    job = {"SLURM_JOB_NAME": "gspo", "SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_CPUS_ON_NODE": "1"}
    environment = job | {"SLURM_SUBMIT_DIR": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ENGINE_NODES=1 of 1 nodes; at least one node has to train" in done.stderr


# --- Kubernetes ---


@pytest.fixture(scope="module")
def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((ROOT / "examples/kubernetes/job.yaml").read_text())
    return service, job


def test_the_pods_of_the_manifest_find_each_other(manifest: tuple[dict[str, Any], dict[str, Any]]) -> None:
    service, job = manifest
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name = job["metadata"]["name"]
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert f"--nnodes={spec['completions']}" in container["command"]
    assert f"--nproc_per_node={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]
    assert any(f"--rdzv_endpoint={name}-0.{pod['subdomain']}.$(NAMESPACE)." in word for word in container["command"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_manifest_acts_on_our_exit_statuses(manifest: tuple[dict[str, Any], dict[str, Any]]) -> None:
    spec = manifest[1]["spec"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy works with no other"
    assert pod["terminationGracePeriodSeconds"] > Config().checkpoint.grace_s
    on_status = {
        status: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for status in rule["onExitCodes"]["values"]
        if rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    }
    assert on_status == {stop.REFUSED: "FailJob", stop.STOPPED_BY_GUARD: "FailJob", stop.STOPPED: "Ignore"}


def test_train_accepts_the_command_of_the_manifest(
    manifest: tuple[dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = manifest[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    arguments = command[command.index("gspo_megatron.train") + 1 :]
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "tests/slurm"))  # its reward
    arguments = [word.replace("/runs/run.yaml", "tests/slurm/tiny.yaml") for word in arguments]
    assert main([*arguments, "--dry-run", "--world-size", "16"]) == 0


def test_pods_that_are_told_to_end_save_and_say_so(
    manifest: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    """The manifest's command in two pods on this machine, one process each. One pod gets SIGTERM, as when its node is
    drained; both exit with 75, so the Job starts them again."""
    command = manifest[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    small = {
        "--nproc_per_node": "1",
        "--rdzv_endpoint": f"localhost:{20000 + os.getpid() % 10000}",
        "--config": str(ROOT / "tests/slurm/tiny.yaml"),
        "run.dir": str(tmp_path / "run"),
    }
    command = [f"{key}={small[key]}" if (key := word.split("=")[0]) in small else word for word in command]
    command.append("train.steps=400")  # no machine gets to the end before the signal
    environment = {"PATH": PATH, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/slurm'}", "OMP_NUM_THREADS": "1"}
    environment |= {"TMPDIR": str(tmp_path)}
    logs = [(tmp_path / f"pod_{index}.log") for index in range(2)]
    pods = []
    for log in logs:
        with log.open("w") as file:
            pods.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        started, metrics = time.monotonic(), tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            assert all(pod.poll() is None for pod in pods), logs[0].read_text() + logs[1].read_text()
            assert time.monotonic() - started < 120 * time_factor()
            time.sleep(0.2)
        pods[1].send_signal(signal.SIGTERM)
        assert [pod.wait(180 * time_factor()) for pod in pods] == [stop.STOPPED] * 2, [log.read_text() for log in logs]
    finally:
        for pod in pods:
            subprocess.run(["pkill", "-KILL", "-P", str(pod.pid)])
            pod.kill()
    assert "saved in" in logs[0].read_text()
    # Nothing is left of the file in which the processes told their status.
    assert not list(tmp_path.glob("tmp*/status"))


@pytest.mark.parametrize(("program", "status"), [("exit 3", 1), ("echo 70 > $GSPO_STATUS_FILE; exit 70", 70)])
def test_launch_exits_as_the_training_does(program: str, status: int) -> None:
    """What wrote no status, as a killed process, has torchrun's."""
    script = ["--standalone", "--nproc_per_node=1", "--no-python", "bash", "-c", program]
    command = ["bash", str(ROOT / "examples/launch.sh"), *script]
    environment = {"PATH": PATH, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120 * time_factor())
    assert done.returncode == status, done.stderr


def test_launch_refuses_a_machine_on_which_nobody_could_be_told_to_save(tmp_path: Path) -> None:
    bash = subprocess.run(["which", "bash"], capture_output=True, text=True).stdout.strip()
    done = subprocess.run(
        [bash, ROOT / "examples/launch.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == stop.REFUSED and "install the package procps" in done.stderr


# --- the pages ---


def test_the_page_of_exit_statuses_has_all_of_them() -> None:
    page = (ROOT / "docs/operating.md").read_text()
    rows = {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert rows == {0, stop.FAILED, stop.REFUSED, stop.STOPPED_BY_GUARD, stop.STOPPED, stop.QUIT}
    for number in stop.SIGNALS:
        assert f"`{number.name}`" in page
