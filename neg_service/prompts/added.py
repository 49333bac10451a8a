"""What a tokenizer adds to every text by its own template, and what that means for a prompt.

Most put tokens in front of a text (`<s>`, `[CLS]`, `[gMASK]<sop>`), some put tokens behind it (`</s>`, `[SEP]`). Two
things follow. A prompt that spells them itself, as chat templates give it, would have them twice: it is read without
what it spells, and refused where that is not clear. A causal prompt is read at its own last token: what is put behind
it is taken off. What is added is found out from what a tokenizer gives for texts that have nothing in common, so that
it does not matter what makes it do so.

A special token in the middle of a prompt (turns of a conversation, packed documents) stays, as it is written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from neg_service.errors import PromptError

log = logging.getLogger(__name__)

_UNLIKE = ["", "a", "0"]
# How tokenizers write white space: within tokens, and as tokens of one byte.
_BLANK = " \t\r\n▁ĠĊĉč"
_BLANK_BYTES = ("<0x20>", "<0x09>", "<0x0A>", "<0x0D>")
_SHOWN = 4
_told: set[tuple[str, str]] = set()


class Tokenizer(Protocol):
    """What is used of a tokenizer; those of transformers fit."""

    def __call__(self, text: list[str]) -> Any:
        """Token ids of each text, under `input_ids`, special tokens included."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The tokens behind the ids, for messages."""
        ...


