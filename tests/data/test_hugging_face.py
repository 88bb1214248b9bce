"""Tokenizers and chat templates of Hugging Face folders, against transformers where it is installed."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.build.inputs import Inputs, settle
from gspo_megatron.config.loading import load_config, to_yaml
from gspo_megatron.data import chat
from gspo_megatron.data.chat import ChatTemplate
from gspo_megatron.data.hugging_face import HuggingFaceTokenizer
from gspo_megatron.data.sources import DataSpec, open_source
from gspo_megatron.data.tokenizers import CharacterTokenizer, load_tokenizer
from tests.support.hugging_face import tokenizer_folder

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": "number, «größer»", "b": None}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "user", "content": "What is 12 plus 30?"}],
    "a system prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "一二三 <b>&amp;</b> 🙂"},
    ],
    "several turns, with thinking": [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "one", "reasoning_content": "\nhm\n"},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "two", "reasoning_content": "hm, hm"},
    ],
    "tools": [
        {"role": "user", "content": "12 plus 30?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 12}}}]},
        {"role": "tool", "content": {"sum": 42, "why": "'quoted' <é>"}},
    ],
    "white space": [{"role": "user", "content": "  two lines\n\n  and more \n"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="module")
def folder_with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("bos"), bos=True)


# --- the tokenizer ---


def test_special_tokens_are_those_of_the_folder(folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(folder)
    ids = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert tokenizer.stop_ids == (ids["<|im_end|>"], ids["<|endoftext|>"])
    assert tokenizer.eos_id == ids["<|im_end|>"] and tokenizer.pad_id == ids["<|endoftext|>"]
    assert tokenizer.vocab_size == max(ids.values()) + 3  # the two that were added later


@pytest.mark.parametrize(
    "text", ["What is 12?", "  über 🙂\n\n一", "<|im_start|>user\nhi<|im_end|>", "<think>a</think>"]
)
def test_text_survives(folder: Path, text: str) -> None:
    """Special tokens are left out of a decoded text; <think> is none, and rewards read it."""
    tokenizer = HuggingFaceTokenizer(folder)
    expected = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    with pytest.raises(DataError, match="token id 9999 is outside"):
        tokenizer.decode([9999])


def test_a_prompt_begins_with_one_bos(folder: Path, folder_with_bos: Path) -> None:
    tokenizer = HuggingFaceTokenizer(folder_with_bos)
    (bos,) = tokenizer.encode("<|bos|>")
    assert tokenizer.encode_prompt("12") == [bos, *tokenizer.encode("12")]
    assert tokenizer.encode_prompt("<|bos|>12") == [bos, *tokenizer.encode("12")]
    without = HuggingFaceTokenizer(folder)
    assert without.encode_prompt("12") == without.encode("12")


def test_a_setting_names_a_folder_or_its_file(folder: Path) -> None:
    for spec in (str(folder), str(folder / "tokenizer.json")):
        assert isinstance(load_tokenizer(spec), HuggingFaceTokenizer)


def change(folder: Path, to: Path, name: str, text: str | None) -> Path:
    """A copy of the folder with one file written or, with None, left out."""
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    (to / name).unlink(missing_ok=True)
    if text is not None:
        (to / name).write_text(text)
    return to


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json is not a tokenizer of the `tokenizers` package"),
        ("tokenizer.json", None, r"a folder without tokenizer\.json"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds list, expected a JSON object"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', r"eos_token '</s>' is not in tokenizer\.json"),
        ("generation_config.json", '{"eos_token_id": [2, 100000]}', r"eos_token_id 100000 is not one of the \d+ ids"),
        ("generation_config.json", '{"eos_token_id": "x"}', r"eos_token_id 'x' is not one of"),
        ("chat_template.jinja", "{% for %}", r"chat_template\.jinja, line 1, is not a Jinja template"),
    ],
)
def test_a_folder_that_cannot_be_used(folder: Path, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(change(folder, tmp_path / "changed", name, text)))


def test_a_folder_without_an_end(folder: Path, tmp_path: Path) -> None:
    changed = change(folder, tmp_path / "changed", "generation_config.json", None)
    (changed / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="names no end of sequence"):
        HuggingFaceTokenizer(changed)
    (changed / "config.json").write_text('{"eos_token_id": 2}')
    assert HuggingFaceTokenizer(changed).stop_ids == (2,)


# --- the chat template ---


def test_the_text_of_a_conversation(folder: Path) -> None:
    template = HuggingFaceTokenizer(folder).chat_template
    assert template is not None
    assert template.render(CONVERSATIONS["a question"]) == (
        "<|im_start|>user\nWhat is 12 plus 30?<|im_end|>\n<|im_start|>assistant\n"
    )
    silent = template.with_arguments({"enable_thinking": False})
    assert silent.render(CONVERSATIONS["a question"]).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        ("{{ raise_exception('only users') }}", [{"role": "user"}], "only users"),
        ("{{ messages[0].content.x.y }}", [{"role": "user", "content": "x"}], "UndefinedError"),
        ("{{ messages[0].content + 1 }}", [{"role": "user", "content": "x"}], "TypeError"),
        ("{{ ''.__class__.__mro__ }}", [{"role": "user"}], "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", [{"role": "user"}], "RecursionError"),
        ("x", [{"content": "x"}], "message 1 is .* expected an object with a role"),
        ("x", ["text"], "message 1 is 'text'"),
    ],
)
def test_a_conversation_that_a_template_refuses(source: str, messages: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatTemplate(source, {}, name="a template").render(messages)


def test_a_template_that_loops_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "LIMIT_S", 0.3)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=r"was not done after 0\.3 s; does it loop\?"):
        ChatTemplate(loop, {}, name="a template").render([{"role": "user"}])


DATED = "{{ strftime_now('%d %b %Y %H:%M') }} {{ messages[0].content }}"


def test_a_template_tells_one_day_for_a_whole_run(folder: Path, tmp_path: Path) -> None:
    """The day on which the run began, also when it continues on another one."""
    tokenizer = str(change(folder, tmp_path / "dated", "chat_template.jinja", DATED))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    own = [f"data.{split}={tmp_path / 'prompts.jsonl'}" for split in ("train", "eval")]
    own += [f"data.tokenizer={tokenizer}", "data.chat=true", f"run.dir={tmp_path / 'run'}"]

    def settled(*more: str) -> Inputs:
        return settle(load_config(None, [*own, *more]), 1)

    (tmp_path / "run").mkdir()
    first = settled("data.chat_date=2025-03-01")
    assert first.train_prompts[0].text == "01 Mar 2025 00:00 1+1?"
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(first.config))
    of_path = f"checkpoint.load={tmp_path / 'run' / 'checkpoints' / 'step_000001'}"
    for load in ("checkpoint.load=latest", of_path):
        assert settled(load).config.data.chat_date == "2025-03-01"
        assert settled(load).train_prompts[0].text == first.train_prompts[0].text
    today = settled().config.data.chat_date
    assert today in {(datetime.now(timezone.utc) - timedelta(seconds=s)).date().isoformat() for s in (0, 600)}
    # Held-out sets alone may be conversations; an environment writes into all with one template.
    of_a_set = f"eval.sets.x={{source: {tmp_path / 'prompts.jsonl'}, chat: true}}"
    inputs = settled("data.chat=false", of_a_set, "data.chat_date=2025-03-01")
    assert inputs.sets[1].prompts[0].text == first.train_prompts[0].text and inputs.train_prompts[0].text == "1+1?"
    other = of_a_set.replace("chat: true", "chat_arguments: {add_generation_prompt: false}")
    with pytest.raises(ConfigError, match="2 different settings of the chat template"):
        settled(other, "rollout.environment=calculator")
    with pytest.raises(ConfigError, match=r"data\.chat_date=1\.3\.2025 is not a day"):
        settled("data.chat_date=1.3.2025")
    undated = f"data.tokenizer={folder}"
    assert settled(undated).config.data.chat_date is None
    with pytest.raises(ConfigError, match=r"data\.chat_date=2025-03-01 has no effect: .* does not call strftime_now"):
        settled(undated, "data.chat_date=2025-03-01")
    with pytest.raises(ConfigError, match="has no effect without a chat template"):
        settled("data.chat=false", "data.chat_date=2025-03-01")


# --- prompts ---


def prompts(folder: Path, tmp_path: Path, record: dict[str, Any], **options: Any) -> Any:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(record) + "\n")
    spec = DataSpec(str(path), "train", max_prompt_tokens=100, **options)
    return open_source(spec, HuggingFaceTokenizer(folder), seed=0)[0]


def test_prompts_from_conversations(folder: Path, tmp_path: Path) -> None:
    record = {"prompt": "1+1?", "answer": "2", "chat": CONVERSATIONS["a system prompt"]}
    tokenizer = HuggingFaceTokenizer(folder)
    assert tokenizer.chat_template is not None
    plain = prompts(folder, tmp_path, record)
    assert plain.text == "1+1?" and list(plain.tokens) == tokenizer.encode("1+1?")
    asked = prompts(folder, tmp_path, record, chat=True, prompt_template="Solve {prompt}")
    assert asked.text == tokenizer.chat_template.render([{"role": "user", "content": "Solve 1+1?"}])
    assert list(asked.tokens) == tokenizer.encode(asked.text) and asked.answer == "2"
    whole = prompts(folder, tmp_path, record, messages_field="chat", chat_arguments={"enable_thinking": False})
    silent = tokenizer.chat_template.with_arguments({"enable_thinking": False})
    assert whole.text == silent.render(CONVERSATIONS["a system prompt"])


def test_a_conversation_that_cannot_be_used_is_named_by_its_line(folder: Path, tmp_path: Path) -> None:
    for value, message in (
        ("hi", r"prompts\.jsonl:1: field 'chat' is \"hi\"; expected messages"),
        ([], "expected messages"),
        ([{"role": "robot", "content": ""}], r"prompts\.jsonl:1: .*Unexpected role robot"),
    ):
        with pytest.raises(DataError, match=message):
            prompts(folder, tmp_path, {"answer": "2", "chat": value}, messages_field="chat")
    with pytest.raises(DataError, match="no field 'chats'; did you mean 'chat'"):
        prompts(folder, tmp_path, {"answer": "2", "chat": []}, messages_field="chats")


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    for options, message in (
        ({"chat": True}, "data.chat=true needs a tokenizer with a chat template"),
        ({"messages_field": "m"}, "data.messages_field=m needs a tokenizer"),
        ({"chat_arguments": {"a": 1}}, "data.chat_arguments=.* would not be used"),
    ):
        spec = DataSpec(str(tmp_path / "prompts.jsonl"), "train", max_prompt_tokens=9, **options)
        with pytest.raises(ConfigError, match=message):
            open_source(spec, CharacterTokenizer("01"), seed=0)


# --- against transformers ---


@pytest.mark.parametrize("with_bos", [False, True])
def test_transformers_has_the_same_ids(folder: Path, folder_with_bos: Path, with_bos: bool) -> None:
    transformers = pytest.importorskip("transformers")
    path = folder_with_bos if with_bos else folder
    ours, theirs = HuggingFaceTokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    for text in ("What is 12 plus 30?", " über\n🙂", "<|im_start|>user\n1<|im_end|>", "<think>\n\n</think>"):
        ids = theirs.encode(text)
        assert ours.encode_prompt(text) == ids
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}])
def test_transformers_renders_the_same_text(folder: Path, messages: list[Any], arguments: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    template = HuggingFaceTokenizer(folder).chat_template
    assert template is not None
    for tools in (None, [TOOL]):
        expected = theirs.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **arguments
        )
        assert template.with_arguments(arguments).render(messages, tools) == expected
