"""vLLM loads the folders that a run writes, as they are: it has the same log-probs, through its cache too, and renders
the same conversation. vLLM shares no code with this package, nor with transformers' models.

In float32 on the CPU, with folders in bf16, as they are written by default. Sizes are small, but what vLLM's kernels
for CPUs ask for: heads of 32, experts of a multiple of 32, DeepSeek-V3's latent of 512 and rotary key of 64. Its delta
nets, Qwen3-Next's, want bf16 and heads of 128.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_megatron.data.tokenizers import load_tokenizer
from gspo_megatron.rollout.probe import Probe
from gspo_megatron.score import main as score
from gspo_megatron.testing.commands import forked
from gspo_megatron.testing.time_limits import time_factor
from gspo_megatron.train import main as train
from tests.support.hugging_face import tokenizer_folder
from tests.support.vllm_answers import CONVERSATION, NUM_NEW

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-engine", allow_module_level=True)
pytestmark = pytest.mark.skipif(
    "avx2" not in Path("/proc/cpuinfo").read_text(),
    reason="vLLM's wheel for CPUs needs AVX2, which this processor lacks",
)

ROOT = Path(__file__).parents[2]
SIZES = ("model.hidden_size=64", "model.num_layers=3", "model.num_attention_heads=4")
GROUPED_QUERY = (*SIZES, "model.head_dim=32", "model.num_query_groups=2")
EXPERTS = ("model.num_experts=8", "model.experts_per_token=3", "model.expert_ffn_size=32")
LATENT = ("model.kv_lora_rank=512", "model.qk_rope_head_dim=64", "model.qk_nope_head_dim=32", "model.v_head_dim=32")
DELTA = ("model.linear_key_head_dim=128", "model.linear_value_head_dim=128")
SHARED = ("model.expert_ffn_size=32", "model.shared_expert_ffn_size=32")
EP, TP = ("parallel.ep=2",), ("parallel.tp=2",)
FAMILIES: dict[str, tuple[str, ...]] = {
    "qwen3_moe": ("model.preset=tiny_moe", *GROUPED_QUERY, *EXPERTS, *EP),
    "qwen3": ("model.preset=tiny_dense", *GROUPED_QUERY, *TP),
    "mixtral": ("model.preset=tiny_mixtral", *GROUPED_QUERY, *EXPERTS, *EP),
    "glm4_moe": ("model.preset=tiny_glm", *GROUPED_QUERY, *SHARED, *TP),
    # vLLM's gpt-oss has norms with 1e-5, whatever config.json says.
    "gpt_oss": ("model.preset=tiny_gpt_oss", "model.norm_epsilon=1e-5", *GROUPED_QUERY, *EXPERTS, *EP),
    "deepseek_v3": ("model.preset=tiny_mla", *SIZES, *LATENT, *SHARED, *EP),
    "qwen3_next": ("model.preset=tiny_qwen3_next", "model.head_dim=32", *DELTA, *EP),
}
# The backend that vLLM takes by itself on a processor with AMX has no float32.
OPTIONS = {"deepseek_v3": {"attention_backend": "CPU_MLA"}, "qwen3_next": {"dtype": "bfloat16"}}
BF16 = {family for family, options in OPTIONS.items() if options.get("dtype") == "bfloat16"}
NOT_RELOADED = {"gpt_oss"}
"""Its loader in vLLM 0.32 copies experts into parameters itself, which during a reload have no memory."""
COMMON = (
    *("precision.device=cpu", "precision.dtype=fp32", "model.init_std=0.2", "model.max_sequence_length=64"),
    *("model.vocab_size=387", "data.train=task:sort_digits", "data.task={min_length: 2, max_length: 3}"),
    *("data.eval_size=2", "rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_new_tokens=4"),
    *("algorithm.updates_per_rollout=1", "optimizer.lr=1e-3", "train.steps=1", "train.hf_at_end=on"),
    "logging.tensorboard=false",
)
PROBE = Probe.of_vocabulary(387, 64 - NUM_NEW)
LENGTHS = (1, 2, 7, 8, 9, 17, 40, 64 - NUM_NEW)
"""Around the window of 8 that mixtral and gpt_oss have, up to the longest."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every family on two processes, and what vLLM answered from the folder that each wrote."""
    base = tmp_path_factory.mktemp("engine")
    tokenizer = tokenizer_folder(base / "tokenizer")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(387, (length,), generator=generator).tolist() for length in LENGTHS]
    orders: list[dict[str, Any]] = []
    for family, settings in FAMILIES.items():
        arguments = [*settings, *COMMON, f"data.tokenizer={tokenizer}", f"run.dir={base / family}"]
        for status, errors in forked(2, arguments, command=train):
            assert status == 0, errors
        order = {"folder": str(base / family / "hf" / "step_000001"), "output": str(base / f"{family}.jsonl")}
        orders.append(order | {"prompts": prompts, "options": OPTIONS.get(family, {})})
    (base / "orders.json").write_text(json.dumps(orders))
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.vllm_answers", str(base / "orders.json")]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=240 * time_factor())
    (base / "vllm.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_has_the_same_log_probs(base: Path, family: str) -> None:
    answers = base / f"{family}.jsonl"
    assert answers.exists(), answers.with_suffix(".error").read_text() + (base / "vllm.log").read_text()
    *lines, rendered, _ = (json.loads(line) for line in answers.read_text().splitlines())
    assert [len(line["tokens"]) for line in lines] == [length + NUM_NEW for length in LENGTHS]
    given, scored = base / f"{family}_in.jsonl", base / f"{family}_out.jsonl"
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = base / family / "hf" / "step_000001"
    settings = [
        f"model.hf={folder}",
        "precision.device=cpu",
        f"precision.dtype={'bf16' if family in BF16 else 'fp32'}",
        "train.tokens_per_micro_batch=128",
    ]
    (base / "score.yaml").write_text("{}")
    files = ["--config", str(base / "score.yaml"), "--input", str(given), "--output", str(scored)]
    [(status, errors)] = forked(1, [*files, *settings], command=score)
    assert status == 0, errors
    found = [json.loads(line) for line in scored.read_text().splitlines()]
    theirs, ours = (torch.tensor([x for line in found for x in line[of]]) for of in ("vllm", "log_probs"))
    if family in BF16:
        # Two programs part ways with every expert that rounding chooses: single log-probs tell nothing.
        assert (theirs - ours).abs().mean() < 0.1 * ours.std()
    else:
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.chat_template is not None
    assert rendered["rendered"] == tokenizer.encode(tokenizer.chat_template.render(CONVERSATION))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NOT_RELOADED))