@dataclass(frozen=True)
class Added:
    """Tokens that a tokenizer puts before and after every text, and how a text spells them.

    is_after_if_absent: those after are left away where a text ends with them itself.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    before_text: str = ""
    after_text: str = ""
    is_after_if_absent: bool = False

    def without_after(self, text: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens of a text without those that were put behind it."""
        if not self.after or ids[-len(self.after) :] != self.after:
            return ids
        is_texts_own = self.is_after_if_absent and text.endswith(self.after_text)
        return ids if is_texts_own else ids[: -len(self.after)]

    def content(self, text: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens of a text alone."""
        own = self.without_after(text, ids)
        return own[len(self.before) :] if own[: len(self.before)] == self.before else own


def added_by(tokenizer: Tokenizer, encoded: Sequence[Sequence[int]] = ()) -> Added:
    """What a tokenizer adds: the beginning and the end that all texts have, the empty one among them.

    `encoded` are the tokens of other texts, for a tokenizer that knows none of our letters.
    """
    empty, *others = (tuple(ids) for ids in [*tokenizer(_UNLIKE)["input_ids"], *encoded])
    n_before = min(_n_common(empty, ids) for ids in others)
    n_after = min(_n_common(empty[n_before:][::-1], ids[n_before:][::-1]) for ids in others)
    before, after = empty[:n_before], empty[len(empty) - n_after :]
    before_text, after_text = ("".join(_names(tokenizer, ids)) for ids in (before, after))
    with warnings.catch_warnings():
        # Some warn that the text has them already, which is the question.
        warnings.simplefilter("ignore")
        is_after_if_absent = bool(after) and tuple(tokenizer([after_text])["input_ids"][0]) == empty
    return Added(before, after, before_text, after_text, is_after_if_absent)


def read_once(
    tokenizer: Tokenizer, who: str, text: str, ids: tuple[int, ...], added: Added, keeps_after: bool
) -> tuple[str, tuple[int, ...]]:
    """A prompt's text and tokens without what it spells of that which the tokenizer adds, so that it has this once.

    `who` is the prompt's id. What is put behind it stays with `keeps_after`, for a masked model, and is taken off
    without, for a causal one; there a prompt may end with such a token of its own.

    Raises:
        PromptError: what is added is spelled in part, several times, or with white space between it and the edge.
    """
    text, ids = _without_spelled(tokenizer, text, ids, added, keeps_after)
    content = added.content(text, ids)
    if _is_first(tokenizer, content, added.before) or _cut(text.lstrip(), added.before_text) is not None:
        raise _spelled_too(who, "begin", _names(tokenizer, [*added.before, *content[:_SHOWN]]), added.before_text)
    if set(added.before) & set(content):
        _tell(
            logging.WARNING, "within", added.before_text,
            f"prompt {who!r} spells tokens of {added.before_text!r} in its middle, where they stay, beside those that "
            f"the tokenizer puts in front of every prompt; others may, too",
        )  # fmt: skip
    if keeps_after:
        after_reversed = added.after_text[::-1]
        if _is_first(tokenizer, content[::-1], added.after) or _cut(text.rstrip()[::-1], after_reversed) is not None:
            raise _spelled_too(who, "end", _names(tokenizer, [*content[-_SHOWN:], *added.after]), added.after_text)
        return text, ids
    if added.after:
        _tell(
            logging.INFO, "after", added.after_text,
            f"the tokenizer puts {added.after_text!r} behind every text: taken off, so that a prompt is read at its "
            f"own last token",
        )  # fmt: skip
        if content and content[-1] in added.after:
            _tell(
                logging.WARNING, "end", added.after_text,
                f"prompt {who!r} spells {added.after_text!r} at its end, where it stays and is read; others may, too",
            )  # fmt: skip
    return text, added.without_after(text, ids)


def _without_spelled(
    tokenizer: Tokenizer, text: str, ids: tuple[int, ...], added: Added, keeps_after: bool
) -> tuple[str, tuple[int, ...]]:
    """Without the tokens before where the text begins with them, and those after where it ends so and they are kept."""
    own, n_before, n_after = added.content(text, ids), len(added.before), len(added.after) * keeps_after
    rest = text
    is_cut_before = is_cut_after = False
    if n_before and (cut := _cut(rest, added.before_text, own[:n_before] == added.before)) is not None:
        rest, own, is_cut_before = cut, own[n_before:], True
    if n_after and (cut := _cut(rest[::-1], added.after_text[::-1], own[-n_after:] == added.after)) is not None:
        rest, own, is_cut_after = cut[::-1], own[:-n_after], True
    if rest == text:
        return text, ids
    for is_cut, spelled in ((is_cut_before, added.before_text), (is_cut_after, added.after_text)):
        if is_cut:
            _tell(
                logging.INFO, "spelled", spelled,
                f"prompts that spell {spelled!r} are read without it: the tokenizer adds it to every text",
            )  # fmt: skip
    trimmed = rest.lstrip() if is_cut_before else rest
    trimmed = trimmed.rstrip() if is_cut_after else trimmed
    of_rest, of_trimmed = (tuple(found) for found in tokenizer([rest, trimmed])["input_ids"])
    # To some tokenizers white space beside a special token is a part of it, or of the next word in any case.
    if added.content(trimmed, of_trimmed) == own != added.content(rest, of_rest):
        return trimmed, of_trimmed
    return rest, of_rest


def _cut(text: str, spelled: str, is_read_so: bool = False) -> str | None:
    """The text behind what is spelled at its beginning, None if it is not.

    Where the tokenizer does not read that as its tokens, it must at least be nothing that a longer word begins with.
    """
    if is_read_so:
        text = text.lstrip()
    elif not spelled or spelled[-1].isalnum():
        return None
    return text.removeprefix(spelled) if text.startswith(spelled) else None


def _is_first(tokenizer: Tokenizer, content: Sequence[int], edge: Sequence[int]) -> bool:
    """Whether a token of `edge` is the first of the content's that is not white space alone."""
    if not set(edge) & set(content):
        return False
    for token, name in zip(content, _names(tokenizer, content), strict=True):
        if token in edge:
            return True
        if name.strip(_BLANK) and name not in _BLANK_BYTES:
            return False
    return False


def _spelled_too(who: str, does: str, names: Sequence[str], added_text: str) -> PromptError:
    where, place = ("in front of", "first") if does == "begin" else ("behind", "last")
    return PromptError(
        f"prompt {who!r} would {does} with {list(names)}: the tokenizer puts {added_text!r} {where} every prompt, and "
        f"this one spells it again; leave that out, or write it whole, once, and {place} of all (dataset.source)"
    )


def _tell(level: int, what: str, added_text: str, message: str) -> None:
    """Once a process, whichever prompt is the first."""
    if (what, added_text) not in _told:
        _told.add((what, added_text))
        log.log(level, "%s", message)


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
