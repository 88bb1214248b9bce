from __future__ import annotations

from gspo_megatron.base.errors import did_you_mean, memory_size, plural, printable


def test_words_of_messages() -> None:
    assert [plural(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert plural(1, "process") == "1 process" and plural(1024, "process") == "1,024 processes"
    assert [memory_size(gib) for gib in (79.62, 0.1, 0.0117)] == ["79.6 GiB", "0.1 GiB", "12.0 MiB"]
    assert printable("\x1b[31mred\0\nÄ 中") == "\\x1b[31mred\\x00\nÄ 中"


def test_only_what_is_close_is_suggested() -> None:
    assert did_you_mean("solution", ["question", "answer"]) == ""
    assert did_you_mean("solutoin", ["question", "solution"]) == "; did you mean 'solution'?"
    assert did_you_mean("low", ["clip.low", "clip.high"]) == "; did you mean 'clip.low'?"
    assert did_you_mean("d", ["dapo", "dppo_tv"]) == did_you_mean("", ["dapo"]) == ""


def test_a_name_that_begins_so_is_suggested_ahead_of_one_that_looks_like_it() -> None:
    assert did_you_mean("dppo", ["gspo", "dapo", "dppo_tv", "dppo_kl"]) == "; did you mean 'dppo_tv'?"
    assert did_you_mean("step", ["step_timeout_s", "steps"]) == "; did you mean 'steps'?"
