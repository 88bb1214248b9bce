"""Files are known by their content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gspo_megatron.base.files import READ_WHOLE, digest_of
from gspo_megatron.build.contents import contents_of
from gspo_megatron.build.inputs import settle
from gspo_megatron.config.loading import load_config


def test_a_digest_knows_bytes_and_where_a_file_ends(tmp_path: Path) -> None:
    def digest(*contents: bytes) -> str:
        files = [tmp_path / str(i) for i in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        return digest_of(*files)

    assert digest(b"ab", b"c") == digest(b"ab", b"c")
    assert len({digest(b"ab", b"c"), digest(b"a", b"bc"), digest(b"abc"), digest(b"ab", b"d")}) == 4


@pytest.mark.parametrize("place", [0, (READ_WHOLE + 12345) // 63 * 10, READ_WHOLE + 12345 + (1 << 20) - 1])
def test_a_large_file_is_sampled(tmp_path: Path, place: int) -> None:
    file = tmp_path / "large"
    with file.open("wb") as out:
        out.truncate(READ_WHOLE + 12345 + (1 << 20))  # sparse: it takes no space
    before = digest_of(file)
    with file.open("r+b") as out:
        out.seek(place)
        out.write(b"x")
    assert digest_of(file) != before


def test_data_tokenizer_rewards_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "reward_by_content.py").write_text("def f(*, prompt, response, answer): return 0.0\n")
    (tmp_path / "host_by_content.py").write_text("def host(response): return None\n")
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "1>", "answer": name}) + "\n")
    config = load_config(
        None,
        [
            "precision.device=cpu",
            f"data.train={tmp_path}/train.jsonl",
            f"data.eval=jsonl:{tmp_path}/eval.jsonl",
            "reward.functions.reward_by_content:f=1",
            "reward.functions.exact_match=1",
            "rollout.environment=host_by_content:host",
        ],
    )
    before = contents_of(settle(config, 1))
    modules = {"reward module reward_by_content", "environment module host_by_content"}
    assert before.digests.keys() == {"data.train", "data.eval", *modules}
    assert before.num_prompts == 1
    for name, file in (
        ("data.train", "train.jsonl"),
        ("data.eval", "eval.jsonl"),
        ("reward module reward_by_content", "reward_by_content.py"),
        ("environment module host_by_content", "host_by_content.py"),
    ):
        path = tmp_path / file
        was = path.read_text()
        path.write_text(was + "\n")
        after = contents_of(settle(config, 1)).digests
        assert {key for key in after if after[key] != before.digests[key]} == {name}
        path.write_text(was)
