"""A model that transformers wrote goes in, is trained with GSPO, and comes out as one that transformers uses: it reads
the same numbers and answers as many held-out prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.build.inputs import Inputs, settle
from gspo_megatron.config.loading import load_config
from gspo_megatron.testing.time_limits import time_factor
from tests.support.hugging_face import tokenizer_folder

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]
NUM_PROMPTS = 48
SETTINGS = (
    "model.max_sequence_length=48",
    "parallel.ep=2",
    "precision.device=cpu",
    "precision.dtype=fp32",
    "data.train=task:sort_digits",
    "data.task={min_length: 2, max_length: 4}",
    f"data.eval_size={NUM_PROMPTS}",
    "rollout.max_new_tokens=8",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "optimizer.lr=1e-4",
    "algorithm.clip_low=0.03",
    "algorithm.clip_high=0.04",
    "train.warm_start_steps=60",
    "train.warm_start_lr=3e-3",
    "train.steps=2",
    "train.hf_dtype=fp32",
    "logging.tensorboard=false",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, beside the folder that it started from."""
    folder = tmp_path_factory.mktemp("real")
    source = tokenizer_folder(folder / "model")
    stops = json.loads((source / "generation_config.json").read_text())
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=509,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=64,
        intermediate_size=64,
        max_position_embeddings=64,
        norm_topk_prob=True,
        initializer_range=0.08,
        **stops,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "gspo_megatron.train"]
    finished = subprocess.run(
        [*command, f"model.hf={source}", f"run.dir={folder / 'run'}", *SETTINGS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240 * time_factor(),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "the weights are those of" in finished.stdout and "the model after step 2 is in" in finished.stdout
    return folder / "run"


@pytest.fixture(scope="module")
def theirs(run: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(run / "hf" / "step_000002")


@pytest.fixture(scope="module")
def inputs(run: Path) -> Inputs:
    return settle(load_config(run / "config.yaml"), 2)


def test_the_folder_is_complete(run: Path, theirs: Any) -> None:
    exported, source = run / "hf" / "step_000002", run.parent / "model"
    same = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert all((exported / name).read_bytes() == (source / name).read_bytes() for name in same)
    ours, from_source = (json.loads((each / "config.json").read_text()) for each in (exported, source))
    assert ours.pop("torch_dtype") == ours["dtype"] == "float32" and ours == from_source
    assert theirs.dtype == torch.float32 and theirs.generation_config.eos_token_id == [2, 0]
    assert transformers.AutoTokenizer.from_pretrained(exported).chat_template


def test_transformers_answers_as_many_held_out_prompts(run: Path, theirs: Any, inputs: Inputs) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "hf" / "step_000002")
    right = 0
    for i in range(NUM_PROMPTS):
        prompt = inputs.eval_prompts[i]
        tokens = torch.tensor([prompt.tokens])
        made = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=8, pad_token_id=0
        )
        right += tokenizer.decode(made[0, tokens.size(1) :], skip_special_tokens=True).strip() == prompt.answer
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    ours = rows[-1]["eval/accuracy"]
    assert 0.1 < ours < 1, "too easy or too hard to compare"
    assert right / NUM_PROMPTS == pytest.approx(ours)
