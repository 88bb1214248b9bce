"""engine.draw=vllm: vLLM's own sampler draws from the distribution that was asked for, and tells its log-probs.

transformers says what the log-probs are.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gspo_megatron.base.errors import UnfitEngine
from gspo_megatron.rollout.engine import Weights
from gspo_megatron.rollout.engine_draws import DrawByCounter, DrawByVllm
from gspo_megatron.rollout.engine_server import EngineServer, ServerSettings
from gspo_megatron.rollout.external_engine import ExternalEngine
from gspo_megatron.rollout.native.sampling import Decoding, distribution
from gspo_megatron.rollout.probe import Probe
from gspo_megatron.rollout.vllm import VllmEngine
from gspo_megatron.rollout.weight_channels import SharedMemory
from gspo_megatron.rollout.weight_sync import send_weights
from gspo_megatron.testing.commands import metrics, rollouts

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-engine", allow_module_level=True)

from tests.engine.test_served import NUM_IDS, WAYS, engine_of, pytestmark, request, sampled, trained  # noqa: F401

ROWS = 20
"""Of the embedding: more than the tokenizer has ids."""
STEPS = 2
SETTINGS = (
    *("engine.draw=vllm", f"train.steps={STEPS}", "train.warm_start_steps=0", f"model.vocab_size={ROWS}"),
    *("rollout.temperature=0.7", "reward.accuracy=exact_match", "reward.functions={}"),
    "reward.terms=[{function: exact_match}, {function: length, max_tokens: 12, buffer: 11}]",
)
DRAW = DrawByVllm(NUM_IDS, ROWS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("drawn") / "run", *SETTINGS)


@pytest.fixture(scope="module")
def model(run: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run / "hf" / f"step_{STEPS:06d}", dtype=torch.float32)


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens, NUM_IDS]: those that follow each."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([tokens])).logits[0, :, :NUM_IDS]
    return found


def test_a_run_has_the_log_probs_of_the_trainer(run: Path) -> None:
    rows = metrics(run)[1:]
    assert len(rows) == STEPS
    for row in rows:
        # At the run's temperature, and without the rows that no id has.
        assert abs(row["sampler/kl"]) < 1e-5
        assert 0 < row["engine/probe_gap"] < 1e-5
        assert row["grad_norm"] > 0
    drawn = [tuple(r["tokens"]) for step in rollouts(run) for r in step]
    assert max(max(tokens) for tokens in drawn) < NUM_IDS
    assert len(set(drawn)) > len(drawn) / 2


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    settings = ServerSettings(
        sys.executable, run / "engine" / "model", "float32", max_length=24, max_batch=64, draw=DRAW.arguments
    )
    server = EngineServer("engine 0", settings, tmp_path_factory.mktemp("server") / "engine.log")
    server.start()
    server.wait()
    engine = engine_of(server)
    engine.pause("wait")
    tensors = load_file(run / "hf" / f"step_{STEPS:06d}" / "model.safetensors")
    send_weights([server.address.url], Weights(3, iter(tensors.items())), SharedMemory("draws"), token=server.token)
    engine.resume()
    yield server
    server.end()


@pytest.fixture
def engine(server: EngineServer) -> VllmEngine:
    return engine_of(server, draw=DRAW)


def test_log_probs_are_those_of_the_distribution_drawn_from(engine: VllmEngine, model: Any) -> None:
    """All ways in one batch."""
    asked = {i: request(i, **way) for i in range(40) for way in [WAYS[i % len(WAYS)]]}
    found = sampled(engine.generate(list(asked.values())))
    assert found.keys() == asked.keys()
    for number, (tokens, log_probs, _) in found.items():
        r = asked[number]
        how = Decoding(r.temperature or 1.0, r.top_k, r.top_p, greedy=r.temperature == 0)
        log_probs_LV = distribution(logits(model, [*r.prompt, *tokens])[len(r.prompt) - 1 : -1], how)
        expected_L = log_probs_LV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(log_probs).double(), expected_L.double(), rtol=0, atol=1e-4)
        if how.greedy:
            assert tokens == log_probs_LV.argmax(-1).tolist()


@pytest.mark.parametrize("way", WAYS[:-1])
def test_tokens_come_from_that_distribution(engine: VllmEngine, model: Any, way: dict[str, Any]) -> None:
    """Pearson's X^2 = sum (observed - expected)^2 / expected, of the first token of 1,000 rollouts, has a chi-squared
    distribution. Seeds are fixed, and so is the outcome."""
    count, prompt = 1000, (3, 5)
    same = [request(i, prompt=prompt, max_new_tokens=1, stop_ids=(), **way) for i in range(count)]
    drawn = Counter(tokens[0] for tokens, _, _ in sampled(engine.generate(same)).values())
    r = same[0]
    p_V = distribution(logits(model, list(prompt))[-1:], Decoding(r.temperature, r.top_k, r.top_p))[0].exp()
    kept = [token for token in range(NUM_IDS) if p_V[token] > 0]
    assert set(drawn) <= set(kept) and len(kept) > 2
    statistic = sum((drawn[token] - count * float(p_V[token])) ** 2 / (count * float(p_V[token])) for token in kept)
    freedom = torch.tensor(len(kept) - 1.0)
    assert torch.special.gammaincc(freedom / 2, torch.tensor(statistic / 2)) > 0.001


def test_tokens_depend_neither_on_batch_nor_order(engine: VllmEngine) -> None:
    together = sampled(engine.generate([request(i) for i in range(30)]))
    order = list(range(30))
    random.Random(1).shuffle(order)
    assert sampled(engine.generate([request(i) for i in order])) == together
    assert sampled(engine.generate([request(4)])) == {4: together[4]}
    # Other numbers for another rollout, another seed, and the rest of a response.
    same = [request(0, id=i, stop_ids=(), seed=seed) for seed in (1, 2) for i in range(20 * seed, 20 * seed + 20)]
    assert len({tuple(tokens) for tokens, _, _ in sampled(engine.generate(same)).values()}) > 30


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_probe_tells_the_trainers_log_probs(server: EngineServer, model: Any, temperature: float) -> None:
    probe = Probe.of_vocabulary(NUM_IDS, 20)
    log_probs_LV = torch.log_softmax(logits(model, list(probe.tokens))[:-1] / temperature, -1)
    expected_L = log_probs_LV.gather(1, torch.tensor(probe.tokens[1:])[:, None])[:, 0]
    assert probe.check(engine_of(server, draw=DRAW, temperature=temperature), expected_L.tolist()) < 1e-5


def test_a_run_finds_out_how_an_engine_draws(server: EngineServer) -> None:
    engine = ExternalEngine(server.address, max_length=24, vocab_size=ROWS, draw="vllm")
    engine.check()
    engine.end()
    with pytest.raises(UnfitEngine, match=r"draws tokens by itself, .* \(engine.draw=counter\); start it with"):
        replace(engine, draw="counter").check()


def test_what_the_own_draw_needs_is_not_in_a_request() -> None:
    """Another vLLM than one that this package starts would refuse, or ignore, what it does not know."""
    assert "extra_args" not in DRAW.parameters(request(1))
    assert DrawByCounter(NUM_IDS, ROWS).parameters(request(1))["extra_args"]
