"""Rules of the architecture that no single file shows: which file imports what, and which names appear where.

A rule is a function from (file, source text) to complaints; every rule is also shown a text that breaks it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gspo_megatron.testing.rooms import COMMANDS, HEIGHT, PACKAGE, imports, imports_of_rooms, package_files, room_of

ROOT = Path(__file__).parents[1]
FILES = package_files()
ENTRY_POINTS = (*COMMANDS, "build")
"""They open the device, and then import Megatron-Core."""
LONGEST = 450
"""Lines of a file."""

DEVICE_WORDS = re.compile(r"(?<![a-z])(cuda|nccl|gloo|transformer_engine)(?![a-z])", re.IGNORECASE)
SETTING = re.compile(r"\bprecision\.\w+(=\w+)?")
"""A message may name a setting and its value: `precision.device=cuda`."""

DEVICE_NAMES_ALLOWED = {
    # What a user writes in the configuration, and what an entry point asks device/ about it.
    "config/sections.py": {"cuda", "transformer_engine"},
    "build/checks.py": {"cuda", "transformer_engine"},
    "build/trainer.py": {
        *("transformer_engine", "wants_transformer_engine", "uses_transformer_engine", "needs_transformer_engine"),
        "check_transformer_engine",
    },
    # Names of Megatron-Core's own, which nothing else can be called.
    "mcore/compat.py": {
        *("is_cuda", "_set_cuda_rng_state", "transformer_engine", "transformer_engine.pytorch.fp8"),
        "check_transformer_engine",
    },
    "mcore/groups.py": {"create_gloo_process_groups"},
    "mcore/layers.py": {"use_transformer_engine"},
    "mcore/model.py": {"model_parallel_cuda_manual_seed"},
    "mcore/try_te.py": {"check_transformer_engine"},
    "mcore/optimizer.py": {"use_gloo_process_groups"},
    # Ranks of a test meet through it.
    "testing/local_ranks.py": {"gloo"},
}


def words(source: str) -> Iterator[str]:
    """Names and text constants in code, without docstrings (a text that stands alone as a statement) and comments."""
    tree = ast.parse(source)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield SETTING.sub("", node.value)
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


# --- the rules ---


def imports_only_lower_layers(file: str, source: str) -> list[str]:
    """A file imports its own folder and lower floors. `gspo_megatron` itself holds the version, for everyone."""
    unit = room_of(file)
    if file == "__init__.py":
        return [f"imports {name}" for name, _ in imports(file, source) if name.startswith(PACKAGE)]
    if unit not in HEIGHT or ("/" not in file and unit not in COMMANDS):
        return ["is in no layer: the package root holds commands only, and every folder has a floor in LAYERS"]
    complaints = []
    for other, name in imports_of_rooms(file, source):
        if other not in HEIGHT:
            complaints.append(f"imports {name}, which is in no layer")
        elif HEIGHT[other] >= HEIGHT[unit] and unit != "testing":
            complaints.append(f"imports {name}, which is not below it")
    return complaints


def no_file_is_crowded(file: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"has {lines} lines, more than {LONGEST}"] if lines > LONGEST else []


def one_library_in_its_room(file: str, source: str) -> list[str]:
    """Formats of other people's files are read in the rooms that are for it."""
    if room_of(file) in ("data", "checkpoint", "rewards"):
        return []
    found = {name.split(".")[0] for name, _ in imports(file, source)}
    return [f"imports {name}" for name in sorted(found & {"transformers", "safetensors"})]


def megatron_only_in_mcore(file: str, source: str) -> list[str]:
    if room_of(file) == "mcore":
        return []
    return [f"imports {name}" for name, _ in imports(file, source) if name.split(".")[0] == "megatron"]


def mcore_only_inside_entry_points(file: str, source: str) -> list[str]:
    """The device has to be open before Megatron is imported, and the trainer runs without it."""
    unit = room_of(file)
    if unit in ("mcore", "testing"):
        return []
    found = [(name, waits) for name, waits in imports(file, source) if name.startswith(f"{PACKAGE}.mcore")]
    return [f"imports {name}, outside a function" for name, waits in found if not (unit in ENTRY_POINTS and waits)]


def device_named_only_in_device(file: str, source: str) -> list[str]:
    if room_of(file) == "device":
        return []
    allowed = DEVICE_NAMES_ALLOWED.get(file, set())
    return [f"says {word!r}" for word in words(source) if DEVICE_WORDS.search(word) and word not in allowed]


def no_global_statement(file: str, source: str) -> list[str]:
    return [f"line {node.lineno}: global" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Global)]


def environment_only_in_device_and_entry_points(file: str, source: str) -> list[str]:
    if room_of(file) in ("device", "testing", *ENTRY_POINTS):
        return []
    return [f"reads {word}" for word in words(source) if word.split(".")[-1] in ("environ", "environb", "getenv")]


