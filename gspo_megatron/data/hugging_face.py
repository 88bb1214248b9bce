"""The tokenizer of a Hugging Face folder: tokenizer.json, with its special tokens, stop ids and chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from gspo_megatron.base.errors import DataError
from gspo_megatron.data.chat import ChatTemplate
from gspo_megatron.data.token_ids import checked_ids

FILE = "tokenizer.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class HuggingFaceTokenizer:
    """A "fast" tokenizer, read by the `tokenizers` package from tokenizer.json.

    EOS and padding are those of tokenizer_config.json; a response also ends at the other ids of `eos_token_id` in
    generation_config.json (a chat model often stops at the end of a turn as well as of a text). Padding is EOS where
    none is named: packed sequences never read it.

    Attributes:
        stop_ids: a response ends with any of these; the first is EOS.
        chat_template: how conversations become text; None where the folder has no template.

    Raises:
        DataError: a file that is missing or unreadable, or no EOS.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        try:
            self._model = tokenizers.Tokenizer.from_file(str(self._folder / FILE))
        except Exception as error:  # the package raises Exception itself
            raise DataError(
                f"{self._folder / FILE} is not a tokenizer of the `tokenizers` package ({error})"
            ) from error
        self._model.no_padding()
        self._model.no_truncation()
        settings = self._read("tokenizer_config.json") | self._special_tokens_map()
        self._ids: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self._size = 1 + max(self._ids.values())
        special = {name: _text_of(settings[name]) for name in SPECIAL if settings.get(name) is not None}
        self.stop_ids = self._stop_ids(special.get("eos_token"))
        pad = special.get("pad_token")
        self._pad_id = self._id_of(pad, "pad_token") if pad is not None else self.eos_id
        self.chat_template = self._chat_template(settings, special)
        self._bos = special.get("bos_token", "")
        self.adds_bos = bool(self._bos) and self._model.encode("").ids[:1] == [self._ids.get(self._bos)]
        """Whether the tokenizer itself puts BOS before a text."""
        self.identity = [hashlib.sha256((self._folder / FILE).read_bytes()).hexdigest(), self._bos]

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def pad_id(self) -> int:
        return self._pad_id

    @property
    def bos_id(self) -> int | None:
        return self._ids.get(self._bos)

    @property
    def eos_id(self) -> int:
        return self.stop_ids[0]

    def encode(self, text: str) -> list[int]:
        """Without special tokens, except those that `text` spells out, as a chat template does."""
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """A text that begins a sequence: with BOS where the tokenizer adds one, and never with two."""
        bos = [self._ids[self._bos]] if self.adds_bos and not text.startswith(self._bos) else []
        return [*bos, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens. An id that the tokenizer has no token for gives no text.

        Raises:
            DataError: an id outside the vocabulary.
        """
        return self._model.decode(checked_ids(ids, self.vocab_size), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """See `Tokenizer.piece`."""
        return self._model.id_to_token(token) or f"<no token {token}>"

    def token_bytes(self) -> list[bytes]:
        """See `Tokenizer.token_bytes`. The space that SentencePiece's text does not begin with counts as one."""
        decoder = json.loads(self._model.to_str())["decoder"] or {"type": None}
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
        special = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        found = [b""] * self._size
        if not steps.keys() & {"ByteLevel", "Metaspace", "ByteFallback"}:
            raise DataError(
                f"{self._folder / FILE} decodes by {' and '.join(map(str, steps))}, and such tokens do not stand for "
                "bytes of a text; rollout.stop can have ids with it, but no texts"
            )
        for token, i in self._ids.items():
            if i not in special:
                found[i] = _bytes_of(token, steps)
        return found

    def _read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty where it is missing."""
        path = self._folder / name
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON in UTF-8 ({error}); copy the file again") from error
        if not isinstance(found, dict):
            raise DataError(f"{path} holds {type(found).__name__}, expected a JSON object; copy the file again")
        return found

    def _special_tokens_map(self) -> dict[str, Any]:
        """Older folders name the special tokens in a file of their own."""
        return {name: token for name, token in self._read("special_tokens_map.json").items() if name in SPECIAL}

    def _id_of(self, token: str, name: str) -> int:
        if token not in self._ids:
            raise DataError(f"{self._folder}: {name} {token!r} is not in {FILE}; the two files do not belong together")
        return self._ids[token]

    def _stop_ids(self, eos: str | None) -> tuple[int, ...]:
        found = [] if eos is None else [self._id_of(eos, "eos_token")]
        for name in ("generation_config.json", "config.json"):
            ids = self._read(name).get("eos_token_id")
            found += [] if ids is None else ids if isinstance(ids, list) else [ids]
            if ids is not None:
                break
        if not found:
            raise DataError(
                f"{self._folder} names no end of sequence: neither eos_token in tokenizer_config.json nor eos_token_id "
                "in generation_config.json or config.json; add one"
            )
        if wrong := [i for i in found if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self._size]:
            raise DataError(f"{self._folder}: eos_token_id {wrong[0]!r} is not one of the {self._size} ids of {FILE}")
        return tuple(dict.fromkeys(found))

    def _chat_template(self, settings: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
        """chat_template.jinja, or the `chat_template` of tokenizer_config.json; of several, the one named `default`."""
        path, found = self._folder / "chat_template.jinja", settings.get("chat_template")
        if path.is_file():
            return ChatTemplate(path.read_text(encoding="utf-8"), special, name=str(path))
        if isinstance(found, list):
            found = {each["name"]: each["template"] for each in found}.get("default")
        return ChatTemplate(found, special, name=f"the template of {self._folder}") if found else None


def _text_of(token: str | Mapping[str, Any]) -> str:
    """A special token is written as text, or as an object with its text in `content`."""
    return token if isinstance(token, str) else str(token["content"])


def _byte_by_character() -> dict[str, int]:
    """How byte-level BPE writes bytes: what is printable in Latin-1 as itself, the others as characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_BY_CHARACTER = _byte_by_character()
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _bytes_of(token: str, decoders: Container[str]) -> bytes:
    """What the package's decoders of these names make of a token."""
    if "ByteLevel" in decoders:
        # As the package does: a token with any other character is text itself.
        try:
            return bytes(BYTE_BY_CHARACTER[char] for char in token)
        except KeyError:
            return token.encode()
    if "ByteFallback" in decoders and (byte := BYTE_TOKEN.fullmatch(token)):
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode()
