"""Rollouts of engines, lag 0: the trainer learns what it learns over its own sampler, whatever happens to engines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from gspo_megatron.base.batches import Sampling
from gspo_megatron.base.errors import EnginesDown, WrongWeights
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.config.sections import Config
from gspo_megatron.rollout.engine import Engine
from gspo_megatron.rollout.engine_pool import EnginePool
from gspo_megatron.rollout.probe import Probe
from gspo_megatron.rollout.served import MOST_IN_VAIN, ServedSource
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.testing.fake_engine import FakeEngine, weights_of
from gspo_megatron.testing.fakes import TOKENIZER, OneRank, Replicas, Shelf, TablePolicy, config_of, trainer_of

SETTINGS = ("train.steps=3", "train.eval_every=2", "rollout.prompts_per_step=4", "rollout.group_size=4")


def over_engines(
    config: Config,
    ranks: Ranks,
    *engines: FakeEngine,
    stop: Callable[[], bool] = lambda: False,
    restarts: bool = True,
    start: Callable[[FakeEngine], None] = lambda engine: engine.start(),
    most_starts: int = 3,
    most_in_flight: int = 256,
    **parts: object,
) -> Trainer:
    """A trainer whose rollouts come from the engines; on other ranks than the main one, too."""
    policy, r = TablePolicy(ranks), config.rollout

    def start_again(engine: Engine) -> None:
        assert isinstance(engine, FakeEngine)
        start(engine)

    def pool(wrong: Callable[[Engine], str]) -> EnginePool:
        return EnginePool(
            engines,
            probe=wrong,
            start=start_again if restarts else None,
            most_starts=most_starts,
            most_in_flight=most_in_flight,
        )

    def score(tokens: tuple[int, ...], begin: int) -> list[float]:
        log_probs_VV = policy.logits_VV.log_softmax(dim=-1)
        return [float(log_probs_VV[tokens[i - 1], tokens[i]]) for i in range(begin, len(tokens))]

    served = partial(
        ServedSource,
        policy=policy,
        open_pool=pool if ranks.is_main else None,
        weights=lambda: weights_of(policy.version, policy.logits_VV).tensors,
        probe=Probe.of_vocabulary(TOKENIZER.vocab_size, 16),
        score=score,
        as_in_training=Sampling(r.temperature, r.top_p, r.top_k, r.max_new_tokens, config.run.seed),
        stop_ids=(TOKENIZER.eos_id,),
        stop=stop,
    )
    return trainer_of(config, ranks, policy, served=served, **parts)  # type: ignore[arg-type]


def learned(trainer: Trainer) -> torch.Tensor:
    policy = trainer.policy
    assert isinstance(policy, TablePolicy)
    return policy.logits_VV


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    """What a run over its own sampler has learned."""
    trainer = trainer_of(config_of(*SETTINGS))
    assert trainer.run()
    return learned(trainer)


def test_a_run_over_engines_learns_the_same(reference: torch.Tensor) -> None:
    engines = FakeEngine("engine 0"), FakeEngine("engine 1")
    trainer = over_engines(config_of(*SETTINGS), OneRank(), *engines)
    assert trainer.run()
    assert torch.equal(learned(trainer), reference)
    loads = [call for call in engines[0].calls if call.startswith("load")]
    # Two updates a step; weights are sent where somebody samples with them, also for the last evaluation.
    assert loads == ["load 0", "load 2", "load 4", "load 6"]
    assert all(engine.asked for engine in engines)
    metrics = trainer.parts.source.metrics
    assert metrics["engine/probe_gap"] < 1e-12
    assert metrics["engine/sync_s"] > 0


def test_every_rank_gets_what_the_main_one_asked_for(reference: torch.Tensor) -> None:
    engine = FakeEngine("engine 0")

    def run(ranks: Ranks) -> torch.Tensor:
        trainer = over_engines(config_of(*SETTINGS), ranks, engine)
        assert trainer.run()
        return learned(trainer)

    first, second = Replicas(2).run(run)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, reference, rtol=0, atol=1e-12)


def test_rollouts_of_an_engine_that_died_are_sampled_again_equal(reference: torch.Tensor) -> None:
    engine = FakeEngine("engine 0", dies_after=9)
    trainer = over_engines(config_of(*SETTINGS), OneRank(), engine)
    assert trainer.run()
    assert torch.equal(learned(trainer), reference)
    # Its weights were lost with it.
    assert [call for call in engine.calls if call.startswith("load")].count("load 0") == 2


def test_an_engine_that_does_not_stay_up_ends_the_run_on_every_rank() -> None:
    engine = FakeEngine("engine 0", dies_after=0)

    def start_dying(self: FakeEngine = engine, start: Callable[[], None] = engine.start) -> None:
        start()
        self.dies_after = self.rounds

    engine.start = start_dying  # type: ignore[method-assign]
    with pytest.raises(Exception, match="engine 0") as caught:
        Replicas(2).run(lambda ranks: over_engines(config_of(*SETTINGS), ranks, engine).run())
    assert type(caught.value).__name__ == "EnginesDown"
    assert len(engine.asked) == MOST_IN_VAIN


def test_engines_that_stay_dead_are_not_asked_again() -> None:
    engine = FakeEngine("engine 0", dies_after=0)
    with pytest.raises(EnginesDown, match="engine 0 is dead") as caught:
        over_engines(config_of(*SETTINGS), OneRank(), engine, restarts=False).run()
    assert "in a row" not in str(caught.value), "one attempt, not several in vain"
    assert len(engine.asked) == 1
    assert len([call for call in engine.calls if call.startswith("load")]) == 1


def test_what_was_whole_when_an_engine_died_is_kept() -> None:
    """An engine that dies within a step more often than may happen in vain: it has time for one group, or two."""
    settings = (*SETTINGS, "train.steps=1", "rollout.prompts_per_step=16")
    engine = FakeEngine("engine 0", dies_after=5)

    def start(engine: FakeEngine) -> None:
        engine.start()
        engine.dies_after = engine.rounds + 5

    pool = {"start": start, "most_starts": 1000, "most_in_flight": 4}
    trainer = over_engines(config_of(*settings), OneRank(), engine, **pool)  # type: ignore[arg-type]
    assert trainer.run()
    own = trainer_of(config_of(*settings))
    assert own.run()
    assert torch.equal(learned(trainer), learned(own))
    loads = [call for call in engine.calls if call.startswith("load")]
    assert loads.count("load 0") > MOST_IN_VAIN + 1


def test_nothing_is_trained_on_wrong_weights() -> None:
    """The engine says that it has the new weights, and samples with the first ones."""
    engine = FakeEngine("engine 0", keeps_old=True)
    config = config_of(*SETTINGS)
    shelf = Shelf()
    trainer = over_engines(config, OneRank(), engine, checkpoints=shelf)
    with pytest.raises(
        WrongWeights, match=r"engine 0, after weights of version 2 .* does not compute with the trainer's weights"
    ):
        trainer.run()
    assert trainer.policy.version == 2, "the updates of step 1 only, whose rollouts were right"


def test_a_run_stopped_while_engines_sample_continues_equal(reference: torch.Tensor) -> None:
    engine, shelf = FakeEngine("engine 0"), Shelf()
    # A greedy evaluation and two steps ask fewer times than this.
    trainer = over_engines(
        config_of(*SETTINGS), OneRank(), engine, stop=lambda: len(engine.asked) > 11, checkpoints=shelf
    )
    assert not trainer.run()
    position, state = shelf.saved[-1]
    assert 0 < position.steps < 3
    config = config_of(*SETTINGS, "checkpoint.load=latest")
    continued = over_engines(config, OneRank(), FakeEngine("engine 0"), state=state)
    policy = continued.policy
    assert isinstance(policy, TablePolicy)
    policy.logits_VV, policy.version = learned(trainer).clone(), trainer.policy.version
    assert continued.run()
    assert torch.equal(learned(continued), reference)
