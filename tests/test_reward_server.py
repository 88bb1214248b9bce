"""The service of examples/reward_server, under uvicorn, as its README has a run ask it."""

from __future__ import annotations

import importlib.util
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.rewards.rewards import Rewards, score_rollouts
from gspo_megatron.testing.time_limits import time_factor
from tests.rewards.test_remote import rollouts

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
FOLDER = Path(__file__).parents[1] / "examples/reward_server"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    spec = importlib.util.spec_from_file_location("reward_server", FOLDER / "server.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARD_TOKEN", "secret")
        patch.setitem(__import__("sys").modules, "reward_server", module)
        spec.loader.exec_module(module)
        server = uvicorn.Server(uvicorn.Config(module.app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        start = time.monotonic()
        while not server.started:
            assert time.monotonic() - start < 20 * time_factor()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/score"
        server.should_exit = True
        thread.join()


def open_rewards(url: str, token: str) -> Rewards:
    block = re.findall(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)[0]
    (term,) = yaml.safe_load(block)["reward"]["terms"]
    assert term["url"] == "http://127.0.0.1:8000/score"
    term["url"] = url
    return Rewards({}, terms=[term], environment={"REWARD_TOKEN": token})


def test_the_server_scores_what_a_run_sends(url: str) -> None:
    rewards = open_rewards(url, "secret")
    rewards.check_services()
    texts = ["it is A", "no idea \ud800", "a", *["b"] * 17]
    found = rollouts(*texts)
    found[3].prompt = found[3].prompt.__class__(6, "why?", (2,), "")
    score_rollouts(rewards, found)
    rewards.close()
    assert [r.reward for r in found[:3]] == [0.5, 0.0, 1.0]  # the first is truncated
    assert found[1].reward_terms["remote/words"] == 3
    assert "ServiceError: ValueError: there is no answer to compare with" in found[3].reward_error
    assert [r.reward_error for r in found[4:]] == [""] * 16


@pytest.mark.parametrize(("token", "suffix", "error"), [("other", "", "HTTP 401"), ("secret", "s", "HTTP 404")])
def test_wrong_settings_are_refused_before_the_run(url: str, token: str, suffix: str, error: str) -> None:
    rewards = open_rewards(url + suffix, token)
    with pytest.raises(ConfigError, match=error):
        rewards.check_services()
    rewards.close()
