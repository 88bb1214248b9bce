"""`python -m gspo_megatron.score`: what it writes, on which layouts, and what it refuses. transformers, where it is
installed, computes the same log-probs from the exported weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, PackingRules
from gspo_megatron.base.errors import DataError
from gspo_megatron.build.convert import to_folder
from gspo_megatron.data.responses import Response, read_responses
from gspo_megatron.data.tokenizers import CharacterTokenizer
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.scoring import Scorer
from gspo_megatron.run.stages import Packer
from gspo_megatron.score import main
from gspo_megatron.testing.commands import forked
from gspo_megatron.testing.fakes import OneRank, TablePolicy
from gspo_megatron.train import main as train
from tests.support.small import SMALL

FAMILIES = {
    "qwen3_moe": SMALL,
    "deepseek_v3": (
        *(s for s in SMALL if not s.startswith(("model.num_query_groups", "model.head_dim"))),
        *("model.family=deepseek_v3", "model.kv_lora_rank=6", "model.qk_nope_head_dim=4", "model.qk_rope_head_dim=2"),
        *(
            "model.v_head_dim=4",
            "model.num_dense_layers=1",
            "model.dense_ffn_size=20",
            "model.shared_expert_ffn_size=12",
        ),
    ),
}
COMMON = (
    *("precision.dtype=fp32", "model.init_std=0.2", "model.max_sequence_length=32", "train.tokens_per_micro_batch=40"),
    *("data.tokenizer=characters:0123456789>", "data.eval_size=2", "data.task={min_length: 2, max_length: 3}"),
    *("train.steps=1", "rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_new_tokens=4"),
    *("algorithm.updates_per_rollout=1", "optimizer.lr=1e-3", "logging.tensorboard=false"),
)
LAYOUTS = {
    "one": (1, ()),
    "tp2 ep2": (2, ("parallel.tp=2", "parallel.ep=2")),
    "cp2 pp2": (4, ("parallel.cp=2", "parallel.pp=2")),
    "dp2 allgather": (2, ("parallel.ep=2", "parallel.token_dispatcher=allgather")),
}


def lines() -> list[dict[str, Any]]:
    """Of all lengths, in both forms, one without a response."""
    generator = torch.Generator().manual_seed(3)

    def drawn(length: int) -> list[int]:
        return torch.randint(13, (length,), generator=generator).tolist()

    cuts = [(5, 2), (32, 1), (17, 16), (9, 9), (2, 1), (30, 12), (11, 3), (8, 1)]
    ids = [{"tokens": drawn(length), "prompt_length": prompt, "id": length} for length, prompt in cuts * 4]
    return [*ids, {"prompt": "12>", "response": "0123", "über": "é"}, {"prompt": "7", "response": ""}]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module", params=list(FAMILIES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    arguments = [*FAMILIES[request.param], *COMMON, f"run.dir={folder}"]
    [(status, errors)] = forked(1, arguments, command=train)
    assert status == 0, errors
    write(folder / "in.jsonl", lines())
    return folder


def score(run: Path, output: Path, layout: str = "one", *overrides: str) -> list[tuple[int, str]]:
    num_processes, settings = LAYOUTS[layout]
    files = ["--config", str(run / "config.yaml"), "--input", str(run / "in.jsonl"), "--output", str(output)]
    return forked(num_processes, [*files, "checkpoint.load=latest", *settings, *overrides], command=main)


@pytest.fixture(scope="module")
def scored(run: Path) -> list[dict[str, Any]]:
    [(status, errors)] = score(run, run / "out.jsonl")
    assert status == 0, errors
    assert [path.name for path in run.glob("out*")] == ["out.jsonl"]
    return read(run / "out.jsonl")


def test_every_line_gets_its_log_probs(run: Path, scored: list[dict[str, Any]]) -> None:
    given = read(run / "in.jsonl")
    assert [{k: v for k, v in row.items() if k != "log_probs"} for row in scored] == given
    for row in scored:
        expected = len(row["tokens"]) - row["prompt_length"] if "tokens" in row else len(row["response"])
        assert len(row["log_probs"]) == expected
        assert all(x < 0 for x in row["log_probs"])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_layout_gives_the_same(run: Path, scored: list[dict[str, Any]], tmp_path: Path, layout: str) -> None:
    for status, errors in score(run, tmp_path / "out.jsonl", layout):
        assert status == 0, errors
    for ours, expected in zip(read(tmp_path / "out.jsonl"), scored, strict=True):
        torch.testing.assert_close(ours.pop("log_probs"), expected["log_probs"], rtol=0, atol=2e-5)
        assert ours == {k: v for k, v in expected.items() if k != "log_probs"}


def test_transformers_has_the_same_log_probs(run: Path, scored: list[dict[str, Any]], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    to_folder(run, tmp_path / "hf", Console(on=False), dtype="fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer, worst = CharacterTokenizer("0123456789>"), 0.0
    for row in scored:
        text = row.get("prompt", "") + row.get("response", "")
        tokens = torch.tensor(row.get("tokens") or tokenizer.encode(text))
        prompt_length = row.get("prompt_length") or len(row["prompt"])
        with torch.no_grad():
            log_probs_TV = torch.log_softmax(theirs(tokens[None]).logits[0], dim=-1)
        expected = log_probs_TV[:-1].gather(1, tokens[1:, None])[prompt_length - 1 :, 0]
        difference = (torch.tensor(row["log_probs"]) - expected).abs()
        worst = max(worst, *difference.tolist(), 0.0)
    assert worst < 5e-5


@pytest.mark.parametrize("run", ["qwen3_moe"], indirect=True)
def test_it_is_a_command(run: Path, tmp_path: Path) -> None:
    """As a user does, with a temperature."""
    output = tmp_path / "out.jsonl"
    files = ["--config", str(run / "config.yaml"), "--input", str(run / "in.jsonl"), "--output", str(output)]
    command = [sys.executable, "-m", "gspo_megatron.score", *files, "checkpoint.load=latest", "rollout.temperature=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "log-probs are of softmax(z / T) with rollout.temperature=2.0" in done.stdout
    assert "34 lines with" in done.stdout and len(read(output)) == 34


# --- what is refused, before a process group exists ---

BAD = [
    ({"tokens": [1, 2]}, "field 'prompt_length' is None; expected how many of the 2 tokens are the prompt"),
    ({"tokens": [1, 2], "prompt_length": 3}, "field 'prompt_length' is 3; expected how many of the 2 tokens"),
    ({"tokens": [1, 2], "prompt_length": True}, "field 'prompt_length' is True"),
    ({"tokens": [1, 2], "prompt_length": 0}, "the prompt has no tokens"),
    ({"tokens": [1, "2"], "prompt_length": 1}, "field 'tokens' is .*; expected a list of token ids"),
    ({"tokens": [1, 13], "prompt_length": 1}, "token id 13 is outside the model's vocabulary, 0 to 12"),
    ({"tokens": [1] * 33, "prompt_length": 1}, "prompt and response have 33 tokens, more than 32"),
    ({"prompt": "1"}, "has the fields prompt; expected"),
    ({"prompt": "", "response": "1"}, "the prompt has no tokens"),
    ({"prompt": "x", "response": "1"}, "character 'x' at position 0"),
    ({"prompt": "1", "response": None}, "field 'response' is null; expected text or a number"),
    ({"prompt": "1", "response": "1", "log_probs": []}, "has a field 'log_probs' already"),
    ([1], "expected a JSON object"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "in.jsonl", [lines()[0], row])
    with pytest.raises(DataError, match=rf"in\.jsonl:2: .*{message}"):
        list(read_responses(path, CharacterTokenizer("0123456789>"), vocab_size=13, max_tokens=32))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint.load": "none"}, "ConfigError: checkpoint.load=none: the log-probs would be those of random"),
        ({"--output": "in.jsonl"}, "ConfigError: --output .*in.jsonl is the input"),
        ({"--output": "nowhere/out.jsonl"}, "ConfigError: --output .* cannot be written"),
        ({"--input": "other.jsonl"}, "DataError: the file .*other.jsonl does not exist"),
        ({"--input": "bad.jsonl"}, "DataError: .*bad.jsonl:3: token id 99"),
    ],
)
def test_a_command_that_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, str], message: str
) -> None:
    write(tmp_path / "in.jsonl", lines())
    write(tmp_path / "bad.jsonl", [*lines()[:2], {"tokens": [1, 99], "prompt_length": 1}])
    (tmp_path / "config.yaml").write_text("{}")
    asked = {"--config": "config.yaml", "--input": "in.jsonl", "--output": "out.jsonl"} | changed
    files = [x for name, file in asked.items() if name.startswith("--") for x in (name, str(tmp_path / file))]
    load = f"checkpoint.load={asked.get('checkpoint.load', 'latest')}"
    assert main([*files, *SMALL, *COMMON, load]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()


def test_nothing_was_saved(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", lines())
    (tmp_path / "config.yaml").write_text("{}")
    [(status, errors)] = score(tmp_path, tmp_path / "out.jsonl", "one", *SMALL, *COMMON, f"run.dir={tmp_path}/run")
    assert status == 2 and "CheckpointError: checkpoint.load=latest: nothing was saved in" in errors


class Failing(TablePolicy):
    """Its third call gives NaN."""

    num_calls = 0

    def log_probs(self, micro_batches: Seq[MicroBatch], *, reference: bool = False) -> list[Tensor]:
        self.num_calls += 1
        found = super().log_probs(micro_batches, reference=reference)
        return [x * torch.nan for x in found] if self.num_calls == 3 else found


def test_an_error_leaves_the_older_output(tmp_path: Path) -> None:
    """The input is scored in chunks; of those before the error nothing stays."""
    ranks = OneRank()
    policy = Failing(ranks)
    packer = Packer(
        ranks, 0, max_tokens=4, rules=PackingRules(), cost=float, group_size=1, updates_per_rollout=1, seed=0
    )
    responses = [Response(f"in.jsonl:{n}", {}, [2, 3, 2, 3], 1) for n in range(1, 31)]
    output = tmp_path / "out.jsonl"
    output.write_text("older")
    with pytest.raises(DataError, match=r"in\.jsonl:17: the log-prob of response token 0 is nan"):
        Scorer(policy, ranks, packer, Console(on=False)).write(responses, output, 30)
    assert output.read_text() == "older" and list(tmp_path.iterdir()) == [output]
    Scorer(policy, ranks, packer, Console(on=False)).write(responses, output, 30)
    assert policy.num_calls == 3 + 4 and len(read(output)) == 30
