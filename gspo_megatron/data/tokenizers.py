"""Text to token ids and back: one token per character, or a SentencePiece model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece

from gspo_megatron.base.errors import DataError

PRINTABLE = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
"""Newline and printable ASCII: the alphabet of the character tokenizer when none is given."""


class Tokenizer(Protocol):
    """`encode` adds no special token; `decode` drops padding and EOS. Ids lie in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class CharacterTokenizer:
    """One token per character: id 0 is padding, 1 is EOS, 2 + k the k-th character of `alphabet` (default PRINTABLE).

    Raises:
        DataError: an empty alphabet, or a repeated character.
    """

    pad_id = 0
    eos_id = 1

    def __init__(self, alphabet: str | None = None) -> None:
        alphabet = PRINTABLE if alphabet is None else alphabet
        repeated = sorted({char for char in alphabet if alphabet.count(char) > 1})
        if not alphabet or repeated:
            found = f"repeats {''.join(repeated)!r}" if repeated else "is empty"
            raise DataError(f"the tokenizer's alphabet {found}; list every character exactly once")
        self._chars = ["", "", *alphabet]
        self._ids = {char: token for token, char in enumerate(alphabet, start=2)}

    @property
    def vocab_size(self) -> int:
        return len(self._chars)

    def encode(self, text: str) -> list[int]:
        """One id per character.

        Raises:
            DataError: a character outside the alphabet.
        """
        try:
            return [self._ids[char] for char in text]
        except KeyError as error:
            (char,) = error.args
            raise DataError(
                f"character {char!r} at position {text.index(char)} of {text[:60]!r} is not in the alphabet of "
                f"{len(self._ids)} characters; add it to 'characters:<alphabet>', or train a SentencePiece model "
                "with tools/train_tokenizer.py"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The characters of `ids`.

        Raises:
            DataError: an id outside the vocabulary.
        """
        return "".join(self._chars[token] for token in _checked(ids, self.vocab_size))


class SentencePieceTokenizer:
    """A SentencePiece model file, such as tools/train_tokenizer.py writes.

    Raises:
        DataError: a file that is missing, is not such a model, or has no padding or EOS id.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise DataError(f"no SentencePiece model at {path}; tools/train_tokenizer.py trains one")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise DataError(f"{path} is not a SentencePiece model ({error}); train it again") from error
        missing = [name for name, token in (("pad", self.pad_id), ("eos", self.eos_id)) if token < 0]
        if missing:
            raise DataError(
                f"the SentencePiece model {path} has no {' and no '.join(missing)} token; train it with "
                "tools/train_tokenizer.py, or with --pad_id and --eos_id of 0 or more"
            )

    @property
    def vocab_size(self) -> int:
        return self._model.get_piece_size()

    @property
    def pad_id(self) -> int:
        return self._model.pad_id()

    @property
    def eos_id(self) -> int:
        return self._model.eos_id()

    def encode(self, text: str) -> list[int]:
        """The ids of the model's pieces, without BOS or EOS."""
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; SentencePiece drops padding and EOS.

        Raises:
            DataError: an id outside the vocabulary.
        """
        return self._model.decode(_checked(ids, self.vocab_size))


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names: "characters", "characters:<alphabet>", or the path of a SentencePiece model.

    Raises:
        DataError: there is no such file, or it cannot be used.
    """
    kind, colon, alphabet = spec.partition(":")
    if kind == "characters":
        return CharacterTokenizer(alphabet if colon else None)
    if not Path(spec).is_file():
        raise DataError(
            f"tokenizer {spec!r} is neither 'characters', nor 'characters:<alphabet>', nor the path of an existing "
            "SentencePiece model; tools/train_tokenizer.py trains one"
        )
    return SentencePieceTokenizer(spec)


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` as a list, all checked to be in the vocabulary: a negative id would silently index from its end."""
    ids = list(ids)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise DataError(
                f"token id {token} is outside the tokenizer's vocabulary of {vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
    return ids
