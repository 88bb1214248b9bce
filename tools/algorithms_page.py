"""Writes docs/algorithms.md from the tables of gspo_megatron/objective (`make docs`).

python tools/algorithms_page.py
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from gspo_megatron.objective.corrections import CORRECTIONS
from gspo_megatron.objective.dials import Clip, Correction, Dial, Level
from gspo_megatron.objective.kl import KL_ESTIMATORS
from gspo_megatron.objective.variants import DIALS, VARIANTS, Variant

PAGE = Path(__file__).parents[1] / "docs" / "algorithms.md"

HEAD = """\
# Algorithms and corrections

<!-- Written by `make docs` from gspo_megatron/objective: equations are the docstrings of the code behind them. -->

    loss = -aggregate(correction * clip(level(log pi(y_t) - log pi_old(y_t)), baseline(rewards))) + kl_coef * KL

An algorithm is a row: a level (what has a ratio), a clip or gate (each token's term), an aggregate (which mean over
tokens), a baseline (what a reward is compared with) and a weight for the KL term. `algorithm.variant=dapo` chooses one,
and the line `algorithm ...` at the start of a run, also of `--dry-run`, shows it with every parameter.

- A parameter of the row is set by `algorithm.dials.KIND.NAME`: `algorithm.dials.clip.ceiling=3`. `algorithm.clip_low`
  and `algorithm.clip_high` are short for `clip.low` and `clip.high`; `null` takes the row's.
- `algorithm.advantage` takes another baseline, `algorithm.kl_coef` another weight, and `algorithm.correction` adds a
  correction. Level, clip and aggregate belong to the row; other combinations are rows of your own
  ([how_to_add.md](how_to_add.md#an-algorithm)).
- Settings take finite numbers: where `inf` is a value below, 1e9 does the same.
- A clip range belongs to its level: a file with the range of one row keeps it when `algorithm.variant` changes. The run
  warns where it is too wide or too narrow, and refuses it where the clip has no bounds (`algorithm.clip_low=null`,
  `algorithm.clip_high=null`).

$s$ is the ratio that the level gives, A the advantage, y a response and |y| its length, R its reward, G the size of a
group. Numbers such as 2507.18071 are arXiv's.

## Algorithms
"""

KINDS = {
    "level": ("Levels", "What has a ratio, with the token's $w_t$ = pi(y_t) / pi_old(y_t)."),
    "clip": (
        "Clips and gates",
        """\
Each token's term, to be maximised. "Weight: w" stands for sg[w] A log pi(y_t): a policy gradient whose weight has no
gradient. p and p_old are the token's probabilities, whose ratio is p / p_old.""",
    ),
    "aggregate": ("Aggregates", "Which mean over the tokens of an update."),
    "baseline": (
        "Baselines",
        """\
`algorithm.advantage`: rewards become advantages, within a group or over the step. std is the sample's, which divides by
one less than the number of rewards, and no epsilon is added to it. Where all rewards agree to six digits, advantages
are 0. (`reward/std` of the metrics describes a step, and divides by the number.)""",
    ),
}
"""Heading and text of each kind of dial that rows have."""

KL = """\
## KL to the reference

`algorithm.kl_estimator`, with `algorithm.kl_coef` above 0. [stability.md](stability.md#kl-in-the-loss-or-in-the-reward)
says which gradient each has, in the loss and in the reward.
"""

CORRECTION = """\
## Corrections

`algorithm.correction` weighs every token by the ratio rho = pi_old / mu of the policy to the sampler mu: an engine,
another precision, or a policy some updates older. It goes with every row, and is refused with
`algorithm.old_log_probs=rollout`, where all ratios are 1. Tokens of weight 0 still count in the denominators of the
loss. `sampler/*` in [metrics.md](metrics.md) measures the distance without a correction, too.
"""

CHOICE = """\

A log-prob of the sampler that is NaN or infinite is taken for the policy's own, and `sampler/not_finite` counts it.

### Which one, when

What the field reports; [study.md](study.md#a-sampler-that-is-not-quite-the-policy) has what they did here. Of the
sources marked \\*, summaries and code were read, not the whole text.

- **Ratios of tokens, capped**, where an engine samples for a trainer: `token_tis`, usual cap 2
  (fengyao.notion.site/off-policy-rl \\*), or 5 (2512.01374, where training on-policy without these weights collapses).
  With FP8 rollouts, `token_tis` or `token_mis` (2601.18150 \\*).
- **Ratios of sequences**: `sequence_sum_tis` or `sequence_sum_mis`. The weights of single tokens leave a bias that
  grows with the square of the length; the product over the sequence has none, but a variance that grows exponentially
  with it (richardli.xyz/rl-collapse \\*, which recommends them). At 8,000 to 10,000 tokens such products were 0.06,
  which made GSPO's gradient 17 times smaller, while the geometric mean was 0.9999 (NeMo-RL, issue 2269):
  `sequence_tis`, `sequence_mis`.
- **Leaving tokens out** instead of capping them: `icepop`, beyond 0.5 and 5 (2510.18855 \\*).
- **Leaving sequences out**: `geometric_mask`, with the bounds of NeMo-RL (0.999 and 1.002 \\*), which are for responses
  of thousands of tokens: the mean of a short one spreads further, and most would be left out
  (`sampler/left_out_fraction`; the rule `left_out` warns). `off_policy_mask`, for bad responses only (2512.02556 \\*).
- **With `algorithm.routing_replay=R3`**, adding TIS did not help: 70.14 against 71.83 without (2510.11370 \\*).
- **Without any**: GSPO's paper expects the likelihood of a sequence to tolerate such differences (2507.18071, section
  5.4), and shows no experiment.
"""


