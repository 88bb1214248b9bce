"""Trains a SentencePiece tokenizer on a text file, or on fields of a JSONL file.

    python tools/train_tokenizer.py corpus.txt --output tokenizer.model --vocab-size 1000
    python tools/train_tokenizer.py train.jsonl --fields question answer --output tokenizer.model

The model keeps every character: no normalisation, no added space, newline as a token of its own, rare characters as
UTF-8 bytes. So decode(encode(text)) == text, except for U+2581, which SentencePiece itself uses for the space. Digits
are single tokens. The same input gives the same file.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from gspo_megatron.base.errors import DataError
from gspo_megatron.data.jsonl import read_records
from gspo_megatron.data.rows import text_field
from gspo_megatron.data.tokenizers import SentencePieceTokenizer


def read_texts(path: Path, fields: Sequence[str]) -> list[str]:
    """The named fields of every object of a JSONL file; without fields, the lines of a text file.

    Raises:
        DataError: a file is missing or has no text, or a line lacks a field.
    """
    if fields:
        texts = [text_field(record, name, place) for place, record in read_records(path) for name in fields]
    elif path.is_file():
        try:
            texts = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    else:
        raise DataError(f"the text file {path} does not exist")
    if not any(map(str.strip, texts)):
        raise DataError(f"{path} contains no text to train on")
    return texts


def train(texts: Sequence[str], *, vocab_size: int, model_type: str) -> bytes:
    """A SentencePiece model with `vocab_size` pieces; ids 0, 1, 2 are padding, EOS, unknown; there is no BOS.

    Raises:
        DataError: the vocabulary is too large or too small for the texts.
    """
    lines = [line for text in texts for line in text.split("\n")]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            # SentencePiece silently drops longer lines.
            max_sentence_length=max(len(line.encode()) for line in lines) + 1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if most := re.search(r"value <= ([0-9]+)", str(error)):
            raise DataError(
                f"--vocab-size {vocab_size} is too large for this text; set it to at most {most[1]}"
            ) from error
        if least := re.search(r"[0-9]+ vs ([0-9]+)", str(error)):
            raise DataError(
                f"--vocab-size {vocab_size} is too small for this text; set it to {least[1]} or more"
            ) from error
        raise DataError(f"SentencePiece cannot train on this text: {error}") from error
    return model.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: trains, writes the model file, prints its size and how many characters a token covers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="text file, or JSONL file with --fields")
    parser.add_argument("--output", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--fields", nargs="+", default=[], help="the JSONL fields to train on")
    parser.add_argument("--vocab-size", type=int, default=1000, help="number of tokens (default %(default)s)")
    parser.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="default %(default)s")
    options = parser.parse_args(arguments)
    try:
        texts = read_texts(options.input, options.fields)
        model = train(texts, vocab_size=options.vocab_size, model_type=options.type)
    except DataError as error:
        parser.error(str(error))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_bytes(model)

    tokenizer = SentencePieceTokenizer(options.output)
    characters = sum(map(len, texts))
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    print(f"{options.output}: {options.type}, {tokenizer.vocab_size} token types (pad 0, eos 1, unknown 2)")
    print(f"{characters} characters, {tokens} tokens, {characters / tokens:.2f} characters per token")


if __name__ == "__main__":
    main()
