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
    for name in ("reward", "of_a_source", "of_a_set"):
        (tmp_path / f"{name}_by_content.py").write_text("def f(*, prompt, response, answer): return 0.0\n")
    (tmp_path / "host_by_content.py").write_text("def host(response): return None\n")
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "1>", "answer": name}) + "\n")
    config = load_config(
        None,
        [
            "precision.device=cpu",
            f"data.train={tmp_path}/train.jsonl",
            f"data.eval={{source: 'jsonl:{tmp_path}/eval.jsonl', reward: 'of_a_source_by_content:f'}}",
            "reward.functions.reward_by_content:f=1",
            "reward.functions.exact_match=1",
            "rollout.environment=host_by_content:host",
            f"eval.sets.more={{source: {tmp_path}/eval.jsonl, reward: 'of_a_set_by_content:f'}}",
        ],
    )
    before = contents_of(settle(config, 1))
    modules = {f"reward module {name}_by_content" for name in ("reward", "of_a_source", "of_a_set")}
    modules |= {"environment module host_by_content"}
    assert before.digests.keys() == {"data.train", "data.eval", "eval.sets.more", *modules}
    assert before.num_prompts == 1
    for name, file in (
        ("data.train", "train.jsonl"),
        ("data.eval", "eval.jsonl"),
        ("reward module reward_by_content", "reward_by_content.py"),
        ("reward module of_a_source_by_content", "of_a_source_by_content.py"),
        ("reward module of_a_set_by_content", "of_a_set_by_content.py"),
        ("environment module host_by_content", "host_by_content.py"),
    ):
        path = tmp_path / file
        was = path.read_text()
        path.write_text(was + "\n")
        after = contents_of(settle(config, 1)).digests
        read_there = {"data.eval", "eval.sets.more"} if name == "data.eval" else {name}
        assert {key for key in after if after[key] != before.digests[key]} == read_there
        path.write_text(was)
