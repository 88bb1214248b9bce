"""tools/check_layout.py: how a layout is written, what makes a large run small, what counts as equal, and the command.

That the comparison notices wrong numbers is in test_mutations.py; that the package's numbers are right on every layout,
in test_layout_grid.py.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check_layout import (
    AXES,
    FIXED,
    ON_CPU,
    SMALL,
    LayoutRequest,
    Report,
    compare,
    main,
    reduced,
    shrunk,
    task_instead,
    with_shallow_stages,
)
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.inputs import settle
from gspo_megatron.config.loading import load_config
from gspo_megatron.models.counts import count_parameters
from gspo_megatron.testing.time_limits import time_factor

# ---------------------------------------------------------------------------------------------------- writing a layout


def test_a_layout_is_what_is_written() -> None:
    asked = LayoutRequest.parse("tp=2, pp=4,vpp=3 ,ep=8,etp=2,cp=2,dp=16")
    assert asked == LayoutRequest(dp=16, tp=2, pp=4, vpp=3, cp=2, ep=8, etp=2)
    # Virtual stages and experts take no ranks of their own.
    assert asked.world_size == 16 * 2 * 4 * 2
    assert str(asked) == "dp=16 tp=2 pp=4 vpp=3 cp=2 ep=8 etp=2"
    parallel = load_config(None, asked.overrides).parallel
    assert {axis: getattr(parallel, axis) for axis in AXES} == {axis: getattr(asked, axis) for axis in AXES}
    assert str(LayoutRequest.parse("dp=1")) == "one process" and str(LayoutRequest.parse("dp=3")) == "dp=3"


@pytest.mark.parametrize("text", ["", "tp", "tp=two", "tp=2;pp=2", "sp=2", "tp=2,", "tp=0", "dp=-2", "tp=2,tp=4"])
def test_a_layout_that_says_nothing_clear_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^layout {text!r}: write it as tp=2,pp=2,dp=4"):
        LayoutRequest.parse(text)


# ------------------------------------------------------------------------------------------------- fewer processes


@pytest.mark.parametrize(
    ("asked", "max_processes", "expected"),
    [
        ("tp=2,pp=2,ep=8,dp=16", 64, "dp=16 tp=2 pp=2 ep=8"),
        ("tp=2,pp=2,ep=8,dp=16", 63, "dp=8 tp=2 pp=2 ep=8"),
        ("tp=2,pp=2,ep=8,dp=16", 8, "dp=2 tp=2 pp=2 ep=4"),
        ("tp=8,pp=4,cp=2,ep=8,dp=2", 16, "dp=2 tp=2 pp=2 cp=2 ep=8"),
        ("tp=4,pp=4,vpp=3,etp=4,dp=4", 16, "dp=2 tp=4 pp=2 vpp=3 etp=4"),
        # Three data-parallel ranks would be fewer, but could not share two halves of the experts.
        ("ep=2,dp=6", 4, "dp=2 ep=2"),
        ("ep=2,dp=6", 3, "dp=2 ep=2"),
        ("dp=7", 7, "dp=7"),
    ],
)
def test_a_layout_is_reduced_from_dp_on(asked: str, max_processes: int, expected: str) -> None:
    assert str(reduced(LayoutRequest.parse(asked), max_processes)) == expected


def test_every_axis_stays_or_the_error_says_what_that_takes() -> None:
    for dp, tp, pp, cp, ep, etp in itertools.product((1, 4, 6), (1, 2, 4), (1, 4), (1, 2), (1, 2, 3), (1, 2)):
        asked = LayoutRequest(dp=dp, tp=tp, pp=pp, vpp=2, cp=cp, ep=ep, etp=etp)
        if asked.world_size // asked.pp % (asked.ep * asked.etp):
            continue
        for limit in (1, 4, 8):
            try:
                small = reduced(asked, limit)
            except ConfigError as error:
                needed = re.fullmatch(
                    f"layout {asked} needs (\\d+) processes to keep every axis above 1, more than --max-processes "
                    f"{limit}; raise it, or check the axes in two layouts",
                    str(error),
                )
                assert needed
                assert limit < int(needed[1]) == reduced(asked, int(needed[1])).world_size
            else:
                assert small.world_size <= limit
                assert small.world_size // small.pp % (small.ep * small.etp) == 0
                for axis in ("dp", *AXES):
                    before, after = getattr(asked, axis), getattr(small, axis)
                    assert before % after == 0 and (after > 1) == (before > 1)


# --------------------------------------------------------------------------------------------------- a smaller model


@pytest.mark.parametrize(
    ("preset", "reference", "layout"),
    [
        ("qwen3_30b_a3b", "dp=1", "dp=2"),
        ("qwen3_30b_a3b", "dp=1", "tp=8,pp=4,cp=2,ep=8,dp=2"),
        ("qwen3_30b_a3b", "tp=3,cp=2", "tp=2,etp=2,cp=3,dp=2"),
        ("qwen3_235b_a22b", "tp=2,pp=3,ep=2", "tp=2,pp=2,vpp=3,cp=2,ep=4,etp=2,dp=4"),
        ("qwen3_235b_a22b", "dp=1", "ep=64,dp=64"),
    ],
)
def test_a_shrunk_model_fits_both_layouts(preset: str, reference: str, layout: str) -> None:
    """The layout that was asked for, and the reduced one."""
    base = [f"model.preset={preset}", "train.tokens_per_micro_batch=32768", *FIXED]
    large = load_config(None, base)
    for asked in (LayoutRequest.parse(layout), reduced(LayoutRequest.parse(layout), 16)):
        both = (LayoutRequest.parse(reference), asked)
        settings = [*base, *shrunk(large, both), *task_instead(), *ON_CPU]
        for one in both:
            config = load_config(None, [*settings, *one.overrides])
            m = settle(config, one.world_size).config.model
            assert count_parameters(m.shape).total < SMALL
            # There is more than one of everything, and a choice to make.
            assert m.num_layers > 1 and m.num_attention_heads > m.num_query_groups > 1
            assert 1 < m.experts_per_token < m.num_experts


# ------------------------------------------------------------------------------------------------------- what is equal


def report(**changes: object) -> Report:
    """Two rollouts, four metrics, two gradients of one layout, with some of them changed."""
    parts = {
        "rollouts": [(0, [5, 1], [-0.5, -1.0]), (1, [7], [-0.25])],
        "metrics": {"loss": 1e-3, "grad_norm": 2.0, "kl/old": 1e-7, "tokens": 3.0},
        "gradients": {"a": torch.tensor([[1.0, -4.0], [0.5, 0.0]], dtype=torch.float64), "b": zeros()},
        "replicas": {"a": 0.0, "b": 0.0},
    }
    return Report(**(parts | changes))  # type: ignore[arg-type]


def zeros() -> Tensor:
    return torch.zeros(3, dtype=torch.float64)


def gradients(a: float = 0.0, b: float = 0.0) -> dict[str, Tensor]:
    """Those of `report` with a number added to one element of each."""
    changed = {name: gradient.clone() for name, gradient in report().gradients.items()}
    changed["a"][1, 1] += a
    changed["b"][2] += b
    return changed


def test_everything_has_a_row() -> None:
    rows = compare(report(), report(), "fp64")
    names = ["rollouts that differ", "grad_norm", "kl/old", "loss", "tokens"]
    assert [row.name for row in rows[:5]] == names
    assert {row.name for row in rows[5:]} == {"a", "b", "a, between ranks", "b, between ranks"} and len(rows) == 9
    assert all(row.ok and row.difference == 0 for row in rows)
    assert [(row.reference, row.layout) for row in rows[1:3]] == [(2.0, 2.0), (1e-7, 1e-7)]


@pytest.mark.parametrize(
    ("changes", "name", "difference", "dtype"),
    [
        # Relative to the gradient's largest element, whatever the changed one is.
        ({"gradients": gradients(a=1e-6)}, "a", 1e-6 / 4, "fp64"),
        ({"gradients": gradients(a=1e-3)}, "a", 1e-3 / 4, "fp32"),
        ({"gradients": gradients(b=1e-300)}, "b", math.inf, "fp64"),
        ({"gradients": gradients(a=math.nan)}, "a", math.inf, "fp64"),
        ({"gradients": gradients(b=math.nan)}, "b", math.inf, "fp64"),
        ({"replicas": {"a": 0.0, "b": 1e-9}}, "b, between ranks", 1e-9, "fp64"),
        # Relative, and for what may be next to nothing absolute.
        ({"metrics": report().metrics | {"loss": 1e-3 + 1e-9}}, "loss", 1e-6, "fp64"),
        ({"metrics": report().metrics | {"loss": 1e-3 + 1e-7}}, "loss", 1e-4, "fp32"),
        ({"metrics": report().metrics | {"grad_norm": 2.0 + 2e-5}}, "grad_norm", 1e-5, "fp64"),
        ({"metrics": report().metrics | {"kl/old": 1e-7 + 1e-11}}, "kl/old", 1e-11, "fp64"),
        ({"metrics": report().metrics | {"tokens": 4.0}}, "tokens", 1 / 3, "fp64"),
        ({"metrics": report().metrics | {"tokens": math.nan}}, "tokens", math.nan, "fp64"),
        ({"rollouts": [(0, [5, 2], [-0.5, -1.0]), (1, [7], [-0.25])]}, "rollouts that differ", 1, "fp64"),
    ],
)
def test_one_difference_is_one_row(changes: dict[str, object], name: str, difference: float, dtype: str) -> None:
    differing = [row for row in compare(report(), report(**changes), dtype) if not row.ok]
    assert [row.name for row in differing] == [name]
    assert differing[0].difference == pytest.approx(difference, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"gradients": gradients(a=1e-12)}, "fp64"),
        ({"gradients": gradients(a=1e-4)}, "fp32"),
        ({"metrics": report().metrics | {"kl/old": 1e-7 + 1e-14}}, "fp64"),
        # Megatron-Core sums it in float32.
        ({"metrics": report().metrics | {"grad_norm": 2.0 + 1e-7}}, "fp64"),
        # A log-prob of the sampler is no part of the comparison: the update is made from the same ones.
        ({"rollouts": [(0, [5, 1], [-0.5, -1.5]), (1, [7], [-0.25])]}, "fp64"),
        # Below float64 a rounded log-prob may decide for another token.
        ({"rollouts": [(0, [5, 2], [-0.5, -1.0]), (1, [7], [-0.25])]}, "fp32"),
    ],
)
def test_rounding_is_no_difference(changes: dict[str, object], dtype: str) -> None:
    assert all(row.ok for row in compare(report(), report(**changes), dtype))


def test_the_worst_gradient_comes_first() -> None:
    rows = compare(report(), report(gradients=gradients(a=1e-6), replicas={"a": 1e-9, "b": 1e-3}), "fp64")[5:]
    assert [row.name for row in rows] == ["b, between ranks", "a", "a, between ranks", "b"]


# --------------------------------------------------------------------------------------------------------- the command

CONFIG = """
model: {num_layers: 2, hidden_size: 16, num_attention_heads: 4, num_query_groups: 2, head_dim: 8, num_experts: 4,
        expert_ffn_size: 16, max_sequence_length: 24, init_std: 0.2}
