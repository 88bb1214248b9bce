"""Every setting is read somewhere: one that nothing reads would be ignored silently.

Tiny runs of the real command record which settings are read, and from where. A read that only checks, compares, copies
or prints a setting does not count.
"""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import fields, make_dataclass, replace
from typing import Any, get_type_hints

import pytest

from gspo_megatron import train
from gspo_megatron.config.declarations import setting, settings_of
from gspo_megatron.config.loading import load_config
from gspo_megatron.config.sections import Config, RunConfig
from gspo_megatron.models.shape import ModelShape
from gspo_megatron.testing import commands  # noqa: F401  (for the forked ranks)
from gspo_megatron.testing.local_ranks import run_distributed

CHECKS = ("gspo_megatron.build.checks", "gspo_megatron.build.engine_checks")
NO_USE = ("gspo_megatron.config.", *CHECKS, "dataclasses", "omegaconf.", "copy")
"""Beginnings of the names of modules that only check, compare, copy or print settings."""

UNREAD = {
    "model.preset": "load_config itself uses it: it names the defaults of its section",
    "model.hf_allow_nan": "only a run that starts from a folder (tests/checkpoint/test_hugging_face.py)",
    "checkpoint.allow_other_variant": "only a run that continues with another variant (tests/run/test_resume.py)",
    "guards.on_memory": "only a GPU has memory of its own (tests/test_train.py)",
    "rollout.max_lag": "only a run with engines (tests/rollout/test_buffer.py)",
    **{key: "only a run with engines (tests/build/test_engines.py)" for key in settings_of(Config) if "engine." in key},
}
"""Settings that these runs do not read, and why."""

TINY = (
    *("precision.device=cpu", "model.num_layers=1", "model.hidden_size=8", "model.num_experts=2"),
    *("model.expert_ffn_size=8", "model.max_sequence_length=12", "data.tokenizer=characters:0123456789>"),
    *("data.task.max_length=3", "data.eval_size=2", "rollout.max_new_tokens=4", "rollout.prompts_per_step=4"),
    *("rollout.group_size=2", "algorithm.updates_per_rollout=2", "train.warm_start_batch=2"),
)
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    # A checkpoint before the last step, a learning rate that decays, a gradient norm above the median of earlier ones.
    "long": (
        0,
        (
            *("train.steps=2", "train.warm_start_steps=8", "checkpoint.save_every=1", "train.eval_every=1"),
            *("optimizer.lr_decay=linear", "guards.grad_norm_spike=1.0001", "train.hf_every=1"),
        ),
    ),
    # Weights so large that the loss of the next update is not finite.
    "broken": (
        0,
        ("train.warm_start_steps=3", "train.warm_start_lr=1e37", "guards.on_nonfinite=skip", "train.steps=0"),
    ),
}
"""The runs: their exit status, and their settings besides TINY."""

FROZEN = Config.__dataclass_params__.frozen  # type: ignore[attr-defined]

RunWithForgotten = make_dataclass(
    "RunWithForgotten",
    [("forgotten", int, setting(0, "Nothing reads it."))],
    bases=(RunConfig,),
    frozen=FROZEN,
)


def note_reads(section: str, of: type, reads: set[str]) -> None:
    """Adds every use of a setting of the section to `reads` from now on."""
    names, own = {f.name for f in fields(of)}, of.__getattribute__

    def noting(self: Any, name: str) -> Any:
        reader = sys._getframe(1)
        module = reader.f_globals["__name__"]
        if name in names and not module.startswith(NO_USE):
            reads.add(f"{section}.{name}")
        return own(self, name)

    of.__getattribute__ = noting  # type: ignore[assignment, method-assign]


def settings_read(arguments: tuple[str, ...]) -> tuple[int, set[str]]:
    """(exit status, settings used) of `python -m gspo_megatron.train`. Changes this process for good."""
    reads: set[str] = set()
    for section, of in (get_type_hints(Config) | {"run": RunWithForgotten}).items():
        note_reads(section, of, reads)
    # A family reads its settings from the shape that ModelConfig makes of them.
    note_reads("model", ModelShape, reads)

    def with_forgotten(*given: Any) -> Config:
        config = load_config(*given)
        return replace(config, run=RunWithForgotten(**vars(config.run)))

    train.load_config = with_forgotten  # type: ignore[attr-defined]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return train.main(arguments), reads


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What the runs use."""
    used: set[str] = set()
    for name, (expected, settings) in RUNS.items():
        arguments = (*TINY, *settings, f"run.dir={tmp_path_factory.mktemp(name)}")
        ((status, found),) = run_distributed(settings_read, 1, arguments, like_torchrun=True)
        assert status == expected, name
        used |= found
    return used


def test_every_setting_is_read(reads: set[str]) -> None:
    assert settings_of(Config).keys() - reads - UNREAD.keys() == set()


def test_no_exception_outlives_its_need(reads: set[str]) -> None:
    assert UNREAD.keys() <= settings_of(Config).keys() - reads


def test_a_setting_that_nothing_reads_is_found(reads: set[str]) -> None:
    """The runs had one setting more than Config declares."""
    with_forgotten = make_dataclass("WithForgotten", [("run", RunWithForgotten)], bases=(Config,), frozen=FROZEN)
    assert settings_of(with_forgotten).keys() - reads - UNREAD.keys() == {"run.forgotten"}
