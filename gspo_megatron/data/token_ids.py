"""What a tokenizer is to the rest of the package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from gspo_megatron.base.errors import DataError
from gspo_megatron.data.chat import ChatTemplate


class Tokenizer(Protocol):
    """Ids lie in [0, vocab_size).

    Attributes:
        eos_id: ends a solution that a warm start learns to write.
        stop_ids: any of these ends a response; EOS is one of them.
        bos_id: begins a text, for a tokenizer that has such a token.
        identity: what names its tokens and how it encodes, as JSON: equal for equal tokenizers.
        chat_template: how conversations become text, for a tokenizer that has one.
    """

    @property
    def identity(self) -> Any: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def chat_template(self) -> ChatTemplate | None: ...

    def encode(self, text: str) -> list[int]:
        """Without special tokens that `text` does not spell out."""

    def encode_prompt(self, text: str) -> list[int]:
        """A text that begins a sequence: with BOS, where the tokenizer has it that way."""

    def decode(self, ids: Iterable[int]) -> str:
        """Without special tokens."""

    def piece(self, token: int) -> str:
        """How the vocabulary writes a token, a special one, too."""

    def token_bytes(self) -> list[bytes]:
        """By id, what a token adds to a text, in UTF-8; nothing for a special token.

        Raises:
            DataError: the tokenizer's tokens cannot be read one by one.
        """


def text_of(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """What was sampled, as text. model.vocab_size may exceed the tokenizer's, rounded up for speed: the extra ids have
    no text."""
    return tokenizer.decode(t for t in ids if t < tokenizer.vocab_size)


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` as a list, all checked to be in the vocabulary: a negative id would silently index from its end."""
    ids = list(ids)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise DataError(
                f"token id {token} is outside the tokenizer's vocabulary of {vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
    return ids
