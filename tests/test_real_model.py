"""A model that transformers wrote goes in, is trained with GSPO, and comes out as one that transformers uses: it reads
the same numbers and answers as many held-out prompts. DeepSeek-V3 and GLM-4.5, whose folders hold more than those of
Qwen3-MoE, go the same way, up to the numbers."""

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
from gspo_megatron.score import main as score
from gspo_megatron.testing.commands import forked
from gspo_megatron.testing.time_limits import time_factor
from gspo_megatron.train import main as train
from tests.support.hugging_face import tokenizer_folder
from tests.support.transformers_models import LENGTHS, MODELS, drawn

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
        prompt = inputs.sets[0].prompts[i]
        tokens = torch.tensor([prompt.tokens])
        made = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=8, pad_token_id=0
        )
        right += tokenizer.decode(made[0, tokens.size(1) :], skip_special_tokens=True).strip() == prompt.answer
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    ours = rows[-1]["eval/accuracy"]
    assert 0.1 < ours < 1, "too easy or too hard to compare"
    assert right / NUM_PROMPTS == pytest.approx(ours)


MORE = (
    # KL gives every response a gradient, whatever its reward.
    *("train.warm_start_steps=3", "algorithm.kl_coef=0.1", "algorithm.updates_per_rollout=2", "data.eval_size=2"),
    "model.max_sequence_length=64",
)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_family_goes_in_and_comes_out(family: str, tmp_path: Path) -> None:
    """With a router's bias, shared experts, dense layers, latents; transformers scores the result as we do."""
    source = tokenizer_folder(tmp_path / "model")
    drawn(family, next(iter(MODELS[family].variants)), torch.float32).save_pretrained(source)
    arguments = [*SETTINGS, *MORE, f"model.hf={source}", f"run.dir={tmp_path / 'run'}"]
    for status, errors in forked(2, arguments, command=train):
        assert status == 0, errors
    folder = tmp_path / "run" / "hf" / "step_000002"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    before = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    # Frozen, unless the run asks for something else.
    assert same == {name for name in before if "correction_bias" in name}
    rows = [{"tokens": torch.randint(509, (length,)).tolist(), "prompt_length": 1} for length in (1, *LENGTHS)]
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "score.yaml").write_text("{precision: {device: cpu, dtype: fp32}, parallel: {tp: 2, ep: 2}}")
    files = ["--config", str(tmp_path / "score.yaml"), "--input", str(given), "--output", str(out)]
    for status, errors in forked(2, [*files, f"model.hf={folder}"], command=score):
        assert status == 0, errors
    for row in map(json.loads, out.read_text().splitlines()):
        tokens = torch.tensor(row["tokens"])
        with torch.no_grad():
            log_probs_TV = torch.log_softmax(model(tokens[None]).logits[0], -1)
        expected = log_probs_TV[:-1].gather(1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["log_probs"]), expected, rtol=0, atol=5e-5)
