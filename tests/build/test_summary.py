"""What a run says of itself at its start and its end."""

from __future__ import annotations

from gspo_megatron.build.inputs import settle
from gspo_megatron.build.summary import describe_end, describe_start
from gspo_megatron.config.loading import load_config
from tests.support.small import SMALL


def test_the_start_and_the_end() -> None:
    sizes = ("model.max_sequence_length=40", "model.vocab_size=null", "run.dir=runs/x", "run.seed=3")
    config = load_config(None, [*SMALL, *sizes, "train.steps=7", "train.warm_start_steps=2", "data.eval_size=9"])
    start = list(describe_start(settle(config, 1)))
    expert = 3 * 12 * 16
    layer = (32 + 2 * 16) * 16 + 32 * 16 + 2 * 8 + 2 * 16 + 4 * 16 + 4 * expert
    total = 2 * layer + 16 + 2 * (95 + 3) * 16  # printable characters and three special tokens
    assert start == [
        "run directory runs/x, seed 3",
        f"model qwen3_moe: {total:,} parameters, {total - 2 * 2 * expert:,} of them active in a token",
        "algorithm gspo: level sequence_mean, clip ppo (low 0.0003, high 0.0004), aggregate sequence_mean, "
        "baseline mean_std, no KL term",
        "prompts: endless from task:sort_digits; held out 9 from task:sort_digits",
        "2 warm-start updates, then 7 steps of 32 prompts x 8 rollouts, 4 updates each",
    ]
    end = list(describe_end(config))
    assert "python tools/plot_run.py runs/x --output runs/x/plot.png" in end[1] and "runs/x/tensorboard" in end[2]
    assert len(list(describe_end(load_config(None, ["logging.tensorboard=false"])))) == 2
