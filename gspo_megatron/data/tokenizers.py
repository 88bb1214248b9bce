"""Text to token ids and back: one token per character, or a SentencePiece model; and which of these a setting names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from gspo_megatron.base.errors import DataError, plural
from gspo_megatron.data import hugging_face
from gspo_megatron.data.hugging_face import HuggingFaceTokenizer
from gspo_megatron.data.token_ids import Tokenizer, checked_ids

PRINTABLE = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
"""Newline and printable ASCII: the alphabet of the character tokenizer when none is given."""


class CharacterTokenizer:
    """One token per character: id 0 is padding, 1 is EOS, 2 + k the k-th character of `alphabet` (default PRINTABLE).

    Raises:
        DataError: an empty alphabet, or a repeated character.
    """

    pad_id = 0
    eos_id = 1
    stop_ids = (1,)
    bos_id = None
    chat_template = None

    def __init__(self, alphabet: str | None = None) -> None:
        alphabet = PRINTABLE if alphabet is None else alphabet
        repeated = sorted({char for char in alphabet if alphabet.count(char) > 1})
        if not alphabet or repeated:
            found = f"repeats {''.join(repeated)!r}" if repeated else "is empty"
            raise DataError(f"the tokenizer's alphabet {found}; list every character exactly once")
        self.identity = alphabet
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
                f"{plural(len(self._ids), 'character')}; add it to 'characters:<alphabet>', or train a "
                "SentencePiece model with tools/train_tokenizer.py"
            ) from None

    encode_prompt = encode

    def decode(self, ids: Iterable[int]) -> str:
        """The characters of `ids`.

        Raises:
            DataError: an id outside the vocabulary.
        """
        return "".join(self._chars[token] for token in checked_ids(ids, self.vocab_size))

    def piece(self, token: int) -> str:
        """See `Tokenizer.piece`."""
        return {self.pad_id: "<pad>", self.eos_id: "<eos>"}.get(token) or self._chars[token]

    def token_bytes(self) -> list[bytes]:
        """See `Tokenizer.token_bytes`."""
        return [char.encode() for char in self._chars]


class SentencePieceTokenizer:
    """A SentencePiece model file, such as tools/train_tokenizer.py writes.

    Raises:
        DataError: a file that is missing, is not such a model, or has no padding or EOS id.
    """

    chat_template = None

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise DataError(f"no SentencePiece model at {path}; tools/train_tokenizer.py trains one")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.identity = hashlib.sha256(Path(path).read_bytes()).hexdigest()
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

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @property
    def bos_id(self) -> int | None:
        found = self._model.bos_id()
        return found if found >= 0 else None

    def encode(self, text: str) -> list[int]:
        """The ids of the model's pieces, without BOS or EOS."""
        return self._model.encode(text)

    encode_prompt = encode

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; SentencePiece drops padding and EOS.

        Raises:
            DataError: an id outside the vocabulary.
        """
        return self._model.decode(checked_ids(ids, self.vocab_size))

    def piece(self, token: int) -> str:
        """See `Tokenizer.piece`."""
        return self._model.id_to_piece(token)

    def token_bytes(self) -> list[bytes]:
        """See `Tokenizer.token_bytes`. The space that a text does not begin with counts as one."""
        model = self._model
        return [
            b""
            if model.is_control(i)
            else bytes([int(model.id_to_piece(i)[3:5], 16)])
            if model.is_byte(i)
            else (model.decode([i]) if model.is_unknown(i) else model.id_to_piece(i).replace("▁", " ")).encode()
            for i in range(self.vocab_size)
        ]


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names: "characters", "characters:<alphabet>", the path of a SentencePiece model, or of
    a Hugging Face folder with a tokenizer.json.

    Raises:
        DataError: there is no such file, or it cannot be used.
    """
    kind, colon, alphabet = spec.partition(":")
    if kind == "characters":
        return CharacterTokenizer(alphabet if colon else None)
    path = Path(spec)
    if path.name == hugging_face.FILE or (path / hugging_face.FILE).is_file():
        return HuggingFaceTokenizer(path.parent if path.name == hugging_face.FILE else path)
    if not path.is_file():
        found = f"a folder without {hugging_face.FILE}" if path.is_dir() else "no file or folder"
        raise DataError(
            f"tokenizer {spec!r} is {found}; expected 'characters', 'characters:<alphabet>', a Hugging Face folder "
            f"with a {hugging_face.FILE}, or a SentencePiece model; tools/train_tokenizer.py trains one"
        )
    return SentencePieceTokenizer(spec)
