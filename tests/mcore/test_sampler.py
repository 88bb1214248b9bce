"""Sampling from the training model itself, on real Megatron-Core."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import gspo_megatron
from gspo_megatron.base import tensors
from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import StopRequested
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.tokenizers import CharacterTokenizer
from gspo_megatron.device import open_device
from gspo_megatron.device.precision import RECIPES
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.packed_tokens import PackedTokens, packed
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.mcore.sampler import MegatronSampler
from gspo_megatron.rollout.native.sampling import Decoding, next_tokens, uniforms
from gspo_megatron.rollout.native.scheduler import DecodeScheduler
from gspo_megatron.rollout.native.stopping import Stops
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.small import SMALL

VOCAB_SIZE, PAD, EOS = 13, 0, 1
SETTINGS = (
    *SMALL,
    "model.max_sequence_length=24",
    "model.init_std=0.4",
    "rollout.temperature=0.8",
    "rollout.max_new_tokens=6",
)
PROMPTS = [
    Prompt(i, "", tokens, "") for i, tokens in enumerate([(3, 4, 5, 6, 7, 8, 9), (2,), (12, 11), (5, 5, 5, 5), (3, 4)])
]


def open_sampler(world_size: int, *overrides: str, dtype: str = "fp64") -> tuple[MegatronPolicy, MegatronSampler]:
    config = load_config(None, [*SETTINGS, f"precision.dtype={dtype}", *overrides])
    device = open_device("cpu", dtype)
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    policy = MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)
    return policy, MegatronSampler(policy, stops=Stops((EOS,)), pad_id=PAD)


def generate(
    world_size: int,
    overrides: tuple[str, ...],
    prompts: list[Prompt],
    ids: list[int],
    owner: int | None = None,
    **how: Any,
) -> list[Rollout]:
    """What this rank's sampler answers; with `owner`, the other data-parallel ranks bring no prompts."""
    policy, sampler = open_sampler(world_size, *overrides)
    idle = owner is not None and policy.groups.dp_rank != owner
    return sampler.generate([] if idle else prompts, [] if idle else ids, **how)


def one_process(
    *overrides: str, prompts: list[Prompt] = PROMPTS, ids: list[int] | None = None, **how: Any
) -> list[Rollout]:
    ids = ids if ids is not None else [100 + i for i in range(len(prompts))]
    return run_distributed(_generate_alone, 1, overrides, prompts, ids, how)[0]


def _generate_alone(
    overrides: tuple[str, ...], prompts: list[Prompt], ids: list[int], how: dict[str, Any]
) -> list[Rollout]:
    return generate(1, overrides, prompts, ids, **how)


