"""Packaging: setup.py, requirements/, Makefile, Dockerfile and the Slurm script must be consistent."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gspo_megatron
from gspo_megatron.testing.time_limits import time_factor

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """The arguments setup.py gives to setuptools."""
    with pytest.MonkeyPatch.context() as patch:
        given: dict[str, Any] = {}
        patch.setattr(setuptools, "setup", given.update)
        patch.chdir(ROOT)
        exec((ROOT / "setup.py").read_text(), {})
    return given


def read_pins(name: str, python: str) -> dict[str, str]:
    """Package -> version of requirements/<name> under that Python; fails on a line that pins no exact version."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines()]
    pins: dict[str, str] = {}
    for requirement in map(Requirement, filter(None, lines)):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{name}: {requirement} is no exact version"
        key = canonicalize_name(requirement.name)
        assert key not in pins, f"{name}: {key} is pinned twice for Python {python}"
        pins[key] = specifier.version
    return pins


def run(*command: str, **environment: str) -> str:
    """Output of the command, which sees nothing of a make or a Slurm job that this test itself may run in."""
    environment = {"PATH": os.environ["PATH"], **environment}
    limit_s = 60 * time_factor()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_version_has_one_source(metadata):
    assert metadata["version"] == gspo_megatron.__version__
    literal = re.compile(rf'version\s*=\s*"{re.escape(gspo_megatron.__version__)}"')
    assert not literal.search((ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text())
    assert gspo_megatron.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_installed_with_its_code(metadata):
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "gspo_megatron").rglob("*.py")}
    assert {name.replace(".", "/") for name in metadata["packages"]} == folders


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_answer_setup(metadata, python):
    pins = {**read_pins("pins.txt", python), **read_pins("torch.txt", python), **read_pins("megatron.txt", python)}
    extras = metadata["extras_require"]
    for requirement in map(Requirement, [*metadata["install_requires"], *extras["dev"], *extras["plot"]]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_leave_torch_alone(python):
    """A constraint on what PyTorch depends on could make pip exchange a user's PyTorch to meet it."""
    assert not read_pins("pins.txt", python).keys() & {*read_pins("torch.txt", python), "triton", "megatron-core"}


def test_extras_name_what_the_docs_explain(metadata):
    page = (ROOT / "docs/dependencies.md").read_text()
    assert {"te", "hf", "plot", "dev"} <= metadata["extras_require"].keys()
    for extra, packages in metadata["extras_require"].items():
        (row,) = re.findall(rf"^\| `{extra}` \|.*$", page, re.MULTILINE)
        assert set(re.findall(r"`([^`]+)`", row)) == {extra, *packages}
    for requirement in metadata["install_requires"]:
        assert f"| `{Requirement(requirement).name}" in page, f"docs/dependencies.md has no line for {requirement}"


def test_no_project_named_apex(metadata):
    asked = [*metadata["install_requires"], *(p for packages in metadata["extras_require"].values() for p in packages)]
    assert "apex" not in {canonicalize_name(Requirement(r).name) for r in asked}


def test_no_registry_is_named():
    files = [ROOT / name for name in ("setup.py", "pyproject.toml", "Makefile", "Dockerfile", ".ci/run")]
    for file in [*files, *(ROOT / "requirements").iterdir()]:
        assert not re.search(r"index-url|find-links|pypi\.org|download\.pytorch", file.read_text()), file


def test_make_help_lists_every_target():
    phony = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    listed = re.findall(r"^  make (\S+) +\S", run("make", "help"), re.MULTILINE)
    assert listed == phony
    assert {"venv", "demo", "test", "test-next", "check", "gpu", "clean"} <= set(listed)
    for target in listed:
        run("make", "--dry-run", target)


@pytest.mark.parametrize(
    ("target", "folder", "selected"), [("test", ".venv", ""), ("test-next", ".venv-next", "--depends-on-megatron")]
)
def test_make_runs_the_suite_in_its_own_environment(target, folder, selected):
    commands = run("make", "--dry-run", "--always-make", target, "TORCH=torch==2.11.0", "ARGS=-k one").splitlines()
    workers = "-n logical --maxprocesses 8 --dist worksteal"
    assert commands[-1].split() == f"{folder}/bin/python -m pytest {workers} {selected} -k one".split()
    assert f"{folder}/bin/pip install torch==2.11.0" in commands
    assert not any("requirements/torch.txt" in command for command in commands)


def test_make_can_take_the_torch_that_is_there():
    commands = run("make", "--dry-run", "--always-make", "venv", "TORCH=system")
    assert "-m venv --system-site-packages .venv" in commands
    assert "pip install torch" not in commands and "requirements/torch.txt" not in commands


@pytest.mark.parametrize("script", [".ci/run", "examples/slurm/train.sbatch"])
def test_scripts_are_bash(script):
    run("bash", "-n", script)


def test_ci_can_be_started():
    assert (ROOT / ".ci/run").stat().st_mode & stat.S_IXUSR


FAKE_SRUN = """#!/bin/bash
printf '%s\\n' "OMP_NUM_THREADS=$OMP_NUM_THREADS" "$@"
"""


def start_slurm_script(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """What examples/slurm/train.sbatch hands to srun, one word a line, in a job of two nodes with 16 cores each."""
    (folder / "srun").write_text(FAKE_SRUN)
    (folder / "srun").chmod(0o755)
    job = {"SLURM_JOB_NAME": "gspo", "SLURM_JOB_ID": "1234567", "SLURM_NNODES": "2", "SLURM_CPUS_ON_NODE": "16"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    said = run("bash", "examples/slurm/train.sbatch", *arguments, **{"PATH": path, **job, **environment})
    *words, verdict = said.splitlines()
    assert verdict == "gspo-1234567: exit status 0, not requeued"
    return words


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_slurm_script_passes_arguments_and_gpus_on(tmp_path):
    words = start_slurm_script(tmp_path, "--config", "a b.yaml", "train.steps=3", SLURM_GPUS_ON_NODE="8")
    assert (option(words, "--nnodes"), option(words, "--nproc_per_node")) == ("2", "8")
    assert option(words, "--rdzv_endpoint") == f"{os.uname().nodename}:24567"
    assert words[0] == "OMP_NUM_THREADS=2"
    # The user's overrides come last, so that they win.
    program = ["-m", "gspo_megatron.train", "checkpoint.load=latest", "--config", "a b.yaml", "train.steps=3"]
    assert words[-len(program) :] == program


def test_slurm_script_without_gpus_uses_the_cores(tmp_path):
    words = start_slurm_script(tmp_path, "--config", "c.yaml")
    assert option(words, "--nproc_per_node") == "16"
    assert words[0] == "OMP_NUM_THREADS=1"


def test_slurm_script_gives_a_requeued_job_a_rendezvous_of_its_own(tmp_path):
    lives = [start_slurm_script(tmp_path), start_slurm_script(tmp_path, SLURM_RESTART_COUNT="1")]
    assert len({option(words, "--rdzv_id") for words in lives}) == 2


def test_docker_copies_what_exists_and_pins_what_is_tested():
    text = (ROOT / "Dockerfile").read_text()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists() and source.rstrip("/") in kept, source
    (version,) = re.findall(r"^ARG MEGATRON_CORE=(.+)$", text, re.MULTILINE)
    assert f"megatron-core=={version}\n" in (ROOT / "requirements/megatron-next.txt").read_text()
    (extras,) = re.findall(r'"/opt/gspo_megatron\[(.+)\]"', text)
    assert "te" in extras.split(",")
    (image,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert image in (ROOT / "docs/dependencies.md").read_text()


def test_license_is_apache_2_unchanged():
    """The digest is that of https://www.apache.org/licenses/LICENSE-2.0.txt."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
