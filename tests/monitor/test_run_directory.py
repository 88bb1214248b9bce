from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.base.metrics import Metric, merge, on_host, values
from gspo_megatron.config.loading import load_config
from gspo_megatron.monitor.run_directory import RunWriter

PARTS = [
    {
        "m": Metric(6.0, 3.0),
        "s": Metric(1.0, reduction="sum"),
        "lo": Metric(0.5, reduction="min"),
        "hi": Metric(0.5, reduction="max"),
    },
    {
        "m": Metric(0.0, 0.0),
        "s": Metric(0.0, reduction="sum"),
        "lo": Metric(math.inf, reduction="min"),
        "hi": Metric(-math.inf, reduction="max"),
    },
    {
        "m": Metric(-2.0, 1.0),
        "s": Metric(2.5, reduction="sum"),
        "lo": Metric(-0.25, reduction="min"),
        "hi": Metric(0.125, reduction="max"),
    },
]
"""Three micro-batches; the second has no tokens."""

REDUCED = {"m": 4.0 / 4.0, "s": 3.5, "lo": -0.25, "hi": 0.5}


def as_tensors(part: dict[str, Metric]) -> dict[str, Metric]:
    return {name: Metric(torch.tensor(m.total), torch.tensor(m.weight), m.reduction) for name, m in part.items()}


def test_every_reduction_of_numbers_and_tensors_in_any_order() -> None:
    for order in itertools.permutations(range(3)):
        for tensors in itertools.product([False, True], repeat=3):
            parts = [as_tensors(PARTS[i]) if tensors[i] else PARTS[i] for i in order]
            assert values(merge(parts)) == REDUCED, (order, tensors)
            assert values(on_host(merge(parts))) == REDUCED, (order, tensors)


@pytest.mark.parametrize("tensors", [False, True])
def test_merging_in_stages_is_merging_at_once(tensors: bool) -> None:
    """Micro-batches, then updates, then ranks."""
    parts: list[dict[str, Metric]] = [as_tensors(p) for p in PARTS] if tensors else list(PARTS)
    assert values(merge([on_host(merge(parts[:2])), on_host(merge(parts[2:]))])) == REDUCED


def test_tensors_stay_tensors_until_they_are_brought_to_the_host() -> None:
    merged = merge([as_tensors(PARTS[0]), PARTS[1], as_tensors(PARTS[2])])
    assert all(isinstance(m.total, torch.Tensor) for m in merged.values())
    assert all(type(m.total) is float and type(m.weight) is float for m in on_host(merged).values())


def test_a_mean_of_nothing_is_not_a_number_and_names_may_differ() -> None:
    merged = merge([{"a": Metric(0.0, 0.0)}, {"b": Metric(2.0, 4.0)}, {}])
    assert values(merged) == pytest.approx({"a": math.nan, "b": 0.5}, nan_ok=True)
    assert merge([]) == {}


def test_a_name_has_one_reduction() -> None:
    with pytest.raises(AssertionError, match="metric x has two reductions"):
        merge([{"x": Metric(1.0)}, {"x": Metric(1.0, reduction="max")}])


# --- the run directory ---


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_run(run_dir: Path, last: int) -> None:
    writer = RunWriter(run_dir, first_step=0)
    for step in range(last + 1):
        writer.metrics({"step": step, "loss": step / 2})
    writer.close()


@pytest.mark.parametrize(
    ("tail", "kept", "moved"),
    [
        (lambda text: text, [0, 1, 2], 3),
        (lambda text: text[:-1], [0, 1, 2], 3),
        (lambda text: text[:-9], [0, 1, 2], 3),
        (lambda text: text[: text.index('{"step": 3')], [0, 1, 2], 0),
        (lambda text: text[: text.index('{"step": 3') - 1], [0, 1, 2], 0),
        (lambda text: text[: text.index('{"step": 2') + 5], [0, 1], 1),
        (lambda text: "", [], 0),
    ],
    ids=["whole", "no newline", "cut row", "nothing to move", "last kept row without newline", "cut kept row", "empty"],
)
def test_a_continued_run_leaves_one_row_a_step(
    tmp_path: Path, tail: Callable[[str], str], kept: list[int], moved: int
) -> None:
    """The run went on to step 5 and died, perhaps while writing; it continues from the checkpoint of step 2."""
    write_run(tmp_path, last=5)
    path = tmp_path / "metrics.jsonl"
    path.write_text(tail(path.read_text()))
    writer = RunWriter(tmp_path, first_step=3)
    assert steps_in(path) == kept
    aside = tmp_path / "metrics.replaced.jsonl"
    assert (len(aside.read_text().splitlines()) if aside.exists() else 0) == moved
    writer.metrics({"step": 3, "loss": 9.0})
    assert steps_in(path) == [*kept, 3]


