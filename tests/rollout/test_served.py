"""Rollouts of engines, lag 0: the trainer learns what it learns over its own sampler, whatever happens to engines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from gspo_megatron.base.batches import Sampling
from gspo_megatron.base.errors import CannotSend, EngineError, EnginesDown, StopRequested, WrongWeights
from gspo_megatron.base.protocols import Ranks
from gspo_megatron.config.sections import Config
from gspo_megatron.rollout.engine import Engine, Weights
from gspo_megatron.rollout.engine_pool import EnginePool
from gspo_megatron.rollout.probe import Probe
from gspo_megatron.rollout.served import MOST_IN_VAIN, ServedSource
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.testing.fake_engine import FakeEngine, weights_of
from gspo_megatron.testing.fakes import TOKENIZER, OneRank, Replicas, Shelf, TablePolicy, config_of, trainer_of
from gspo_megatron.testing.time_limits import time_factor
from tests.rollout.test_engine_pool import wait_until

SETTINGS = ("train.steps=3", "train.eval_every=2", "rollout.prompts_per_step=4", "rollout.group_size=4")


def over_engines(
    config: Config,
    ranks: Ranks,
    *engines: FakeEngine,
    stop: Callable[[], bool] = lambda: False,
    most_starts: int = 3,
    most_in_flight: int = 256,
    **parts: object,
) -> Trainer:
    """A trainer whose rollouts come from the engines; on other ranks than the main one, too."""
    policy, r = TablePolicy(ranks), config.rollout

    def start(engine: Engine) -> None:
        assert isinstance(engine, FakeEngine)
        engine.start()

    def pool(wrong: Callable[[Engine], str], stop: Callable[[], bool]) -> EnginePool:
        return EnginePool(engines, probe=wrong, start=start, most_starts=most_starts, most_in_flight=most_in_flight)

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


class Polling(OneRank):
    """Looks for a stop while the main process works, as `Groups` does."""

    def from_main(self, work: Any, stop: Any) -> Any:
        stopped = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(work, stopped)
            while not stopped.is_set() and not running.done():
                if stop():
                    stopped.set()
                time.sleep(0.01)
        if stopped.is_set():
            raise StopRequested
        return running.result()


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
    assert isinstance(caught.value, EnginesDown)
    assert len(engine.asked) == MOST_IN_VAIN


def test_engines_that_no_start_brings_back_are_not_asked_again() -> None:
    engine = FakeEngine("engine 0", dies_after=9)
    trainer = over_engines(config_of(*SETTINGS), OneRank(), engine)
    updates = list[int]()

    def refused() -> None:
        raise EngineError("engine 0 ends at once")

    engine.start = refused  # type: ignore[method-assign]
    source = trainer.parts.source
    assert isinstance(source, ServedSource)
    give = source._give_weights
    source._give_weights = lambda: (updates.append(1), give())[1]  # type: ignore[method-assign]
    with pytest.raises(EnginesDown, match="engine 0 ends at once"):
        trainer.run()
    assert len(updates) == 1


def test_attempts_that_bring_something_are_not_counted() -> None:
    """The engine dies more often than MOST_IN_VAIN, each time a little later."""
    engine = FakeEngine("engine 0", dies_after=2)

    def start(start: Callable[[], None] = engine.start) -> None:
        start()
        lives.append(1)
        engine.dies_after = engine.rounds + 4 * len(lives) if len(lives) < MOST_IN_VAIN + 2 else -1

    lives, engine.start = list[int](), start  # type: ignore[method-assign]
    trainer = over_engines(config_of(*SETTINGS), OneRank(), engine, most_starts=20)
    assert trainer.run()
    assert len(lives) == MOST_IN_VAIN + 2


def test_a_stop_is_noticed_while_an_engine_starts_again() -> None:
    engine, asked = FakeEngine("engine 0", dies_after=9), threading.Event()

    def hang() -> None:
        asked.set()
        time.sleep(3600)

    engine.start = hang  # type: ignore[method-assign]
    trainer = over_engines(config_of(*SETTINGS), Polling(), engine, stop=asked.is_set)
    began = time.monotonic()
    assert not trainer.run()
    assert asked.is_set() and time.monotonic() - began < 20 * time_factor()


def test_a_stop_is_noticed_while_engines_start() -> None:
    def open_pool(wrong: object, stop: Callable[[], bool]) -> EnginePool:
        wait_until(stop)
        heard.append(1)
        raise StopRequested

    asked, heard = threading.Event(), list[int]()
    trainer = over_engines(config_of(*SETTINGS), Polling(), FakeEngine("engine 0"), stop=asked.is_set)
    source = trainer.parts.source
    assert isinstance(source, ServedSource)
    source.open_pool = open_pool
    threading.Timer(0.1, asked.set).start()
    assert not trainer.run() and heard


def test_a_stop_is_noticed_while_rewards_are_computed() -> None:
    asked, released = threading.Event(), threading.Event()

    class Slow:
        groups_at_once, most_lost = 1, 1.0

        def score(self, rollouts: Any) -> Any:
            asked.set()
            released.wait(60)
            return [(1.0, {}, "", False)] * len(rollouts)

    trainer = over_engines(config_of(*SETTINGS), Polling(), FakeEngine("engine 0"), stop=asked.is_set)
    source = trainer.parts.source
    assert isinstance(source, ServedSource)
    source.reward = Slow()
    with pytest.raises(StopRequested):
        source.groups(1)
    released.set()


def test_an_engine_that_says_it_has_new_weights_and_loads_nothing() -> None:
    """The policy moves by less than the probe's limit in an update."""
    engine = FakeEngine("engine 0", keeps_old=True)
    trainer = over_engines(config_of(*SETTINGS, "optimizer.lr=3e-4"), OneRank(), engine)
    with pytest.raises(WrongWeights, match=r"engine 0, after weights of version 2 .* has not loaded what it was sent"):
        trainer.run()
    # Updates that change nothing change nothing there.
    engine = FakeEngine("engine 0", keeps_old=True)
    assert over_engines(config_of(*SETTINGS, "optimizer.lr=1e-300"), OneRank(), engine).run()


