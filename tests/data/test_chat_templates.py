"""Chat templates in the manner of each family: the text and the ids are those of transformers, refusals included."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.errors import DataError
from gspo_megatron.data.cache import Cache
from gspo_megatron.data.chat import ChatTemplate
from gspo_megatron.data.examples import RowReader
from gspo_megatron.data.hugging_face import HuggingFaceTokenizer
from gspo_megatron.data.jsonl import JsonlRows
from gspo_megatron.data.prompts import Filters, RowPrompts
from tests.data.test_hugging_face import CONVERSATIONS, TOOL
from tests.support.chat_templates import TEMPLATES
from tests.support.hugging_face import tokenizer_folder

THOUGHT = "<think>\nfirst 1,\nthen 2\n</think>\n\nThree."
MORE: dict[str, list[dict[str, Any]]] = {
    "system, thinking in the text, two turns": [
        {"role": "system", "content": "Be  brief. "},
        {"role": "user", "content": " 1 + 2? "},
        {"role": "assistant", "content": THOUGHT},
        {"role": "user", "content": "Sure?\n"},
    ],
    "two calls and their results, then thinking": [
        {"role": "user", "content": "12 + 30, and 1 + 1?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {"function": {"name": "add", "arguments": {"a": 12, "b": 30.5, "note": "«größer» <&>"}}},
                {"function": {"name": "add", "arguments": {"a": [1, None, True], "b": {"x": "一"}}}},
            ],
        },
        {"role": "tool", "content": "42.5"},
        {"role": "tool", "content": '{"sum": 2}'},
        {"role": "assistant", "content": "42.5 and 2", "reasoning_content": "\nboth are there\n"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]}],
    "the assistant first": [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}],
    "a tool first": [{"role": "tool", "content": "42"}, {"role": "user", "content": "Hi"}],
}
ARGUMENTS: list[dict[str, Any]] = [{}, {"enable_thinking": False, "thinking": True, "reasoning_effort": "high"}]
BOS = "<|bos|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer that puts BOS before a text, as Mixtral's and DeepSeek's do."""
    return tokenizer_folder(tmp_path_factory.mktemp("bos"), bos=True, template=None)


@cache
def ours(source: str, family: str) -> ChatTemplate:
    special = {"bos_token": BOS, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return ChatTemplate(source, special, name=family)


def outcome(render: Any) -> tuple[str, bool]:
    """(text, whether it was refused)."""
    try:
        return render(), False
    except Exception:
        return "", True


@pytest.mark.parametrize("family", TEMPLATES)
def test_transformers_has_the_same_text_and_ids(folder: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = TEMPLATES[family]
    tokenizer, template = HuggingFaceTokenizer(folder), ours(TEMPLATES[family], family)
    refused = 0
    for name, messages in (CONVERSATIONS | MORE).items():
        for tools in (None, [TOOL]):
            for arguments in ARGUMENTS:
                how = {"tools": tools, "add_generation_prompt": True, **arguments}
                expected = outcome(lambda: theirs.apply_chat_template(messages, tokenize=False, **how))  # noqa: B023
                found = outcome(lambda: template.with_arguments(arguments).render(messages, tools))  # noqa: B023
                assert found == expected, (name, tools, arguments)
                refused += found[1]
                if not found[1]:
                    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
                    assert tokenizer.encode(found[0]) == ids
    everything = 2 * len(ARGUMENTS) * len(CONVERSATIONS | MORE)
    assert refused < everything / 2, "most conversations have a text"


@pytest.mark.parametrize("family", TEMPLATES)
def test_what_a_template_says(family: str) -> None:
    """Without transformers: the last question, and where the answer begins."""
    text = ours(TEMPLATES[family], family).render(MORE["system, thinking in the text, two turns"])
    assert "Be  brief." in text and "Sure?" in text and "Three." in text
    assert text.startswith({"mixtral": BOS, "deepseek": BOS, "glm": "[gMASK]<sop>"}.get(family, "<|"))
    ends = {"qwen3": "<|im_start|>assistant\n", "mixtral": " [/INST]", "glm": "<|assistant|>"}
    assert text.endswith(
        ends.get(family, {"deepseek": "<Assistant></think>", "gpt_oss": "<|start|>assistant"}.get(family))
    )


def test_roles_that_do_not_alternate() -> None:
    with pytest.raises(DataError, match="roles must alternate"):
        ours(TEMPLATES["mixtral"], "mixtral").render(MORE["the assistant first"])


# --- BOS ---


def prompt_of(folder: Path, tmp_path: Path, template: str, said: str) -> tuple[int, ...]:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": said, "answer": ""}) + "\n")
    chat = ours(template, "a template")
    rows, cache = JsonlRows(tmp_path / "in.jsonl", Cache(tmp_path)), Cache(tmp_path)
    return RowPrompts("in", rows, RowReader(chat=chat), HuggingFaceTokenizer(folder), Filters(200), cache)[0].tokens


def test_bos_is_there_once(folder: Path, tmp_path: Path) -> None:
    """Template and tokenizer both have it."""
    [bos] = HuggingFaceTokenizer(folder).encode(BOS)
    tokens = prompt_of(folder, tmp_path, TEMPLATES["mixtral"], "1 + 1?")
    assert tokens[0] == bos and tokens.count(bos) == 1


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ bos_token }}{{ bos_token }}{{ messages[0].content }}", "1?"),
        ("{{ bos_token }}{{ messages[0].content }}", f"{BOS}1?"),
    ],
)
def test_a_doubled_bos_is_noticed(folder: Path, tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(DataError, match=r"in\.jsonl:1: the prompt begins with two BOS tokens"):
        prompt_of(folder, tmp_path, template, said)


# --- what follows a turn ---


@pytest.mark.parametrize("family", TEMPLATES)
def test_what_follows_a_turn_is_what_the_template_writes_behind_it(folder: Path, family: str) -> None:
    """Behind the text of the assistant, whatever it is, up to where its next turn begins: so that text never has to be
    rendered again."""
    template, asked = ours(TEMPLATES[family], family), [{"role": "user", "content": "12 + 30?"}]
    written = 0
    for role in ("tool", "user"):
        for said in ("Let me see.", "42", "{'a': [1]}"):
            reply = {"role": role, "content": "Sure?"}
            whole = outcome(lambda: template.render([*asked, {"role": "assistant", "content": said}, reply]))  # noqa: B023
            after = outcome(lambda: template.after_turn(asked, reply))  # noqa: B023
            assert after[1] == (whole[1] or "Sure?" not in whole[0]), (role, said)
            if not after[1]:
                written += 1
                assert whole[0].endswith(said + after[0]) and "Sure?" in after[0]
                assert role == "tool" or after[0].endswith(template.render(asked)[-5:]), "as the first turn began"
    assert written >= 3


def test_a_template_that_hides_what_was_said_is_refused() -> None:
    with pytest.raises(DataError, match="writes what an assistant said 0 times"):
        ours("{{ messages[0].content }}", "mute").after_turn(
            [{"role": "user", "content": "1?"}], {"role": "user", "content": "2?"}
        )