data: {train: "task:sort_digits", eval: "task:sort_digits", task: {min_length: 1, max_length: 6}, eval_size: 4,
       tokenizer: "characters:0123456789>"}
rollout: {prompts_per_step: 4, group_size: 4, max_new_tokens: 8}
train: {tokens_per_micro_batch: 512}
"""

# A run of 64 GPUs: its files, rewards and number formats are out of reach here.
LARGE = """
model: {preset: qwen3_30b_a3b}
precision: {dtype: bf16, fp8: blockwise, transformer_engine: "on"}
data: {train: math.jsonl, eval: math.jsonl, prompt_field: question, prompt_template: "Q: {prompt}",
       tokenizer: qwen.model, max_prompt_tokens: 2048, overlong: drop}
reward: {functions: {"my_rewards:grade": 1.0}, accuracy: "my_rewards:grade"}
rollout: {prompts_per_step: 512, group_size: 16, max_new_tokens: 8192}
algorithm: {updates_per_rollout: 8}
train: {tokens_per_micro_batch: 32768}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_the_command_prints_a_table_and_nothing_else(config: str) -> None:
    """The real one, in processes of its own: what Megatron-Core and torch have to say at their import stays out. The
    run's own layout, here of two processes, has no part in it."""
    root = Path(__file__).parents[2]
    with open(config, "a") as file:
        file.write("parallel: {ep: 2}\n")
    done = subprocess.run(
        [sys.executable, root / "tools" / "check_layout.py", "--config", config, "--layout", "tp=2", "--worst", "3"],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120 * time_factor(),
    )
    assert (done.returncode, done.stderr) == (0, "")
    reference, layout, *table = done.stdout.splitlines()
    assert reference.startswith("reference: 1 process = tp 1 ") and layout.startswith("layout: 2 processes = tp 2 ")
    assert {"rollouts", "loss", "grad_norm", "log_probs", "entropy"} <= {line.split(" ")[0] for line in table}
    worst = table[table.index(next(line for line in table if line.startswith("gradients of 33 parameters"))) + 1 :]
    assert len(worst) == 5 and worst[-2:] == ["", "EQUAL"]
    assert re.fullmatch(r"\S+.* \d\.\de-\d\d +1e-12", worst[0])


