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
    named = [*metadata["install_requires"]]
    for name in ("dev", "code", "data", "json", "math", "plot", "remote", "server"):
        named += extras[name]
    for requirement in map(Requirement, named):
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
    assert {"venv", "demo", "test", "test-next", "check", "doctor", "gpu", "gpu-hour", "clean"} <= set(listed)
    for target in listed:
        run("make", "--dry-run", target)


@pytest.mark.parametrize(
    ("target", "folder", "selected"), [("test", ".venv", ""), ("test-next", ".venv-next", "--depends-on-megatron")]
)
def test_make_runs_the_suite_in_its_own_environment(target, folder, selected):
    commands = run("make", "--dry-run", "--always-make", target, "TORCH=torch==2.11.0", "ARGS=-k one").splitlines()
    workers = "-n logical --maxprocesses 8 --dist worksteal"
    assert commands[-1].split() == f"{folder}/bin/python -m pytest {workers} {selected} -k one".split()
    assert ".venv/bin/pip install torch==2.11.0" in commands
    assert not any("requirements/torch.txt" in command for command in commands)


def test_make_can_take_the_torch_that_is_there():
    commands = run("make", "--dry-run", "--always-make", "venv", "TORCH=system")
    assert "-m venv --system-site-packages .venv" in commands
    assert "pip install torch" not in commands and "requirements/torch.txt" not in commands


SLURM = ("train.sbatch", "train_served.sbatch", "common.sh", "site.sh")
SCRIPTS = (".ci/run", "examples/launch.sh", *(f"examples/slurm/{name}" for name in SLURM))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    run("bash", "-n", script)


def test_ci_can_be_started():
    assert (ROOT / ".ci/run").stat().st_mode & stat.S_IXUSR


DOCKERFILES = ("Dockerfile", "docker/Dockerfile.cpu")
KEPT = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}


def complaints_about(dockerfile: str) -> list[str]:
    """What a build of this text would stumble over, or ignore, as far as that shows without building it."""
    text = re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    found = []
    for word, rest in instructions:
        if word == "COPY":
            for source in rest.split()[:-1]:
                if not (ROOT / source).exists() or source.split("/")[0] not in KEPT:
                    found.append(f"COPY {source}: not there, or left out by .dockerignore")
        elif word == "ARG":
            name = rest.split("=")[0]
            if not re.search(rf"\$\{{?{name}\b", text):
                found.append(f"ARG {name}: nothing uses it")
    used = {word for word, _ in instructions}
    found += [f"no {word}" for word in ("FROM", "USER", "CMD") if word not in used]
    for module in re.findall(r"-m (gspo_megatron\.\w+|benchmarks\.\w+)", dockerfile):
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            found.append(f"python -m {module}: no such module")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found += [f"make {x}: no such target" for x in re.findall(r"\bmake[\", ]+([\w-]+)", text) if x not in targets]
    for path in re.findall(r"[\w/]*requirements/[\w.]+", text):
        if not (ROOT / "requirements" / path.split("/")[-1]).is_file():
            found.append(f"{path}: no such file")
    if "gspo_megatron.doctor --build" not in text:
        found.append("the image is not checked while it is built")
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_name_what_exists(name):
    assert complaints_about((ROOT / name).read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("COPY tools/", "COPY toolz/"),
        ("COPY LICENSE", "COPY CHANGELOG.md"),
        ("${MEGATRON_CORE}", "0.19.2"),
        ("gspo_megatron.doctor --build", "gspo_megatron.nurse --build"),
        ("gspo_megatron.doctor --build", "gspo_megatron.doctor"),
        ("requirements/pins.txt", "requirements/pinned.txt"),
        ("USER 65534", ""),
    ],
)
def test_each_mistake_in_a_dockerfile_is_found(old, new):
    text = (ROOT / "Dockerfile").read_text()
    assert old in text and complaints_about(text.replace(old, new))


def test_the_gpu_image_pins_what_is_tested():
    text = (ROOT / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(.+)$", text, re.MULTILINE))
    assert f"megatron-core=={arguments['MEGATRON_CORE']}\n" in (ROOT / "requirements/megatron-next.txt").read_text()
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", arguments["IMAGE"])
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", arguments["DIGEST"])
    (extras,) = re.findall(r'"/opt/gspo_megatron\[(.+)\]"', text)
    assert {"te", "hf"} <= set(extras.split(","))
    # The name of the image is nowhere else as an older tag.
    for page in (ROOT / "docs").glob("*.md"):
        assert set(re.findall(r"nvcr\.io/nvidia/pytorch:\S+?-py3", page.read_text())) <= {arguments["IMAGE"]}, page


def test_what_the_gpu_image_constrains(tmp_path):
    """Its own commands, run on the list of a package manager: torch stays, our pins without NumPy's count."""
    text = (ROOT / "Dockerfile").read_text()
    (command,) = re.findall(r"^RUN (pip list .*?)\n\n", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "pip").write_text("#!/bin/sh\nprintf 'numpy==2.1.0\\ntorch==2.13.0a0\\ntorchvision==1\\napex==0.1\\n'")
    (tmp_path / "pip").chmod(0o755)
    command = command.replace("/opt/gspo_megatron", str(ROOT)).replace("/opt/", f"{tmp_path}/")
    run("bash", "-c", command, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert (tmp_path / "keep.txt").read_text().split() == ["numpy==2.1.0", "torch==2.13.0a0", "apex==0.1"]
    pinned = {line.split("==")[0] for line in (tmp_path / "pins.txt").read_text().splitlines() if "==" in line}
    assert {"omegaconf", "safetensors", "transformers"} <= pinned and not pinned & {"numpy", "torch", "protobuf"}


def test_license_is_apache_2_unchanged():
    """The digest is that of https://www.apache.org/licenses/LICENSE-2.0.txt."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