RULES = (
    imports_only_lower_layers,
    no_file_is_crowded,
    one_library_in_its_room,
    megatron_only_in_mcore,
    mcore_only_inside_entry_points,
    device_named_only_in_device,
    no_global_statement,
    environment_only_in_device_and_entry_points,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_every_rule(rule: Callable[[str, str], list[str]]) -> None:
    assert len(FILES) > 60
    complaints = {file: rule(file, path.read_text()) for file, path in FILES.items()}
    assert {file: found for file, found in complaints.items() if found} == {}


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (imports_only_lower_layers, "base/batches.py", "from gspo_megatron.config.sections import Config"),
        (imports_only_lower_layers, "config/sections.py", "from gspo_megatron.device import Device"),
        (imports_only_lower_layers, "device/cpu.py", "import gspo_megatron.monitor.console"),
        (imports_only_lower_layers, "objective/loss.py", "from gspo_megatron import data"),
        (imports_only_lower_layers, "log_probs/rows.py", "def f():\n    from gspo_megatron.objective import segments"),
        (imports_only_lower_layers, "data/packing.py", "from ..rewards.rewards import Rewards"),
        (imports_only_lower_layers, "mcore/policy.py", "from gspo_megatron.run.trainer import Trainer"),
        (imports_only_lower_layers, "run/trainer.py", "from gspo_megatron.mcore.policy import MegatronPolicy"),
        (imports_only_lower_layers, "rollout/source.py", "from gspo_megatron.run.state import RunState"),
        (imports_only_lower_layers, "run/trainer.py", "from gspo_megatron.build.inputs import load_inputs"),
        (imports_only_lower_layers, "run/trainer.py", "from gspo_megatron.newcomer import x"),
        (imports_only_lower_layers, "newcomer.py", "import json"),
        (imports_only_lower_layers, "testing.py", "import json"),
        (imports_only_lower_layers, "newcomer/file.py", "import json"),
        (imports_only_lower_layers, "__init__.py", "from gspo_megatron.base.batches import Prompt"),
        (no_file_is_crowded, "run/trainer.py", "x = 1\n" * (LONGEST + 1)),
        (one_library_in_its_room, "build/inputs.py", "from transformers import AutoTokenizer"),
        (one_library_in_its_room, "mcore/saving.py", "def f():\n    import safetensors.torch"),
        (megatron_only_in_mcore, "run/trainer.py", "import megatron.core"),
        (megatron_only_in_mcore, "train.py", "def f():\n    from megatron import core"),
        (megatron_only_in_mcore, "device/cpu.py", "from megatron.core.optimizer import clip_grads"),
        (mcore_only_inside_entry_points, "train.py", "from gspo_megatron.mcore import compat"),
        (mcore_only_inside_entry_points, "train.py", "if True:\n    import gspo_megatron.mcore.policy"),
        (mcore_only_inside_entry_points, "run/trainer.py", "def f():\n    from gspo_megatron.mcore import policy"),
        (device_named_only_in_device, "run/trainer.py", "torch.cuda.synchronize()"),
        (device_named_only_in_device, "log_probs/linear.py", "x.to('cuda:0')"),
        (device_named_only_in_device, "log_probs/linear.py", "if x.is_cuda: pass"),
        (device_named_only_in_device, "mcore/groups.py", "new_group(backend='nccl')"),
        (device_named_only_in_device, "mcore/model.py", "import transformer_engine.pytorch as te"),
        (device_named_only_in_device, "mcore/model.py", "from megatron.core.extensions import transformer_engine"),
        (device_named_only_in_device, "mcore/model.py", "f(use_gloo_process_groups=True)"),
        (device_named_only_in_device, "base/metrics.py", "name = 'CUDA'"),
        (device_named_only_in_device, "base/metrics.py", "def wait_for_cuda(): ..."),
        (
            device_named_only_in_device,
            "layout/memory.py",
            "message = 'precision.device=cuda asks torch.cuda for a device'",
        ),
        (no_global_statement, "device/cpu.py", "def f():\n    global x\n    x = 1"),
        (environment_only_in_device_and_entry_points, "config/sections.py", "import os\nos.environ.get('HOME')"),
        (environment_only_in_device_and_entry_points, "mcore/groups.py", "from os import getenv"),
    ],
)
def test_every_rule_can_fail(rule: Callable[[str, str], list[str]], file: str, source: str) -> None:
    assert rule(file, source)


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        (imports_only_lower_layers, "layout/memory.py", "from gspo_megatron.config.sections import Config"),
        (imports_only_lower_layers, "mcore/saving.py", "from gspo_megatron import __version__"),
        (
            imports_only_lower_layers,
            "objective/loss.py",
            "from .levels import LEVELS\nfrom gspo_megatron.base.metrics import Metric",
        ),
        (megatron_only_in_mcore, "run/trainer.py", "import gspo_megatron.base.metrics, megatronic"),
        (mcore_only_inside_entry_points, "train.py", "def f():\n    from gspo_megatron.mcore import policy"),
        (
            device_named_only_in_device,
            "layout/memory.py",
            '"""On cuda."""\nx = 1  # gloo\ny = "set precision.device=cuda, barracuda"',
        ),
        (device_named_only_in_device, "mcore/compat.py", "if x.is_cuda: pass"),
        (environment_only_in_device_and_entry_points, "train.py", "os.environ['RANK']"),
    ],
)
def test_no_rule_complains_about_what_is_allowed(rule: Callable[[str, str], list[str]], file: str, source: str) -> None:
    assert rule(file, source) == []


def test_no_exception_outlives_its_need() -> None:
    for file, allowed in DEVICE_NAMES_ALLOWED.items():
        assert allowed <= set(words(FILES[file].read_text())), file


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, {PACKAGE}; print([m for m in ('torch', 'megatron', 'numpy', 'omegaconf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