def test_rows_moved_aside_add_up_over_restarts(tmp_path: Path) -> None:
    write_run(tmp_path, last=3)
    for _ in range(2):
        RunWriter(tmp_path, first_step=2).metrics({"step": 2, "loss": 0.0})
    assert steps_in(tmp_path / "metrics.jsonl") == [0, 1, 2]
    assert steps_in(tmp_path / "metrics.replaced.jsonl") == [2, 3, 2]
    write_run(tmp_path, last=1)
    assert steps_in(tmp_path / "metrics.jsonl") == [0, 1]


def test_a_run_writes_its_settings_and_opens_where_it_continues(tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path / 'deep' / 'run'}", "logging.tensorboard=false", "run.seed=5"])
    first = RunWriter.of_run(config, first_step=0, fresh=True)
    for step in range(4):
        first.metrics({"step": step})
    assert load_config(first.run_dir / "config.yaml") == config
    RunWriter.of_run(config, first_step=2, fresh=False)
    assert steps_in(first.run_dir / "metrics.jsonl") == [0, 1]


def test_a_fresh_start_does_not_inherit_and_deletes_nothing(tmp_path: Path) -> None:
    """A checkpoint of an earlier run in the same directory must not be what a crash of this one continues from."""
    config = load_config(None, [f"run.dir={tmp_path}", "logging.tensorboard=false"])
    for number, step in enumerate((7, 8), 1):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / "latest").write_text(f"step_{step:06d}")
        RunWriter.of_run(config, first_step=step, fresh=False).rollouts(step, [])
        RunWriter.of_run(config, first_step=0, fresh=True)
        assert not (tmp_path / "checkpoints").exists()
        assert (tmp_path / f"checkpoints.replaced_{number}" / "latest").read_text() == f"step_{step:06d}"
        assert list((tmp_path / "rollouts").iterdir()) == []
        moved = [p.name for p in (tmp_path / f"rollouts.replaced_{number}").iterdir()]
        assert moved == [f"step_{step:06d}.jsonl"]


def test_rollouts_go_to_a_file_a_step(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, first_step=1)
    writer.rollouts(12, [{"text": "na\u00efve\n#### 7"}, {"text": ""}])
    writer.rollouts(12, [{"text": "again"}])
    writer.rollouts(13, [{"text": "na\u00efve\n#### 7"}, {"text": ""}])
    files = sorted(p.name for p in (tmp_path / "rollouts").iterdir())
    assert files == ["step_000012.jsonl", "step_000013.jsonl"]
    read = [json.loads(line) for line in (tmp_path / "rollouts" / files[1]).read_text(encoding="utf-8").splitlines()]
    assert read == [{"text": "na\u00efve\n#### 7"}, {"text": ""}]


def test_tensorboard_gets_every_number_under_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = RunWriter.of_run(load_config(None, [f"run.dir={tmp_path}"]), first_step=0, fresh=True)
    for step in range(3):
        writer.metrics({"step": step, "reward/mean": step / 4, "kl/ref": None, "tokens": 10 * step})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["reward/mean", "time/tokens"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(0, 0.0), (1, 0.25), (2, 0.5)]


def test_no_tensorboard_when_off(tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path}", "logging.tensorboard=false"])
    RunWriter.of_run(config, first_step=0, fresh=True).metrics({"step": 0})
    assert not (tmp_path / "tensorboard").exists()


def test_a_full_disk_is_an_error_with_the_file_and_what_to_do(tmp_path: Path) -> None:
    """/dev/full takes no byte. Afterwards the run continues: its rows are whole."""
    writer = RunWriter(tmp_path, first_step=0)
    writer.metrics({"step": 0})
    for path, write in (
        (tmp_path / "rollouts" / "step_000001.jsonl", lambda: writer.rollouts(1, [{"prompt": "x"}])),
        (tmp_path / "guards" / "bad.jsonl", lambda: writer.offenders("bad", [{"prompt": "x"}])),
    ):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to("/dev/full")
        with pytest.raises(ConfigError, match=rf"{path} cannot be written .*No space left.*checkpoint.load=latest"):
            write()
    (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written .*No space left"):
        writer.metrics({"step": 1})
    (tmp_path / "kept").replace(tmp_path / "metrics.jsonl")
    RunWriter(tmp_path, first_step=1).metrics({"step": 1})
    assert [json.loads(row)["step"] for row in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["a folder", "not UTF-8"])
def test_a_metrics_file_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written"):
        RunWriter(tmp_path, first_step=0)