def test_weights_given_to_a_running_engine_are_those_of_one_started_with_them(base: Path, family: str) -> None:
    found = reloads(base, family)
    assert "refused" not in found, found
    assert found["reloaded"] == found["started"]  # to the last bit
    assert PROBE.complaint(found["others"], found["started"])


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NOT_RELOADED - {"qwen3"}))
def test_the_probe_stops_experts_that_vllm_forgot_to_pack(base: Path, family: str) -> None:
    """If this fails, vLLM packs reloaded experts by itself: remove `forget_packed_experts` and this test."""
    found = reloads(base, family)
    complaint = PROBE.complaint(found["without the mend"], found["reloaded"])
    assert "does not compute with the trainer's weights" in complaint and "So large a gap" in complaint


@pytest.mark.parametrize("family", sorted(NOT_RELOADED))
def test_a_model_that_vllm_does_not_reload_is_refused(base: Path, family: str) -> None:
    """If this fails, vLLM reloads it: take it out of NOT_RELOADED and of the table in docs/engines.md."""
    assert re.search(
        r"loader of this model does not put new weights into .*mlp\.experts", reloads(base, family)["refused"]
    )


def reloads(base: Path, family: str) -> dict[str, Any]:
    answers = base / f"{family}.jsonl"
    assert answers.exists(), answers.with_suffix(".error").read_text() + (base / "vllm.log").read_text()
    return json.loads(answers.read_text().splitlines()[-1])["reloads"]
