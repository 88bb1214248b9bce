"""Writes docs/metrics.md from the table in gspo_megatron/monitor/catalogue.py (`make docs`).

python tools/metrics_page.py
"""

from __future__ import annotations

from pathlib import Path

from gspo_megatron.monitor.catalogue import CATALOGUE, board_name

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"

HEAD = """\
# Metrics

<!-- Written by `make docs` from gspo_megatron/monitor/catalogue.py. -->

A run appends a row a step to `metrics.jsonl`. A metric that has nothing to average is null: with all groups equal
there is no live sequence, and an entropy of 0 would read as collapse. *Live* sequences are those that an update trains
on: with `train.skip_zero_gradient`, those whose advantage is not 0, unless a KL, entropy or balancing term needs all.
Rewards, lengths and accuracy are over all rollouts. Numbers are over all processes, and do not depend on the layout,
except time and memory.

`NAME` is a reward function, `SET` a held-out set of eval.sets, `NN` a layer, from 01, or a number of responses. With
`logging.tensorboard` or `logging.wandb`, a metric is drawn under the name in the last column, grouped by what stands
before the slash. `python tools/plot_run.py RUN` draws a run without them.

`logging.wandb=PROJECT` needs the package (`pip install -e '.[wandb]'`) and an account (`wandb login`).
`WANDB_MODE=offline` keeps the run in `RUN/wandb`, for `wandb sync`. So does a run that finds no network or no account,
after 30 s at most, with a warning. A run that continues is the same run there, by its id in `RUN/wandb_id`;
metrics of steps that it repeats may stay as they were first, while `metrics.jsonl` has the newer ones.

| Key | What it is | What it warns of | Drawn as |
|---|---|---|---|
"""


def page() -> str:
    """The page: a line per entry."""
    rows = [
        "| "
        + " | ".join(
            (f"`{e.key}`", e.formula.replace("|", "\\|"), e.watch, f"`{board_name(e.key)}`" if e.board else "")
        )
        + " |"
        for e in CATALOGUE
    ]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