def assert_same(ours: list[Rollout], theirs: list[Rollout]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert replace(a, log_probs=[], reward=0.0) == replace(b, log_probs=[], reward=0.0)
        assert a.log_probs == pytest.approx(b.log_probs, rel=0, abs=1e-12)


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    return one_process()


def test_a_response_ends_with_eos_or_at_the_limit(rollouts: list[Rollout]) -> None:
    assert [r.prompt for r in rollouts] == PROMPTS and [r.id for r in rollouts] == [100, 101, 102, 103, 104]
    for r in rollouts:
        assert len(r.log_probs) == len(r.tokens) <= 6 and all(x < 0 for x in r.log_probs)
        assert EOS not in r.tokens[:-1]
        assert r.truncated == (r.tokens[-1] != EOS)
        assert len(r.tokens) == 6 or not r.truncated
    assert len({len(r.tokens) for r in rollouts}) > 1, "the prompts were chosen so that some responses end early"


# --------------------------------------------------------------------------------------------------- what is drawn


def test_frequencies_follow_the_log_probs() -> None:
    """2,000 first tokens of one prompt: every count is within 5 standard deviations of what its log-prob says."""
    n = 2000
    drawn = one_process(
        "rollout.max_new_tokens=1", f"rollout.max_batch={n}", prompts=[PROMPTS[0]] * n, ids=list(range(n))
    )
    counts = Counter(r.tokens[0] for r in drawn)
    probability = {r.tokens[0]: math.exp(r.log_probs[0]) for r in drawn}
    assert len(counts) > 5
    for token, p in probability.items():
        assert abs(counts[token] - n * p) < 5 * math.sqrt(n * p * (1 - p)), f"token {token}"


def drawn_by_hand(greedy: bool) -> tuple[list[Rollout], list[Rollout]]:
    """The sampler's responses, and those of a loop that runs the whole sequence again for every token."""
    policy, sampler = open_sampler(1)
    [model], settings, by_hand = policy.model, policy.config.rollout, []
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            r = Rollout(i, prompt, [], [], True, policy.version)
            while len(r.tokens) < 6 and EOS not in r.tokens:
                sequence = torch.tensor([*prompt.tokens, *r.tokens])
                n = len(sequence)
                hidden = model(sequence, packed(torch.arange(n), torch.tensor([0, n]), n))
                logits = (hidden[-1] @ model.head_weight().T)[:, :VOCAB_SIZE]
                u = uniforms(policy.config.run.seed, np.array([i]), np.array([len(r.tokens)]))
                token, log_prob = next_tokens(
                    logits, torch.from_numpy(u), Decoding(settings.temperature, greedy=greedy)
                )
                r.tokens.append(int(token))
                r.log_probs.append(float(log_prob))
            r.truncated = r.tokens[-1] != EOS
            by_hand.append(r)
    return sampler.generate(PROMPTS, range(len(PROMPTS)), greedy=greedy), by_hand


@pytest.mark.parametrize("greedy", [False, True])
def test_responses_are_those_of_a_loop_without_a_cache(greedy: bool) -> None:
    [(drawn, by_hand)] = run_distributed(drawn_by_hand, 1, greedy)
    assert_same(drawn, by_hand)


# ------------------------------------------------------------------------------------------- what must not matter


def test_company_does_not_matter(rollouts: list[Rollout]) -> None:
    """In another order and beside other prompts, every rollout stays what it is."""
    # Prompts enter in two forwards: all together have 16 tokens.
    assert_same(one_process("model.max_sequence_length=13", "train.tokens_per_micro_batch=13"), rollouts)
    order = [4, 0, 3, 1, 2]
    shuffled = one_process(prompts=[PROMPTS[i] for i in order], ids=[100 + i for i in order])
    assert_same(sorted(shuffled, key=lambda r: r.id), rollouts)


GROUPS = [prompt for prompt in PROMPTS for _ in range(4)]


class Watched:
    """A sampler whose forwards are counted: their tokens, the caches that they fill, what it sends to the device, and
    what it reads from there."""

    def __init__(self, sampler: MegatronSampler) -> None:
        self.sampler, self.tokens, self.caches, self.reads = sampler, list[int](), set[Any](), HostReads()
        self.num_sent = 0
        sampler.policy.model[0].register_forward_hook(self.see)

    def see(self, model: Any, inputs: tuple[Tensor, PackedTokens], hidden: Tensor) -> None:
        tokens_T, packed_tokens = inputs
        assert packed_tokens.through_cache is not None
        cache = packed_tokens.through_cache.cache
        self.tokens.append(len(tokens_T))
        layers = [cache.layer(layer.layer_number, [torch.empty(0, 2, 8)] * 2) for layer in model.decoder.layers]
        self.caches.add(tuple((x.data_ptr(), tuple(x.shape)) for kept in layers for x in kept))

    def generate(self, *args: Any, **how: Any) -> list[Rollout]:
        self.tokens, self.caches, self.reads = [], set(), HostReads()
        with self.reads, patch.object(tensors, "on_device", wraps=tensors.on_device) as on_device:
            drawn = self.sampler.generate(*args, **how)
        self.num_sent = on_device.call_count
        return drawn


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for a device, where the package asks for it: not in Megatron's modules, nor in
    the one that stands for Megatron's experts and asks for the same counts."""

    NAMES = ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in self.NAMES:
            frame = sys._getframe(1)
            while Path(torch.__file__).parent in Path(frame.f_code.co_filename).parents and frame.f_back:
                frame = frame.f_back
            file = Path(frame.f_code.co_filename)
            self.count += Path(gspo_megatron.__file__).parent in file.parents and file.name != "experts.py"
        return function(*args, **(kwargs or {}))


class Generated(NamedTuple):
    rollouts: list[Rollout]
    tokens: list[int]
    num_caches: int
    reads: int
    num_sent: int


def with_max_batch(sizes: list[int], greedy: bool) -> list[Generated]:
    sampler = open_sampler(1)[1]
    watched, answers = Watched(sampler), []
    for size in sizes:
        sampler.settings = replace(sampler.settings, max_batch=size)
        drawn = watched.generate(GROUPS, range(len(GROUPS)), greedy=greedy)
        answers.append(Generated(drawn, watched.tokens, len(watched.caches), watched.reads.count, watched.num_sent))
    return answers


@pytest.mark.parametrize("greedy", [False, True])
def test_max_batch_does_not_matter(greedy: bool) -> None:
    """Twenty rollouts of five prompts, from one at a time to all together: the same rollouts, in one cache, for one
    copy to the device and one read of the host a forward. Rows that have become free are taken, and no token is
    computed for nobody."""
    sizes = [1, 2, 3, 5, 8, 13, 16, 100]
    [answers] = run_distributed(with_max_batch, 1, sizes, greedy)
    lengths = [len(r.tokens) for r in answers[0].rollouts]
    assert len(set(lengths)) > 2
    once = sum(len(p.tokens) for p in PROMPTS)
    for size, (drawn, tokens, num_caches, reads, num_sent) in zip(sizes, answers, strict=True):
        assert_same(drawn, answers[0].rollouts)
        assert num_caches == 1 and reads == num_sent == len(tokens)
        prefilled = sum(tokens) - sum(n - 1 for n in lengths)
        # Four rollouts are a quarter of sixteen rows.
        assert prefilled == once if size >= 16 else once <= prefilled <= 4 * once
        one_batch_after_another = sum(max(lengths[i : i + size]) for i in range(0, len(lengths), size))
        assert len(tokens) <= one_batch_after_another
        assert len(tokens) < one_batch_after_another or size not in (3, 8, 16)
        if size < 8:  # a quarter of the rows is one: no row waits. The bound of Graham 1969, doi 10.1137/0117039.
            assert len(tokens) <= (sum(lengths) + (size - 1) * max(lengths)) / size


def together_and_alone(prompts: list[Prompt]) -> tuple[list[Rollout], list[Rollout]]:
    sampler = open_sampler(1)[1]
    alone = [sampler.generate([prompt], [i])[0] for i, prompt in enumerate(prompts)]
    return sampler.generate(prompts, range(len(prompts))), alone


def test_rollouts_of_a_prompt_share_its_prefill_and_nothing_else() -> None:
    [(group, alone)] = run_distributed(together_and_alone, 1, [PROMPTS[0], PROMPTS[1]] * 3)
    assert_same(group, alone)
    assert len({tuple(r.tokens) for r in group[::2]}) == 3, "the rollouts of a prompt differ"


@pytest.mark.parametrize("axes", [("parallel.ep=2",), ()])
def test_a_rank_without_prompts_takes_part(axes: tuple[str, ...], rollouts: list[Rollout]) -> None:
    ids = [r.id for r in rollouts]
    for owner in (0, 1):
        ranks = run_distributed(generate, 2, 2, ("rollout.max_batch=3", *axes), PROMPTS, ids, owner)
        assert ranks[1 - owner] == []
        assert_same(ranks[owner], rollouts)


def generate_uneven(world_size: int, overrides: tuple[str, ...]) -> tuple[list[Rollout], int, int]:
    """Data-parallel rank 0 brings rollouts 0, 1 and 2, the next one the others: also forwards and reads."""
    policy, sampler = open_sampler(world_size, *overrides)
    watched, mine = Watched(sampler), slice(0, 3) if policy.groups.dp_rank == 0 else slice(3, 20)
    drawn = watched.generate(GROUPS[mine], range(20)[mine])
    return drawn, len(watched.tokens), watched.reads.count


@pytest.mark.parametrize(
    ("world_size", "axes"),
    [
        (2, ()),
        (2, ("parallel.ep=2", "parallel.token_dispatcher=allgather")),
        (4, ("parallel.ep=4", "parallel.tp=2", "parallel.etp=1", "parallel.token_dispatcher=allgather")),
        (4, ("parallel.pp=2", "parallel.vpp=2", "model.num_layers=4", "parallel.ep=2")),
    ],
)
def test_ranks_refill_at_times_of_their_own(world_size: int, axes: tuple[str, ...]) -> None:
    """Five rows; one rank has three rollouts, the other seventeen. The host reads once a forward, and once ahead."""
    layers = tuple(x for x in axes if x.startswith("model."))
    expected = one_process(*layers, prompts=GROUPS, ids=list(range(20)))
    ranks = run_distributed(generate_uneven, world_size, world_size, ("rollout.max_batch=5", *axes))
    parts = 2 if "parallel.vpp=2" in axes else 1
    assert len({num_forwards for _, num_forwards, _ in ranks}) == 1
    for drawn, num_forwards, reads in ranks:
        assert_same(drawn, expected[:3] if len(drawn) == 3 else expected[3:])
        assert reads == num_forwards // parts + 1
    assert sorted(len(drawn) for drawn, *_ in ranks) == [3] * (world_size // 2) + [17] * (world_size // 2)


@pytest.mark.parametrize("axes", [("parallel.tp=2",), ("parallel.pp=2",)])
def test_every_rank_of_a_replica_has_the_rollouts(axes: tuple[str, ...], rollouts: list[Rollout]) -> None:
    for ours in run_distributed(generate, 2, 2, axes, PROMPTS, [r.id for r in rollouts]):
        assert_same(ours, rollouts)


# ------------------------------------------------------------------------------------------------------ short ones


def test_one_new_token(rollouts: list[Rollout]) -> None:
    first = one_process("rollout.max_new_tokens=1")
    assert [r.tokens for r in first] == [r.tokens[:1] for r in rollouts]
    assert [r.truncated for r in first] == [r.tokens[0] != EOS for r in rollouts]


def ends_at_once() -> tuple[list[int], list[Rollout]]:
    policy, sampler = open_sampler(1)
    favourite = sampler.generate(PROMPTS[:1], [0], greedy=True)[0].tokens[0]
    return favourite, MegatronSampler(policy, stops=Stops((favourite,)), pad_id=PAD).generate(
        PROMPTS[:1] * 2, [0, 1], greedy=True
    )


def test_eos_as_the_first_token() -> None:
    [(favourite, drawn)] = run_distributed(ends_at_once, 1)
    assert [(r.tokens, r.truncated) for r in drawn] == [([favourite], False)] * 2


STOPS = Stops((EOS,), (b"79", b"5>5", b"82", b"00"), CharacterTokenizer("0123456789>").token_bytes())


def with_and_without_stops(world_size: int, axes: tuple[str, ...]) -> tuple[list[Rollout], list[Rollout]]:
    policy, sampler = open_sampler(world_size, *axes, "rollout.max_new_tokens=12", "rollout.max_batch=8", dtype="fp32")
    ending = MegatronSampler(policy, stops=STOPS, pad_id=PAD)
    rank, size = policy.groups.dp_rank, policy.groups.dp_size
    arguments = (PROMPTS * 12)[rank::size], range(60)[rank::size]
    return sampler.generate(*arguments), ending.generate(*arguments)


@pytest.mark.parametrize("axes", [(), ("parallel.tp=2",), ("parallel.pp=2",), ("parallel.ep=2",)])
def test_a_stop_string_cuts_what_would_have_been_drawn(axes: tuple[str, ...]) -> None:
    """On every layout: random numbers depend on the rollout and the position, so the tokens up to the stop are those
    without it."""
    tokenizer, cut = CharacterTokenizer("0123456789>"), 0
    for whole, ended in run_distributed(with_and_without_stops, 1 + bool(axes), 1 + bool(axes), axes):
        for a, b in zip(whole, ended, strict=True):
            texts = [tokenizer.decode(a.tokens[: n + 1]).encode() for n in range(len(a.tokens))]
            end = next((n for n, text in enumerate(texts, 1) if any(s in text for s in STOPS.strings)), None)
            assert b.tokens == (a.tokens if end is None else a.tokens[:end])
            assert len(b.log_probs) == len(b.tokens)
            assert b.truncated == (end is None and a.truncated)
            cut += end is not None
    assert cut > 5


def test_no_prompts_at_all() -> None:
    assert one_process(prompts=[]) == []


# ------------------------------------------------------------------------------------------------------ stopping


def stopped_at(ask: int) -> tuple[int, bool, list[Rollout], list[Rollout]]:
    """Rank 1 is to stop from its `ask`-th question on: how often this rank asked, whether the model is left in training
    mode, and what is drawn by a sampler that was stopped and one that was not."""
    policy, sampler = open_sampler(2, "parallel.ep=2", "rollout.max_batch=3")
    arguments = PROMPTS, range(100, 105)
    undisturbed, asked = sampler.generate(*arguments), 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return policy.groups.dp_rank == 1 and asked >= ask

    sampler.stop = stop
    with pytest.raises(StopRequested):
        sampler.generate(*arguments)
    sampler.stop = lambda: False
    return asked, all(chunk.training for chunk in policy.chunks), undisturbed, sampler.generate(*arguments)


@pytest.mark.parametrize("ask", [1, 2, 5])
def test_all_stop_where_one_is_asked_to(ask: int) -> None:
    """At once, on all ranks together; what is drawn afterwards is what would have been drawn."""
    for asked, training, undisturbed, afterwards in run_distributed(stopped_at, 2, ask):
        assert asked == ask and training
        assert_same(afterwards, undisturbed)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("fp8", RECIPES)
def test_every_forward_has_rows_that_a_number_format_takes(fp8: str, tp: int) -> None:
    """On every tensor-parallel rank, and gathered. The sampler is built around a policy of settings alone, since no CPU
    computes in FP8."""
    config = load_config(None, [*SETTINGS, f"precision.fp8={fp8}", "precision.dtype=bf16", f"parallel.tp={tp}"])
    policy = SimpleNamespace(config=config, groups=None, device=SimpleNamespace(torch_device=torch.device("cpu")))
    sampler = MegatronSampler(policy, stops=Stops((EOS,)), pad_id=PAD)  # type: ignore[arg-type]
    scheduler = DecodeScheduler(
        PROMPTS, range(5), max_rows=8, max_new_tokens=6, max_prompt_tokens=64, num_micro_batches=1, stops=sampler.stops
    )
    (micro_batch,) = scheduler.next_micro_batches()
    own = len(sampler._feed(scheduler, 1, micro_batch, 0).tokens_T)
    assert own >= sum(len(prompt.tokens) for prompt in PROMPTS)
    assert own % (tp * RECIPES[fp8].row_multiple) == 0
