"""The Python that a model runs programs on, in a real sandbox."""

from __future__ import annotations

import pytest

from gspo_megatron.base.batches import Prompt, Rollout
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.environments import environment_of
from gspo_megatron.build.programs import describe_sandbox
from gspo_megatron.environments.environment import Environment, Turn
from gspo_megatron.environments.python import PythonTool, Ran
from gspo_megatron.testing.fakes import TOKENIZER, config_of

SETTINGS = ("rollout.environment=python", "reward.code={seconds: 1, output_mib: 0.01}")


def replies(environment: Environment, *texts: str) -> list[Turn]:
    prompt = Prompt(0, "", (1,), "")
    return environment.replies([Rollout(i, prompt, [], [], False, 0, text=text) for i, text in enumerate(texts)])


def program(text: str) -> str:
    return f"Let me see. <python>{text}</python>"


def answered(output: str, failed: int = 0) -> Turn:
    return Turn(f"<output>{output}</output>", "assistant", calls=1, failed=failed)


def test_a_program_is_answered_with_what_it_printed() -> None:
    config = config_of(*SETTINGS)
    assert "sandbox" in next(describe_sandbox(config))
    environment = environment_of(config, TOKENIZER)
    environment.use_workers(3)
    said = replies(
        environment,
        program("print(6 * 7)"),
        program("\nx = 2\nprint(x)\n1 / 0\n"),
        program("open('/etc/passwd')"),
        program("while True: pass"),
        program("print('a' * 10**6)"),
        program("x = 1") + " and so on",
        "</python>",
        program("x = 1") + program("print('é')"),
    )
    environment.close()
    assert said[0] == answered("42")
    assert said[1] == answered("2\nZeroDivisionError: division by zero", failed=1)
    assert said[2].failed and "passwd" in said[2].content
    assert said[3] == answered("it took longer than 1 s", failed=1)
    assert said[4].content.endswith("it printed more than 0.01 MiB</output>") and len(said[4].content) < 2050
    assert said[4].content.startswith("<output>aaa") and "a ... a" in said[4].content
    assert said[5].done and said[6].done and said[7] == answered("é")


def test_a_sandbox_that_fails_ends_the_conversation() -> None:
    tool = PythonTool(lambda program: Ran("", error="the sandbox failed: no memory"))
    assert replies(tool, program("print(1)")) == [Turn(calls=1, error="the sandbox failed: no memory")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{end: ''}", "must not be empty"),
        ("{answer: done}", "must contain {output}"),
        ("{most_characters: 5}", "at least 20"),
        ("{run: print}", "multiple values for keyword argument 'run'"),
        ("{shell: true}", "unexpected keyword argument 'shell'"),
    ],
)
def test_arguments_that_cannot_work(arguments: str, said: str) -> None:
    config = config_of(*SETTINGS, f"rollout.environment_arguments={arguments}")
    with pytest.raises(ConfigError, match=rf"(?s)does not suit rollout.environment=python.*{said}"):
        environment_of(config, TOKENIZER)
