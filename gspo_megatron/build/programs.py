"""The sandbox of the reward `code` and of the environment `python`, as settings describe it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.set_specs import all_sources
from gspo_megatron.config.reward import CodeConfig
from gspo_megatron.config.sections import Config
from gspo_megatron.environments.environments import runs_programs
from gspo_megatron.environments.python import Ran
from gspo_megatron.rewards.isolations import interpreter
from gspo_megatron.rewards.sandbox import Ended, Limits, Sandbox, settled

CODE = "code"
"""The name of the reward."""
SHARE_OF_A_CALL = 0.8
"""Of reward.timeout_s, for the tests of a program: beyond that, its process would be ended and its reward lost."""


def sandbox_of(config: Config) -> dict[str, Any]:
    """What the reward is called with.

    Raises:
        ConfigError: the isolation does not work here, or the times contradict each other.
    """
    code, total_s = _settled(config), SHARE_OF_A_CALL * config.reward.timeout_s
    if 2 * code.seconds > total_s:
        raise ConfigError(
            f"reward.code.seconds={code.seconds:g}: twice that, the most a run of a program may take, must be at most "
            f"{SHARE_OF_A_CALL:g} * reward.timeout_s={total_s:g} s; raise reward.timeout_s"
        )
    return {**asdict(code), "total_seconds": total_s}


def runner_of(config: Config) -> Callable[[str], Ran]:
    """What runs the programs of the environment `python`.

    Raises:
        ConfigError: the isolation does not work here.
    """
    code = _settled(config)
    limits = Limits(code.seconds, int(code.memory_gib * 2**30), int(code.output_mib * 2**20))
    sandbox = Sandbox(code.isolation, limits, code.python)
    return lambda program: _ran(sandbox.run(program), code)


def _ran(ended: Ended, code: CodeConfig) -> Ran:
    if ended.how == "sandbox_failed":
        return Ran("", error=f"the sandbox failed: {ended.errors}")
    said = ended.errors.strip().splitlines()[-1:] or [f"it ended with status {ended.status}"]
    failures = {
        "timed_out": f"it took longer than {code.seconds:g} s",
        "too_much_output": f"it printed more than {code.output_mib:g} MiB",
        "exited": said[0] if ended.status else "",
    }
    return Ran(ended.output.decode(errors="replace"), failures[ended.how])


def _settled(config: Config) -> CodeConfig:
    """With what reward.code.isolation=auto stands for on this machine.

    Raises:
        ConfigError: the isolation does not work here.
    """
    code = CodeConfig(**config.reward.code)
    return replace(code, isolation=settled(code.isolation, code.python))


def check_programs(config: Config) -> None:
    """Refuses settings of a sandbox that nothing runs in.

    Raises:
        ConfigError: there are such settings.
    """
    if config.reward.code and not _runs_programs(config):
        raise ConfigError(
            f"reward.code={config.reward.code} has no effect without the reward {CODE} or rollout.environment=python; "
            "remove it"
        )


def describe_sandbox(config: Config) -> Iterator[str]:
    """A line on what the programs of responses run in, where there are any."""
    if not _runs_programs(config):
        return
    code = _settled(config)
    version, limits = interpreter(code.python).version, f"{code.seconds:g} s, {code.memory_gib:g} GiB"
    is_open = code.isolation == "none"
    where = "no sandbox, as reward.code.isolation=none asks" if is_open else f"sandbox {code.isolation}"
    yield f"programs of responses run on Python {version}, each with at most {limits}: {where}"


def _runs_programs(config: Config) -> bool:
    return CODE in reward_names(config) or runs_programs(config.rollout.environment)


def reward_names(config: Config) -> Iterator[str]:
    """The functions of all rewards: those of the run, and those that sources and held-out sets have of their own."""
    yield from config.reward.functions
    yield from (str(term.get("function")) for term in config.reward.terms)
    for source in all_sources(config):
        yield from source.reward or ()