def test_a_layout_that_changes_the_gradient_is_found_out(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron-Core's load-balancing loss is a mean over micro-batches of something that is not linear in them."""
    assert main(["--config", config, "--layout", "dp=2", "model.aux_loss_coef=0.1"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"router\.weight +\S+ +1e-12  <-- differs\n", out)
    assert re.search(r"\nNOT EQUAL: \d+ of \d+ comparisons, worst decoder\.layers\.\S+\n$", out)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layout", "tp=3"], "ConfigError: model.num_attention_heads=4 is not divisible by tp(3); nearest layouts"),
        (["--layout", "dp=2", "--reference", "ep=2"], "ConfigError: etp(1) * ep(2) * pp(1) = 2 does not divide the 1 "),
        (["--layout", "tp=2,pp=2", "--max-processes", "3"], "ConfigError: layout tp=2 pp=2 needs 4 processes to keep"),
        (["--layout", "dp=2", "precision.dtype=fp16"], "ConfigError: precision.dtype=fp16 is not offered"),
        (["--layout", "dp=2", "data.train=missing.jsonl"], "DataError: "),
        (["--layout", "dp=2", "model.init_std=1e300"], "RankError: rank 0 of 1: Traceback"),
    ],
)
def test_what_cannot_work_is_said(
    arguments: list[str], complaint: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", config, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(complaint)
    assert "difference" not in printed.out


UNEVEN = """
model: {num_layers: 5, hidden_size: 16, num_attention_heads: 2, num_query_groups: 2, head_dim: 8, num_experts: 4,
        expert_ffn_size: 16, max_sequence_length: 24, init_std: 0.2}
parallel: {pp: 2, first_stage_layers: 3}
data: {train: "task:sort_digits", eval: "task:sort_digits", task: {min_length: 1, max_length: 6}, eval_size: 4,
       tokenizer: "characters:0123456789>"}
rollout: {prompts_per_step: 4, group_size: 4, max_new_tokens: 8}
train: {tokens_per_micro_batch: 48}
"""


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        # The config's own layout.
        ([], "pp 2 (first 3 layers)"),
        (["--layout", "pp=2,last=4"], "pp 2 (last 4 layers)"),
        (["--layout", "pp=2,first=2,last=3"], "pp 2 (first 2 layers, last 3 layers)"),
        (["--layout", "pp=2,vpp=2,first=2", "model.num_layers=6"], "pp 2 (vpp 2, first 2 layers)"),
        (["--layout", "pp=3,first=1,last=2"], "pp 3 (first 1 layer, last 2 layers)"),
        (["--layout", "pp=3,vpp=2,last=4", "model.num_layers=8"], "pp 3 (vpp 2, last 4 layers)"),
    ],
)
def test_stages_of_unequal_depth_change_no_gradient(
    arguments: list[str], stages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "uneven.yaml"
    path.write_text(UNEVEN)
    assert main(["--config", str(path), *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"= tp 1 x {stages} x cp 1 x dp 1" in printed and printed.endswith("\nEQUAL\n")


def test_a_run_has_a_layout_of_its_own() -> None:
    """With the fewest data-parallel ranks that hold its experts."""
    settings = ("tp=2", "pp=8", "ep=32", "first_stage_layers=11", "last_stage_layers=11")
    config = load_config(None, [f"parallel.{setting}" for setting in settings])
    assert str(LayoutRequest.of_run(config)) == "dp=16 tp=2 pp=8 ep=32 first=11 last=11"


@pytest.mark.parametrize(
    ("asked", "smaller", "expected", "num_layers"),
    [
        ("pp=8,first=11,last=11", "pp=8", "pp=8 first=1 last=1", 14),
        ("pp=8,first=11,last=11", "pp=4", "pp=4 first=1 last=1", 6),
        ("pp=8,first=11,last=11", "pp=2", "pp=2 first=1 last=2", 3),
        ("pp=8,vpp=2,first=12,last=10", "pp=4,vpp=2", "pp=4 vpp=2 first=4 last=2", 14),
        ("pp=2,first=50", "pp=2", "pp=2 first=2 last=1", 3),
    ],
)
def test_what_is_uneven_stays_uneven(asked: str, smaller: str, expected: str, num_layers: int) -> None:
    found, layers = with_shallow_stages(LayoutRequest.parse(asked), LayoutRequest.parse(smaller), 94)
    assert (str(found), layers) == (expected, num_layers)


def test_a_layout_for_64_gpus_is_checked_by_8_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "large.yaml"
    path.write_text(LARGE)
    assert main(["--config", str(path), "--layout", "tp=2,pp=2,ep=8,dp=16", "--max-processes", "8"]) == 0
    printed = capsys.readouterr().out
    assert "layout dp=16 tp=2 pp=2 ep=8 is reduced to dp=2 tp=2 pp=2 ep=4, for --max-processes 8\n" in printed
    assert "the model has more than 20,000,000 parameters and is shrunk: model.num_layers=2 " in printed
    assert "layout: 8 processes = tp 2 x pp 2 x cp 1 x dp 2; experts: ep 4 x etp 1 x edp 1, fp64\n" in printed
    assert printed.endswith("\nEQUAL\n")


@pytest.mark.parametrize("layout", ["tp=2,etp=2", "pp=2", "cp=2", "dp=2,ep=2"])
def test_latent_attention_and_its_router_are_equal_on_every_axis(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipeline's first stage holds the dense layer."""
    path = tmp_path / "run.yaml"
    path.write_text(
        CONFIG.replace(CONFIG[: CONFIG.index("data:")], "model: {preset: tiny_mla, max_sequence_length: 24}\n")
    )
    assert main(["--config", str(path), "--layout", layout, "model.num_layers=2", "model.hidden_size=24"]) == 0
    assert capsys.readouterr().out.endswith("\nEQUAL\n")


def test_layouts_of_other_overrides_are_measured_alike(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Another reference than one process, and float32."""
    arguments = ["--layout", "pp=2", "--reference", "dp=2", "precision.dtype=fp32", "algorithm.variant=dapo"]
    assert main(["--config", config, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "reference: 2 processes = tp 1 x pp 1 x cp 1 x dp 2" in printed and printed.count(", fp32\n") == 2
