"""What vLLM answers from a model's folder, and the log-prob of every token, in lines that `gspo_megatron.score` reads.

    python -m tests.support.vllm_answers ORDERS.json

ORDERS.json is a list of {"folder", "prompts", "output", "options"}: prompts are lists of token ids, options go to vLLM.
A line of the output is {"tokens": [...], "prompt_length": 1, "vllm": [...]}: the prompt and vLLM's continuation, and
a log-prob for each token but the first. Then come {"rendered": [...]}, CONVERSATION as vLLM's chat endpoint would
tokenise it, and {"reloads": ...}, what `reloads` returns. vLLM is imported once, and each folder has a process of its
own, since a process holds one engine; where it fails, output.error has the traceback.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from gspo_megatron.base.errors import EngineError
from gspo_megatron.rollout.engine import Weights
from gspo_megatron.rollout.weight_channels import write_folder

NUM_NEW = 9
CONVERSATION = [{"role": "user", "content": "What is 12 plus 30?"}]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The cores are shared with other tests.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def answer(order: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    from gspo_megatron.rollout import vllm_worker

    limits = {"max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    weights = {
        "worker_extension_cls": f"{vllm_worker.__name__}.Extension",
        "weight_transfer_config": {"backend": "gspo"},
    }
    settings = {"dtype": "float32", "enforce_eager": True, **limits, **weights, **order["options"]}
    model = LLM(order["folder"], **settings)
    asked = SamplingParams(temperature=0, max_tokens=NUM_NEW, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": tokens} for tokens in order["prompts"]]
    lines: list[dict[str, Any]] = []
    for output in model.generate(prompts, asked, use_tqdm=False):
        [drawn] = output.outputs
        tokens = [*output.prompt_token_ids, *drawn.token_ids]
        found = [*output.prompt_logprobs[1:], *drawn.logprobs]
        log_probs = [by_token[token].logprob for token, by_token in zip(tokens[1:], found, strict=True)]
        lines.append({"tokens": tokens, "prompt_length": 1, "vllm": log_probs})
    [chat] = model.chat([CONVERSATION], SamplingParams(max_tokens=1), use_tqdm=False)
    lines.append({"rendered": list(chat.prompt_token_ids)})
    # Last: an engine that has refused weights answers nothing more.
    lines.append({"reloads": reloads(model, Path(order["folder"]), order["prompts"][-1])})
    Path(order["output"]).write_text("".join(json.dumps(line) + "\n" for line in lines))


def reloads(model: Any, folder: Path, tokens: list[int]) -> dict[str, Any]:
    """Log-probs of `tokens`: from the folder's weights as the engine was started with them, then with other weights
    that it is given, with the folder's given back, and with these given once more without the mend for experts. Or why
    the engine refuses them."""
    from unittest.mock import patch

    from vllm import SamplingParams

    from gspo_megatron.rollout import vllm_worker

    kept = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}

    def scored() -> list[float]:
        asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
        [output] = model.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)
        found = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        return [by_token[token].logprob for token, by_token in found]

    def given(version: int, factor: float) -> list[float]:
        tensors = ((name, factor * tensor) for name, tensor in kept.items())
        written = write_folder(folder.with_name("given"), Weights(version, tensors), bucket_bytes=200_000)
        model.collective_rpc("start_weight_update")
        model.collective_rpc("update_weights", args=({"channel": "disk", "header": None, "place": str(written)},))
        model.collective_rpc("finish_weight_update")
        model.reset_prefix_cache()
        return scored()

    answers: dict[str, Any] = {"started": scored()}
    try:
        answers |= {"others": given(1, 0.75), "reloaded": given(2, 1.0)}
    except EngineError as error:
        return answers | {"refused": str(error)}
    with patch.object(vllm_worker, "forget_packed_experts", lambda model: None):
        return answers | {"without the mend": given(3, 1.0)}


def attempt(order: dict[str, Any]) -> None:
    try:
        answer(order)
    except Exception:
        Path(order["output"]).with_suffix(".error").write_text(traceback.format_exc())


def main(path: str) -> None:
    import vllm  # noqa: F401  (for the forks)

    for order in json.loads(Path(path).read_text()):
        process = multiprocessing.get_context("fork").Process(target=attempt, args=(order,))
        process.start()
        process.join()


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    main(sys.argv[1])