def page() -> str:
    """The page: a table of rows, one for each kind of dial, one of KL estimators and one of corrections."""
    parts = [
        HEAD,
        *_table(
            ("Row", "Source", "Level", "Clip or gate", "Aggregate", "Baseline", "kl_coef", "Note"), map(_row, ROWS)
        ),
    ]
    for kind, (heading, text) in KINDS.items():
        cells = ([f"`{name}`", *_about(dial), _rows_with(kind, name)] for name, dial in DIALS[kind].items())
        parts += ["", f"## {heading}", "", text, "", *_table(("Name", "Equation", "Parameters", "Rows"), cells)]
    estimators = ([f"`{name}`", _first(estimator)] for name, estimator in KL_ESTIMATORS.items())
    parts += ["", KL, *_table(("Name", "Estimate"), estimators)]
    columns = ("Name", "Weight", "Ratio of", "Parameters, with defaults", "A token without a sampler's log-prob (NaN)")
    parts += ["", CORRECTION, *_table(columns, map(_correction, CORRECTIONS.values())), CHOICE]
    return "\n".join(parts)


ROWS = VARIANTS.values()


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Without columns that have no entry."""
    lines = [list(row) for row in rows]
    used = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    escaped = [" | ".join(line[i].replace("|", "\\|") for i in used) for line in lines]
    return [
        f"| {' | '.join(columns[i] for i in used)} |",
        "|" + "---|" * len(used),
        *(f"| {line} |" for line in escaped),
    ]


def _row(row: Variant) -> list[str]:
    source, note = (
        re.sub(r"arXiv:(\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", text) for text in (row.source, row.note)
    )
    dials = [row.level, row.clip, row.aggregate, row.baseline]
    return [f"`{row.name}`", source, *map(_with_parameters, dials), f"{row.kl_coef:g}", note]


def _with_parameters(dial: Dial) -> str:
    """`ppo`: low 0.2, high 0.2; without infinite ones, which have no effect."""
    given = [
        f"{name} {value:g}" + (f" (a run: `{dial.follows[name]}`)" if name in dial.follows else "")
        for name, value in dial.parameters().items()
        if math.isfinite(value)
    ]
    return f"`{dial.name}`" + (f": {', '.join(given)}" if given else "")


def _rows_with(kind: str, name: str) -> str:
    return ", ".join(f"`{row.name}`" for row in ROWS if row.dials[kind].name == name)


def _about(dial: type[Dial]) -> tuple[str, str]:
    """Equation, and parameters."""
    equation = _first(dial)
    if issubclass(dial, Clip) and dial.weighs_tokens:
        equation = f"Weight: {equation}"
    return equation, _ranges(dial)


def _first(described: object) -> str:
    """The first paragraph of a docstring: the equation."""
    return " ".join((inspect.getdoc(described) or "").split("\n\n")[0].split())


def _ranges(dial: type[Dial]) -> str:
    """What the docstring says of the parameters, and their defaults."""
    found = re.search(r"Attributes:\n(.*?)(\n\n|$)", inspect.getdoc(dial) or "", re.DOTALL)
    words = re.sub(r"^ {4}(\w[\w, ]*):", r"`\1`:", found[1], flags=re.MULTILINE) if found else ""
    defaults = {field.name: field.default for field in fields(dial) if field.default is not MISSING}
    usual = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
    return " ".join([*words.split(), *(["Default:", f"{usual}."] if usual else [])])


def _correction(correction: type[Correction]) -> list[str]:
    level = correction.ratio_of
    return [
        f"`{correction.name}`",
        _first(correction),
        f"`{level.name}`" if level else "",
        _settings(correction),
        _nan(level),
    ]


def _settings(correction: type[Correction]) -> str:
    shown = []
    for field in fields(correction):
        key = f"algorithm.dials.correction.{field.name}"
        if field.default is not MISSING:
            shown.append(f"`{key}={field.default:g}`")
        else:
            shown.append(f"`{key}={correction.such_as.get(field.name, '')}`, for example; no default")
    return ", ".join(shown)


NAN: Mapping[str, str] = {
    "token": "has the ratio 1",
    "sequence_mean": "counts with log-ratio 0 in the mean",
    "sequence_sum": "counts with log-ratio 0 in the sum",
}


def _nan(level: Level | None) -> str:
    return NAN[level.name] if level else ""


if __name__ == "__main__":
    PAGE.write_text(page())
