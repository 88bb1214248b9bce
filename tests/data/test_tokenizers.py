from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.base.errors import DataError
from gspo_megatron.data.tokenizers import PRINTABLE, CharacterTokenizer, SentencePieceTokenizer, load_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"
TEXT = "Tom buys 12 apples at $3.50 each,\nso he pays 42 dollars.\n#### 42"


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tokenizer", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = folder / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"question": TEXT, "answer": f"{i}: 2024 2024 2024"}) + "\n" for i in range(20))
    )
    output = folder / "new" / "made.model"
    tool.main([str(corpus), "--fields", "question", "answer", "--output", str(output), "--vocab-size", "320"])
    return output


@settings(deadline=None)
@given(st.text(PRINTABLE))
def test_characters_survive_the_way_to_ids_and_back(text: str) -> None:
    tokenizer = CharacterTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size == 98
    assert all(2 <= id < 98 for id in ids)
    assert tokenizer.decode([0, *ids, 1, 0]) == text


def test_character_ids_follow_the_alphabet() -> None:
    tokenizer = load_tokenizer("characters:>10")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 5)
    assert tokenizer.encode("01>") == [4, 3, 2]


def test_a_character_outside_the_alphabet_is_named_with_its_place() -> None:
    with pytest.raises(DataError, match=r"'é' at position 3 of 'café' .* alphabet of 96 .*characters:<alphabet>"):
        load_tokenizer("characters").encode("café")


@pytest.mark.parametrize(("spec", "found"), [("characters:abcab", "repeats 'ab'"), ("characters:", "is empty")])
def test_an_alphabet_names_every_character_once(spec: str, found: str) -> None:
    with pytest.raises(DataError, match=found):
        load_tokenizer(spec)


@pytest.mark.parametrize("outside", [-1, 1000])
def test_ids_outside_the_vocabulary_are_refused(model: Path, outside: int) -> None:
    for tokenizer in (CharacterTokenizer(), SentencePieceTokenizer(model)):
        with pytest.raises(DataError, match=f"token id {outside} is outside"):
            tokenizer.decode([2, outside])


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40))
def test_sentencepiece_keeps_every_character(model: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(model))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.pad_id, *ids, tokenizer.eos_id]) == text


def test_sentencepiece_learns_words_but_single_digits(model: Path) -> None:
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.vocab_size == 320
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert len(tokenizer.encode("dollars")) < len("dollars")
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode("\n\n")) == 2


def test_training_twice_gives_the_same_file(
    tool: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT * 20)
    for name in ("a.model", "b.model"):
        tool.main([str(corpus), "--output", str(tmp_path / name), "--vocab-size", "320"])
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    summary = capsys.readouterr().out
    tokens = sum(len(SentencePieceTokenizer(tmp_path / "a.model").encode(line)) for line in (TEXT * 20).split("\n"))
    assert "320 token types" in summary
    assert f"{tokens} tokens, " in summary


def test_a_long_line_is_not_left_out(tool: ModuleType, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("some words\n" + "ж" * 5000, encoding="utf-8")
    tool.main([str(corpus), "--output", str(tmp_path / "a.model"), "--vocab-size", "275"])
    assert len(SentencePieceTokenizer(tmp_path / "a.model").encode("ж")) == 1


@pytest.mark.parametrize("wrong", ["5", "100000"])
def test_a_vocabulary_of_the_wrong_size_names_one_that_works(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    command = [str(tmp_path / "corpus.txt"), "--output", str(tmp_path / "a.model"), "--vocab-size"]
    with pytest.raises(SystemExit):
        tool.main([*command, wrong])
    message = capsys.readouterr().err
    assert f"--vocab-size {wrong} is too" in message
    right = [word for word in message.partition("set it to")[2].split() if word.isdigit()]
    tool.main([*command, *right])
    assert SentencePieceTokenizer(tmp_path / "a.model").vocab_size == int(right[0])


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (None, [], "does not exist"),
        (b" \n\n", [], "no text"),
        (b"\xff", [], "not UTF-8"),
        (b'{"question": "a"}\n', ["answer"], "corpus:1: no field 'answer'"),
    ],
)
def test_training_input_errors(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    fields: list[str],
    message: str,
) -> None:
    corpus = tmp_path / "corpus"
    if content is not None:
        corpus.write_bytes(content)
    with pytest.raises(SystemExit):
        tool.main([str(corpus), "--output", str(tmp_path / "a.model"), *(["--fields", *fields] if fields else [])])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.model").exists()


def test_a_tokenizer_that_is_no_model_file(tmp_path: Path) -> None:
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "broken.model"))
    for spec in ("character", str(tmp_path / "none.model"), str(tmp_path)):
        with pytest.raises(DataError, match=r"expected 'characters'.*train_tokenizer"):
            load_tokenizer(spec)


def test_a_model_without_padding_or_eos_is_refused(tmp_path: Path) -> None:
    prefix = str(tmp_path / "bare")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT.replace("\n", " ")]), model_prefix=prefix, vocab_size=30, hard_vocab_limit=False,
        eos_id=-1, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"no pad and no eos token.*--pad_id and --eos_id"):
        load_tokenizer(prefix + ".model")
