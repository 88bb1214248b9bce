"""Settings of section `reward`: how responses are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gspo_megatron.config.declarations import setting


@dataclass(frozen=True)
class CodeConfig:
    """How the reward `code`, and the environment `python`, run the programs of responses."""

    isolation: str = setting(
        "auto",
        "What keeps them from the machine. auto: bwrap, else landlock, else the run does not start. none: nothing; "
        "they may do whatever you may.",
        choices=("auto", "bwrap", "landlock", "none"),
    )
    python: str | None = setting(None, "The Python that they run on. null: the one of the run, with its packages.")
    seconds: float = setting(
        5.0,
        "Computing that one run of a program may take, rounded up to whole seconds; waiting included, twice that. All "
        "tests of a program together: 0.8 * reward.timeout_s.",
        above=0,
        most=1e5,
    )
    memory_gib: float = setting(1.0, "Address space that it may have.", least=0.05, most=2**20)
    output_mib: float = setting(1.0, "How much it may print.", above=0, most=1024)


@dataclass(frozen=True)
class RewardConfig:
    """How responses are scored."""

    functions: dict[str, float] = setting(
        {},
        "Weights by name: a built-in reward, or package.module:function. With reward.terms empty, too: the generated "
        "task's own reward, or exact_match for a file.",
    )
    terms: list[dict[str, Any]] = setting(
        [],
        "More of them, each {function: NAME}, with name (default: the function), weight (1; of a gate, 0), gate (where "
        "the value is below 1, all later terms are 0), and the function's own parameters.",
    )
    accuracy: str | None = setting(
        None, "The function whose value of 1 or more counts as correct in eval/accuracy. null: the first one."
    )
    on_error: str = setting(
        "stop",
        "When a function raises or returns something other than a number: stop the run, or count it as reward 0.",
        choices=("stop", "count"),
    )
    isolate: bool = setting(
        True, "Call functions of your own in processes of their own. false: in the training process, unprotected."
    )
    workers: int = setting(
        0,
        "Such processes on each rank that scores. 0: the cores of the node divided by the ranks that score on it.",
        least=0,
        most=1024,
    )
    timeout_s: float = setting(
        60.0,
        "How long such a call may take; then the process is replaced, and the rollout's reward is 0.",
        above=0,
        most=1e6,
    )
    memory_gib: float = setting(4.0, "Memory that such a process may have of its own. 0: any.", least=0, most=2**20)
    most_lost: float = setting(
        0.5,
        "The run stops at a step of which a larger share of rollouts is lost: their processes hung or ended, or the "
        "sandbox of their programs failed.",
        least=0,
        most=1,
    )
    code: dict[str, Any] = setting(
        {}, "The sandbox of the reward code and the environment python, by the entries below.", entries=CodeConfig
    )
