"""A tokenizer's reading of texts: their tokens, what it says where it cannot read one, and what it leaves out."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from neg_service.errors import one_line

# Of these a tokenizer may leave out what it will: white space, control characters, accents.
_UNSEEN = ("Z", "C", "M")


class Tokenizer(Protocol):
    """What is used of a tokenizer; those of transformers fit."""

    def __call__(self, text: list[str]) -> Any:
        """Token ids of each text, under `input_ids`, special tokens included."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The tokens behind the ids, for messages."""
        ...


class AsWritten:
    """A tokenizer that puts nothing around texts: for those of chat templates, which have all that they need."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """In all else it is `tokenizer`."""
        self._tokenizer = tokenizer

    def __call__(self, text: list[str], **options: Any) -> Any:
        """Token ids of each text as it is written."""
        return cast(Any, self._tokenizer)(text, add_special_tokens=False, **options)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The tokens behind the ids, for messages."""
        return self._tokenizer.convert_ids_to_tokens(ids)

    def __getattr__(self, name: str) -> Any:
        """What the tokenizer says of itself."""
        return getattr(self._tokenizer, name)


@dataclass(frozen=True)
class Reading:
    """The tokens of a text, and how many of its visible characters have none, as far as the tokenizer tells."""

    ids: tuple[int, ...]
    n_dropped: int = 0


@dataclass(frozen=True)
class Unread:
    """What a tokenizer said of a text that it cannot read."""

    words: str


def read_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Reading | Unread]:
    """Texts as the tokenizer reads them, each by itself where they fail together."""
    if not texts:
        return []
    try:
        return list(_read(tokenizer, texts))
    except Exception:  # noqa: BLE001 - tokenizers raises Exception itself
        return [_read_alone(tokenizer, text) for text in texts]


def _read_alone(tokenizer: Tokenizer, text: str) -> Reading | Unread:
    try:
        return _read(tokenizer, [text])[0]
    except Exception as error:  # noqa: BLE001 - as above
        return Unread(one_line(error))


def _read(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Reading]:
    if not getattr(tokenizer, "is_fast", False):
        return [Reading(tuple(ids)) for ids in tokenizer(list(texts))["input_ids"]]
    found = cast(Any, tokenizer)(list(texts), return_offsets_mapping=True)
    return [
        Reading(tuple(ids), _n_dropped(tokenizer, text, spans))
        for text, ids, spans in zip(texts, found["input_ids"], found["offset_mapping"], strict=True)
    ]


def _n_dropped(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> int:
    """How many visible characters no token covers: which they are, offsets do not tell, but how many they do."""
    is_covered = bytearray(len(text))
    for start, end in spans:
        is_covered[start:end] = b"\1" * (min(end, len(text)) - start)
    n = sum(
        unicodedata.category(character)[0] not in _UNSEEN
        for character, covered in zip(text, is_covered, strict=True)
        if not covered
    )
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None) if n else None
    # What is written shorter (two quotation marks as one) is not left out.
    n_shorter = len(text) - len(normalizer.normalize_str(text)) if normalizer is not None else 0
    return max(0, n - max(0, n_shorter))
