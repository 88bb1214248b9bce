"""A run that samples ahead of its trainer, with a real vLLM: every token is from the weights that its rollout names.

transformers says what the log-probs are, from the folder that the run wrote of every version.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.testing.commands import metrics, rollouts

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-engine", allow_module_level=True)

from tests.engine.test_served import pytestmark, trained  # noqa: F401

NUM_STEPS, UPDATES = 5, 2
# A response ends with the one id of many that ends it: seldom, so it is under way when weights change.
TOKENIZER = "characters:0123456789>" + "".join(map(chr, range(0x400, 0x530)))
SETTINGS = (
    *("rollout.max_lag=2", f"train.steps={NUM_STEPS}", "train.warm_start_steps=0", "train.hf_every=1"),
    *(f"data.tokenizer={TOKENIZER}", "rollout.max_new_tokens=100", "model.max_sequence_length=128"),
    *("rollout.prompts_per_step=4", f"algorithm.updates_per_rollout={UPDATES}", "engine.probe_limit=1e-3"),
    # On any machine it takes longer to sample a step, 800 forwards, than to train on it: the engine is never idle.
    "rollout.max_batch=4",
    # Rewards that differ, and weights that move.
    "reward.terms=[{function: exact_match}, {function: length, max_tokens: 100, buffer: 99}]",
    *("reward.functions={}", "reward.accuracy=exact_match", "optimizer.lr=3e-3"),
)


def test_each_token_is_from_the_weights_that_its_rollout_names(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", *SETTINGS)
    rows = metrics(run)[1:]
    assert len(rows) == NUM_STEPS
    assert max(row["lag/max"] for row in rows) in (1, 2)
    models = {UPDATES * step: model_of(run, step) for step in range(1, NUM_STEPS + 1)}
    tokenizer, mixed = load_tokenizer(TOKENIZER), 0
    for rollout in (r for step in rollouts(run) for r in step):
        spans = rollout["versions"] or [(rollout["policy_version"], 0, len(rollout["tokens"]))]
        assert min(version for version, _, _ in spans) == rollout["policy_version"]
        assert [begin for _, begin, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
        assert spans[-1][2] == len(rollout["tokens"])
        prompt = tokenizer.encode(rollout["prompt"])
        told = torch.tensor(rollout["log_probs"])
        for version, begin, end in spans:
            if version in models:
                expected = log_probs(models[version], prompt, rollout["tokens"])[begin:end]
                torch.testing.assert_close(told[begin:end], expected, rtol=0, atol=1e-3)
        known = [span for span in spans if span[0] in models]
        if len(known) > 1:
            mixed += 1
            version, begin, end = known[0]
            others = log_probs(models[known[1][0]], prompt, rollout["tokens"])[begin:end]
            assert (told[begin:end] - others).abs().max() > 1e-2
    assert mixed, "no response was under way while weights changed: the test shows nothing"


def model_of(run: Path, step: int) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run / "hf" / f"step_{step:06d}", dtype=torch.float32)


def log_probs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits_LV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits_LV, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