@pytest.mark.parametrize("where", ["send", "tensors"])
def test_every_rank_learns_that_weights_could_not_be_sent(where: str) -> None:
    def failing(engines: object, weights: Weights) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/dev/shm")

    def run(ranks: Ranks) -> str:
        trainer = over_engines(config_of(*SETTINGS), ranks, FakeEngine("engine 0"))
        source = trainer.parts.source
        assert isinstance(source, ServedSource)
        if source.open_pool:
            pool = source.open_pool(source._wrong, lambda: False)
            if where == "send":
                pool._send = failing
            else:
                pool.give = lambda weights: failing((), weights)  # type: ignore[method-assign]
            source._pool = pool
        with pytest.raises(CannotSend) as caught:
            trainer.run()
        return str(caught.value)

    first, second = Replicas(2).run(run)
    assert first == second
    assert "weights of version 0 could not be sent to the engines: FileNotFoundError: " in first and "/dev/shm" in first


def test_ranks_meet_only_while_tensors_are_made() -> None:
    """What engines may need minutes for, before and after that, runs while the others wait without a time limit."""
    inside = list[str]()

    class Noting(OneRank):
        def from_main(self, work: Any, stop: Any) -> Any:
            inside.append("in")
            result = super().from_main(work, stop)
            inside.append("out")
            return result

    class Slow(FakeEngine):
        def _called(self, what: str) -> None:
            super()._called(what)
            inside.append(what)

    assert over_engines(config_of(*SETTINGS, "train.steps=1"), Noting(), Slow("engine 0")).run()
    at = inside.index("load 0")
    assert inside[:at] == ["in", "out", "in", "pause wait", "out"]
    assert inside[at + 1 : at + 6] == ["in", "resume", "version", "probe", "out"]


def test_what_was_whole_when_an_engine_died_is_kept() -> None:
    """An engine that dies within a step more often than may happen in vain: it has time for one group, or two."""
    settings = (*SETTINGS, "train.steps=1", "rollout.prompts_per_step=16")
    engine = FakeEngine("engine 0", dies_after=5)

    def start(start: Callable[[], None] = engine.start) -> None:
        start()
        engine.dies_after = engine.rounds + 5

    engine.start = start  # type: ignore[method-assign]
    trainer = over_engines(config_of(*settings), OneRank(), engine, most_starts=1000, most_in_flight=4)
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
