"""Stop ids and stop strings, against a search of the decoded text after every token."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_megatron.base.errors import ConfigError, DataError
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.hugging_face import HuggingFaceTokenizer
from gspo_megatron.data.tokenizers import CharacterTokenizer
from gspo_megatron.rollout.native.stopping import Stops, StopTable, stops_of
from tests.support.hugging_face import tokenizer_folder


def length_of(table: StopTable, tokens: list[int]) -> int | None:
    """Tokens up to the one that ends the response."""
    state = 0
    for number, token in enumerate(tokens, start=1):
        state = int(table.after[state, token])
        if state == table.end:
            return number
    return None


@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    pieces=st.lists(st.text("ab", max_size=3), min_size=1, max_size=6),
    data=st.data(),
)
def test_the_first_token_with_which_the_text_contains_a_string(
    strings: list[str], pieces: list[str], data: st.DataObject
) -> None:
    """Strings that overlap, contain each other, begin alike; tokens that hold several characters, or none."""
    tokens = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=12))
    stops = Stops((len(pieces),), tuple(s.encode() for s in strings), [p.encode() for p in pieces])
    texts = ["".join(pieces[token] for token in tokens[: n + 1]) for n in range(len(tokens))]
    expected = next((n for n, text in enumerate(texts, 1) if any(s in text for s in strings)), None)
    table = StopTable.of(stops, len(pieces) + 2)
    assert length_of(table, tokens) == expected
    assert length_of(table, [*tokens, len(pieces)]) == (expected or len(tokens) + 1)
    assert length_of(table, [*tokens, len(pieces) + 1]) == expected, "an id that the tokenizer does not have"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(tokenizer_folder(tmp_path_factory.mktemp("chatml")))


TEXT = "<think>über 🙂🙂</think>\n\nThe answer is 12.\n\n一二 \\boxed{12}. Quod erat demonstrandum."
STRINGS = ["</think>", ".\n\n", "🙂🙂", "二 \\", "boxed{12}", " erat", "nowhere", "\n"]


def test_bytes_of_tokens_are_those_of_the_text(tokenizer: HuggingFaceTokenizer) -> None:
    of_token = tokenizer.token_bytes()
    assert len(of_token) == tokenizer.vocab_size
    for text in (TEXT, "  two  ", "<|im_start|>user\n"):
        tokens = tokenizer.encode(text)
        assert b"".join(of_token[i] for i in tokens).decode() == tokenizer.decode(tokens)
    assert all(of_token[i] == b"" for i in tokenizer.stop_ids)


@pytest.mark.parametrize("string", STRINGS)
def test_a_string_that_spans_tokens(tokenizer: HuggingFaceTokenizer, string: str) -> None:
    """Also with a text cut into its bytes, where a character spans tokens."""
    table = StopTable.of(stops_of([string], tokenizer), tokenizer.vocab_size + 3)
    tokens = tokenizer.encode(TEXT)
    decoded = [tokenizer.decode(tokens[:n]) for n in range(1, len(tokens) + 1)]
    expected = next((n for n, text in enumerate(decoded, 1) if string in text), None)
    assert length_of(table, tokens) == expected
    assert (expected is None) == (string == "nowhere")


def test_transformers_ends_at_the_same_token(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder(tmp_path))
    tokens, ends = tokenizer.encode(TEXT), []
    for string in ("</think>", ".\n\n", "boxed{12}", " erat", "nowhere"):
        criterion = transformers.StopStringCriteria(theirs, [string])
        found = (n for n in range(1, len(tokens) + 1) if criterion(torch.tensor([tokens[:n]]), None)[0])
        ends.append(next(found, None))
        assert length_of(StopTable.of(stops_of([string], tokenizer), tokenizer.vocab_size), tokens) == ends[-1]
    assert len(set(ends)) == 5


def sentencepiece_like(folder: Path, decoder: dict[str, Any] | None) -> HuggingFaceTokenizer:
    """Pieces with ▁ for a space, and bytes for what they lack."""
    pieces = ["<s>", "</s>", "▁a", "b", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    special = [
        {"id": i, "content": pieces[i], "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i in (0, 1)
    ]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [], "byte_fallback": True}
    about = {"version": "1.0", "added_tokens": special, "model": model, "decoder": decoder}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(about))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return HuggingFaceTokenizer(folder)


LLAMA = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def test_pieces_and_bytes(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(tmp_path / "llama", LLAMA)
    of_token, drawn = tokenizer.token_bytes(), random.Random(1)
    for _ in range(100):
        tokens = [drawn.choice([2, 3, 4, 5 + 65, 5 + 0xC3, 5 + 0xBC]) for _ in range(8)]
        text = b"".join(of_token[i] for i in tokens).decode(errors="replace")
        # The package gives a replacement for each byte of a text that is not UTF-8 throughout.
        if "�" not in text:
            assert tokenizer.decode(tokens) == text.removeprefix(" ")
    with pytest.raises(DataError, match=r"decodes by None, and such tokens do not stand for bytes"):
        sentencepiece_like(tmp_path / "none", None).token_bytes()


# --- the setting ---


def test_a_special_token_is_given_by_its_id(tokenizer: HuggingFaceTokenizer) -> None:
    with pytest.raises(ConfigError, match=rf"'<\|im_end\|>' is a special token.*give its id, {tokenizer.eos_id}"):
        stops_of(["<|im_end|>"], tokenizer)
    assert stops_of([7], tokenizer) == ((*tokenizer.stop_ids, 7), (), ())
    with pytest.raises(ConfigError, match=r"rollout.stop: id 99 is not one of the tokenizer's 4, 0 to 3"):
        stops_of([99], CharacterTokenizer("ab"))


@pytest.mark.parametrize("value", ['[""]', "[true]", "[1.5]", "[null]"])
def test_an_item_that_ends_nothing(value: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.stop: .* is neither a text nor a token id"):
        load_config(None, [f"rollout.stop={value}"])


def test_texts_and_ids_from_the_command_line() -> None:
    assert load_config(None, [r'rollout.stop=["\n\n", "5", 13]']).rollout.stop == ["\n\n", "5", 13]
    with pytest.raises(ConfigError, match=r"rollout\.stop"):
        load_config(None, ["rollout.stop=abc"])


def test_the_table_of_a_large_vocabulary_is_small() -> None:
    drawn = random.Random(2)
    pieces = [bytes(drawn.choices(range(97, 123), k=drawn.randint(1, 12))) for _ in range(150_000)]
    table = StopTable.of(Stops((0,), (b"</answer>", b"\n\n"), pieces), 151_936)
    assert table.after.dtype == np.int32 and table.after.shape == (10, 151_936)
