r"""The reward `math`: its verdicts, what math-verify alone gets wrong, GSM8K, and texts that would never end."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.rewards.rewards import Rewards, score_rollouts

math_verify = pytest.importorskip("math_verify")

from gspo_megatron.rewards.math import VERDICTS, final_expression, math, verdict_of  # noqa: E402

GSM8K = Path(os.environ.get("GSM8K", Path(__file__).parents[2] / "data/gsm8k"))


def verdict(answer: str, response: str) -> str:
    parts = math(response=response, answer=answer)
    (found,) = [name for name in VERDICTS if parts[name]]
    assert parts["score"] == (found == "right")
    return found


def by_itself(answer: str, response: str) -> bool:
    """What math-verify says, as others call it."""
    return bool(math_verify.verify(math_verify.parse(answer), math_verify.parse(response)))


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("$1200$", r"\boxed{1,200}", "right"),
        ("$12$", r"\boxed{12\text{ cm}}", "right"),
        ("$0.12$", r"\boxed{12\%}", "right"),
        ("$A$", r"\boxed{A}", "right"),
        (r"$\text{(B)}$", r"\boxed{(B)}", "right"),
        ("B", r"\boxed{\text{C}}", "wrong"),
        ("$x=5$", r"\boxed{5}", "right"),
        ("5", r"so $\boxed{x=5}$.", "right"),
        (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", "right"),
        (r"$\frac12$", r"\boxed{\frac{2}{4}}", "right"),
        (r"$\frac12$", r"\boxed{\dfrac 12}", "right"),
        (r"$1\frac{1}{2}$", r"\boxed{\frac{3}{2}}", "right"),
        (r"$\sqrt2$", r"\boxed{\sqrt{2}}", "right"),
        (r"$\sqrt{8}$", r"\boxed{2\sqrt2}", "right"),
        (r"$\{1,2\}$", r"\boxed{\{2,1\}}", "right"),
        ("$(1,2)$", r"\boxed{(2,1)}", "wrong"),
        ("$(3,4]$", r"\boxed{(3,4)}", "wrong"),
        ("$x<5$", r"\boxed{(-\infty,5)}", "right"),
        (r"$\frac{x^2}{4}+\frac{y^2}{3}=1$", r"\boxed{\frac{x^2}{16}+\frac{y^2}{12}=1}", "wrong"),
        (r"$\text{Tuesday}$", r"\boxed{tuesday}", "right"),
        ("$479001600$", r"\boxed{12!}", "right"),
        ("$x^2$", r"\boxed{y^2}", "wrong"),
        ("$3+2i$", r"\boxed{2i+3}", "right"),
        (r"$\log_2 8$", r"\boxed{3}", "right"),
        (r"$90^\circ$", r"\boxed{90}", "right"),
        ("7", r"\boxed{8} ... wait, \boxed{7}", "right"),
        ("7", r"\boxed{7} or \boxed{8}", "wrong"),
        ("7", r"\boxed{7, 8, 9}", "wrong"),
        ("48+24=72\n#### 72", "So 72.\n#### 72", "right"),
        ("#### 72", r"#### 71 and \boxed{72}", "right"),
        ("#### 72", "#### 72 or 73", "wrong"),
        ("72", r"\boxed{72", "unparsed"),
        ("72", r"\boxed{}", "unparsed"),
        ("72", "72", "unparsed"),
        ("72", "", "unparsed"),
        ("$2+2$", r"\boxed{\frac{}{}}", "unparsed"),
    ],
)
def test_verdicts(answer: str, response: str, expected: str) -> None:
    assert verdict(answer, response) == expected


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        # It adds up digits after a fraction: log_2(11) is read as log_2(2).
        (r"$\frac{\pi}{12}+1$", r"\boxed{\frac{\pi}{12}+\log_{2}11}", False),
        (r"$\frac{1}{2}\cdot 5$", r"\boxed{\frac{1}{2}23}", False),
        # Any number of the text will do.
        ("$7$", r"I list: 1 2 3 4 5 6 7. \boxed{}", False),
        ("$7$", "answer: 7 apples and 9 pears", False),
        # The second thought and the first are a set.
        ("$7$", r"\boxed{8} ... wait, \boxed{7}", True),
        # Bases are ignored, and letters multiplied.
        ("$1011_2$", r"\boxed{1011_3}", False),
        ("$Eve$", r"\boxed{vEe}", False),
        (r"$\{1,2\}$", r"\boxed{(1,2)}", False),
    ],
)
def test_what_math_verify_gets_wrong_by_itself(answer: str, response: str, expected: bool) -> None:
    assert (verdict(answer, response) == "right") == expected
    assert by_itself(answer, response) != expected, "mended there: the guard here may go"


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("$12$", r"\boxed{12\%}", True),  # data sets leave the sign out
        (r"$\frac{1}{3}$", r"\boxed{0.333333}", True),  # 6 decimals are enough
        (r"$\frac{1}{3}$", r"\boxed{0.333}", False),
        ("$1011_2$", r"\boxed{1011}", True),
        (r"$e^{i\pi}$", r"\boxed{-1}", False),
        ("$1e3$", r"\boxed{1000}", False),  # in LaTeX, 1 times e times 3
    ],
)
def test_what_it_decides_otherwise_than_one_may_expect(answer: str, response: str, right: bool) -> None:
    """Known, and left to it."""
    assert (verdict(answer, response) == "right") == right == by_itself(answer, response)


def latex_pairs(count: int) -> list[tuple[str, str, bool]]:
    """(answer, response's box, whether they are equal), with fractions in front of numbers of several digits."""
    draw = random.Random(0)
    pairs = []
    for i in range(count):
        a, b, c = draw.randint(2, 9), draw.randint(11, 99), draw.randint(11, 99)
        forms = [
            (rf"\frac{{{a}}}{{{b}}}+{c}", rf"{c}+\frac{{{2 * a}}}{{{2 * b}}}", rf"\frac{{{a}}}{{{b}}}+{c + 1}"),
            (rf"\frac{{\pi}}{{{b}}}+\log_{{2}}{c}", rf"\log_{{2}}{c}+\frac{{\pi}}{{{b}}}", rf"\frac{{\pi}}{{{b}}}+1"),
            (rf"\sqrt{{{a * a * b}}}", rf"{a}\sqrt{{{b}}}", rf"{a + 1}\sqrt{{{b}}}"),
            (rf"x^2+{a}x+{b}", rf"{b}+{a}x+x^2", rf"x^2+{a}x+{b + 1}"),
            (rf"(-\infty,{b})\cup({b + c},\infty)", rf"(-\infty,{b})\cup({b + c},\infty)", rf"(-\infty,{b}]"),
            (rf"\{{{a},{b},{b + c}\}}", rf"\{{{b + c},{a},{b}\}}", rf"\{{{a},{b}\}}"),
        ]
        answer, same, other = forms[i % len(forms)]
        pairs.append((answer, same, True) if i // len(forms) % 2 else (answer, other, False))
    return pairs


def test_pairs_in_latex() -> None:
    wrong = [p for p in latex_pairs(72) if (verdict(f"${p[0]}$", rf"\boxed{{{p[1]}}}") == "right") != p[2]]
    assert wrong == []


PERTURBED = (
    *(
        "{n}",
        "{n}.0",
        "{n}.00",
        "+{n}",
        "-{n}",
        "{n}.5",
        "{n}0",
        "0{n}",
        " {n} ",
        r"\${n}",
        r"{n}\text{{ apples}}",
        "{n}!",
    ),
    *(r"\frac{{{n}}}{{1}}", r"\frac{{{n}}}{{2}}", "x={n}", "{n}+1", "{n}+0", r"{n}\cdot 1", "({n})", r"\text{{{n}}}"),
)


def test_perturbed_gsm8k_answers_are_judged_as_math_verify_does() -> None:
    """But for thousands separators, which it reads as a list, or not at all, in three of the forms."""
    assert len(PERTURBED) == 20
    boxes = [(number, form.format(n=number)) for number in ("18", "3", "70000", "125", "1,200") for form in PERTURBED]
    ours = {(number, box): verdict_of(box, number, 5) == "right" for number, box in boxes}
    theirs = {(number, box): by_itself(rf"\boxed{{{number}}}", rf"It is \boxed{{{box}}}.") for number, box in boxes}
    differing = [box for (number, box), right in ours.items() if right != theirs[number, box]]
    assert differing == ["+1,200", "01,200", r"\text{1,200}"] and sum(ours.values()) == 65


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K in {GSM8K}; set the variable GSM8K to its folder")
def test_every_written_solution_of_gsm8k_is_right() -> None:
    count = 0
    for name in ("train.jsonl", "test.jsonl"):
        for line in (GSM8K / name).read_text().splitlines():
            solution = json.loads(line)["answer"]
            assert verdict(solution, solution) == "right", solution
            boxed = rf"\boxed{{{final_expression(solution)}}}"
            assert verdict(solution, boxed) == "right"
            count += 1
    assert count == 7473 + 1319


HOSTILE = [
    "9^{9^{9^9}}",
    "10^7!",
    "((9!)!)!",
    r"\{" + ",".join(map(str, range(3000))) + r"\}",
    "(" * 1000 + "1" + ")" * 1000,
]


def test_a_text_that_would_never_end_is_timed_out() -> None:
    """In a run's own processes, with 2 GB."""
    rewards = Rewards({}, terms=[{"function": "math", "seconds": 0.5}], timeout_s=30, memory_gib=2)
    texts = [rf"\boxed{{{text}}}" for text in (*HOSTILE, r"\frac{14}{2}")]
    rollouts = [Rollout(i, Prompt(0, "", (2,), "x+7-x"), [3], [0.0], False, 0, text=t) for i, t in enumerate(texts)]
    score_rollouts(rewards, rollouts)
    rewards.close()
    assert [r.reward for r in rollouts] == [0.0] * len(HOSTILE) + [1.0]
    assert all(r.reward_lost or r.reward_terms["math/timed_out"] for r in rollouts[:-1])
    assert rollouts[-1].reward_terms == {"math": 1.0, **{f"math/{v}": float(v == "right") for v in VERDICTS}}


def test_an_answer_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError, match=r"the answer '\\\\frac\{\}\{\}' is nothing that math-verify can read"):
        math(response=r"\boxed{x}", answer=r"\frac{}{}")
