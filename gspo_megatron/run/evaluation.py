"""Held-out prompts: what is asked of each set, and the answers as metrics."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup, Sampling
from gspo_megatron.data.sources import PromptSource
from gspo_megatron.monitor.run_directory import RunWriter
from gspo_megatron.rewards.answers import answer_of
from gspo_megatron.rewards.rewards import Reward, Score
from gspo_megatron.run.estimates import Estimate, estimate, majority_at_k, pass_at_k

OF_DATA_EVAL = ("accuracy", "reward", "unscored_fraction")


class HeldOut(Protocol):
    """What answers held-out prompts: see `RolloutSource.held_out`."""

    def held_out(self, prompts: Seq[Prompt], n: int, sampling: Sampling, reward: Reward) -> list[RolloutGroup]: ...


class Judge(Reward, Protocol):
    """A reward, which of its responses are correct, and its trials before the run."""

    def check_answer(self, prompt: Prompt) -> None: ...

    @property
    def judged_by(self) -> str: ...

    def accuracy(self, rollout: Rollout) -> float: ...

    def try_functions(self, rollout: Rollout) -> Score: ...


@dataclass(frozen=True)
class EvalSet:
    """Held-out prompts, and what is asked of them.

    Attributes:
        name: in metrics and files; empty for data.eval.
        size: how many of the first prompts; None: all.
        n: responses to each.
        k: of pass@k and maj@k; each at most `n`.
        by: the field of the data by whose values results are also split.
    """

    name: str
    prompts: PromptSource
    size: int | None
    sampling: Sampling
    reward: Judge
    n: int = 1
    k: tuple[int, ...] = ()
    by: str | None = None

    @property
    def num_prompts(self) -> int:
        assert self.prompts.size is not None, "held-out prompts have an end"
        return min(self.size or self.prompts.size, self.prompts.size)

    def answered(self, source: HeldOut) -> Answered:
        """Collective."""
        prompts = [self.prompts[i] for i in range(self.num_prompts)]
        return Answered(self, source.held_out(prompts, self.n, self.sampling, self.reward))


@dataclass(frozen=True)
class Answered:
    """A set, or a part of it, with its responses."""

    of: EvalSet
    groups: Seq[RolloutGroup]

    @cached_property
    def correct(self) -> list[list[float]]:
        return [[self.of.reward.accuracy(r) for r in group.rollouts] for group in self.groups]

    @cached_property
    def answers(self) -> list[list[str | None]]:
        """What the majority votes on: what the function that decides about correctness reads from a response."""
        return [[answer_of(self.of.reward.judged_by, r.text) for r in group.rollouts] for group in self.groups]

    def values(self) -> dict[str, list[float]]:
        """Of each metric, a value for each prompt."""
        found = {
            "accuracy": [statistics.fmean(correct) for correct in self.correct],
            "reward": self._means(lambda rollout: rollout.reward),
        }
        for k in self.of.k:
            counts = [sum(map(int, correct)) for correct in self.correct]
            found[f"pass@{k}"] = [pass_at_k(self.of.n, c, k) for c in counts]
            both = zip(self.answers, self.correct, strict=True)
            found[f"maj@{k}"] = [majority_at_k(answers, correct, k) for answers, correct in both]
        found["response_length"] = self._means(lambda rollout: len(rollout.tokens))
        found["truncated_fraction"] = self._means(lambda rollout: rollout.truncated)
        found["unscored_fraction"] = self._means(lambda rollout: bool(rollout.reward_error))
        return found

    def estimates(self) -> dict[str, Estimate]:
        return {name: estimate(values) for name, values in self.values().items()}

    def metrics(self) -> dict[str, float]:
        """For a row of metrics.jsonl; of data.eval, those of OF_DATA_EVAL alone."""
        values = self.values()
        if not self.of.name:
            return {f"eval/{name}": statistics.fmean(values[name]) for name in OF_DATA_EVAL}
        accuracy = estimate(values["accuracy"])
        found = {name: statistics.fmean(each) for name, each in values.items()}
        found |= {"accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
        return {f"eval/{self.of.name}/{name}": value for name, value in found.items()}

    def parts(self) -> dict[str, Answered]:
        """By the values of `EvalSet.by`, in the order of the values."""
        if self.of.by is None:
            return {}
        found: dict[str, list[RolloutGroup]] = {}
        for group in self.groups:
            found.setdefault(str(group.prompt.metadata.get(self.of.by, "")), []).append(group)
        return {value: Answered(self.of, groups) for value, groups in sorted(found.items())}

    def rows(self) -> Iterator[dict[str, Any]]:
        """A line of a file for each response."""
        for group, correct, answers in zip(self.groups, self.correct, self.answers, strict=True):
            prompt = group.prompt
            for rollout, is_correct, answer in zip(group.rollouts, correct, answers, strict=True):
                yield {
                    **{"prompt_id": prompt.id, "prompt": prompt.text, "answer": prompt.answer},
                    **({self.of.by: prompt.metadata.get(self.of.by)} if self.of.by else {}),
                    **{"response": rollout.text, "answered": answer, "correct": bool(is_correct)},
                    **{"reward": rollout.reward, "reward_terms": rollout.reward_terms},
                    **({"reward_error": rollout.reward_error} if rollout.reward_error else {}),
                    **{"length": len(rollout.tokens), "truncated": rollout.truncated},
                }

    def _means(self, value: Callable[[Rollout], float]) -> list[float]:
        return [statistics.fmean(value(rollout) for rollout in group.rollouts) for group in self.groups]


@dataclass(frozen=True)
class Evaluation:
    """The held-out sets of a run.

    Attributes:
        kept: how many responses of each set are written; below 0: all.
    """

    source: HeldOut
    sets: Seq[EvalSet]
    writer: RunWriter | None
    kept: int

    def __call__(self, step: int) -> dict[str, float]:
        """The metrics of all sets, and how long that took. Collective."""
        start = time.perf_counter()
        found: dict[str, float] = {}
        for each in self.sets:
            answered = each.answered(self.source)
            found |= answered.metrics()
            if self.writer and self.kept:
                rows = islice(answered.rows(), None if self.kept < 0 else self.kept)
                self.writer.held_out(each.name, step, rows)
        return {**found, "time/eval_s": time.perf_counter() - start}
