"""What a tokenizer adds to every text by its own template, and what that means for a prompt.

Most put tokens in front of a text (`<s>`, `[CLS]`, `[gMASK]<sop>`), some put tokens behind it (`</s>`, `[SEP]`). Two
things follow. A prompt that spells them itself, as chat templates give it, would have them twice: it has the tokens of
what is written, without those added once more, and is refused where that is not clear. A causal prompt is read at its
own last token: what is put behind it is taken off. What is added is found out from what a tokenizer gives for texts
that have nothing in common, so that it does not matter what makes it do so.

A special token in the middle of a prompt (turns of a conversation, packed documents) stays, as it is written.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from neg_service.errors import PromptError
from neg_service.prompts.reading import Reading, Tokenizer, Unread, read_texts

log = logging.getLogger(__name__)

_UNLIKE = ["", "a", "0"]
# How tokenizers write white space: within tokens, and as tokens of one byte.
_BLANK = " \t\r\n▁ĠĊĉč"
_BLANK_BYTES = ("<0x20>", "<0x09>", "<0x0A>", "<0x0D>")
# White space, control characters, and such as byte-order marks and spaces without width.
_INVISIBLE = {"Zs", "Zl", "Zp", "Cc", "Cf"}
_SHOWN = 4
_told: set[tuple[str, str]] = set()


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


@dataclass(frozen=True)
class Once:
    """A prompt that has once what the tokenizer adds.

    text: what is encoded, and a target with it. ids: its tokens. spells: whether the text begins, and ends, with what
    is added, so that this is left out of its tokens. stays: where else it spells that, `within` or at its `end`.
    n_dropped: visible characters of the text that have no token.
    """

    who: str
    text: str
    ids: tuple[int, ...]
    spells: tuple[bool, bool] = (False, False)
    stays: tuple[str, ...] = ()
    n_dropped: int = 0

    def ids_of(self, added: Added, text: str, ids: tuple[int, ...], keeps_after: bool) -> tuple[int, ...]:
        """The tokens of this text with a target, read like this one."""
        return _once(added, text, ids, self.spells, keeps_after)


def added_by(tokenizer: Tokenizer, encoded: Sequence[Sequence[int]] = ()) -> Added:
    """What a tokenizer adds: the beginning and the end that all texts have, the empty one among them.

    `encoded` are the tokens of other texts, for a tokenizer that knows none of our letters. Some add nothing to the
    empty text, or cannot read it: there, what all others have, as far as these are special tokens by name.
    """
    empty, *letters = (_ids_or_none(tokenizer, text) for text in _UNLIKE)
    own = [ids for ids in letters if ids is not None]
    others = [*own, *(tuple(ids) for ids in encoded)]
    before, after = _common(empty, others) if empty and others else _common_special(tokenizer, own, others)
    before_text, after_text = ("".join(_names(tokenizer, ids)) for ids in (before, after))
    with warnings.catch_warnings():
        # Some warn that the text has them already, which is the question.
        warnings.simplefilter("ignore")
        is_after_if_absent = bool(after) and _ids_or_none(tokenizer, after_text) in (empty, before + after)
    return Added(before, after, before_text, after_text, is_after_if_absent)


def _common(empty: tuple[int, ...], others: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The beginning and the end of the empty text that all others have."""
    n_before = min(_n_common(empty, ids) for ids in others)
    n_after = min(_n_common(empty[n_before:][::-1], ids[n_before:][::-1]) for ids in others)
    return empty[:n_before], empty[len(empty) - n_after :]


def _common_special(
    tokenizer: Tokenizer, letters: Sequence[tuple[int, ...]], others: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens at the beginning and the end of all texts, two unlike letters among them.

    Others may be alike without being added: marks of white space, the unknown token, all there is of an unknown text.
    """
    if len(letters) < 2:
        return (), ()
    not_added = {getattr(tokenizer, name, None) for name in ("unk_token_id", "mask_token_id")}
    special = set(getattr(tokenizer, "all_special_ids", ())) - not_added
    first, *rest = others
    before = _leading(first[: min(_n_common(first, ids) for ids in rest)], special)
    n = len(before)
    after = _leading(first[n:][::-1][: min(_n_common(first[n:][::-1], ids[n:][::-1]) for ids in rest)], special)[::-1]
    return (before, after) if min(map(len, letters)) > n + len(after) else ((), ())


def _leading(ids: tuple[int, ...], wanted: set[int | None]) -> tuple[int, ...]:
    return ids[: next((i for i, token in enumerate(ids) if token not in wanted), len(ids))]


def _ids_or_none(tokenizer: Tokenizer, text: str) -> tuple[int, ...] | None:
    (found,) = read_texts(tokenizer, [text])
    return found.ids if isinstance(found, Reading) else None


def read_once(tokenizer: Tokenizer, who: str, text: str, reading: Reading, added: Added, keeps_after: bool) -> Once:
    """A prompt without what it spells of that which the tokenizer adds, so that it has this once.

    `who` is the prompt's id. What is put behind it stays with `keeps_after`, for a masked model, and is taken off
    without, for a causal one; there a prompt may end with such a token of its own.

    Raises:
        PromptError: what is added is spelled in part, several times, or with white space between it and the edge.
    """
    found, content, rest = _without_spelled(tokenizer, who, text, reading, added, keeps_after)
    before_names, after_names = _names(tokenizer, added.before), _names(tokenizer, added.after)
    if _is_first(tokenizer, content, added.before) or _is_spelled(rest, [added.before_text, *before_names]):
        raise _spelled_too(who, "begin", [*before_names, *_names(tokenizer, content[:_SHOWN])], added.before_text)
    if keeps_after and (
        _is_first(tokenizer, content[::-1], added.after)
        or _is_spelled(rest[::-1], [name[::-1] for name in (added.after_text, *after_names)])
    ):
        raise _spelled_too(who, "end", [*_names(tokenizer, content[-_SHOWN:]), *after_names], added.after_text)
    stays = ["within"] * bool(set(added.before) & set(content))
    if added.after and not keeps_after:
        _tell(
            logging.INFO, "after", added.after_text,
            f"the tokenizer puts {added.after_text!r} behind every text: taken off, so that a prompt is read at its "
            f"own last token",
        )  # fmt: skip
        stays += ["end"] * (bool(content) and content[-1] in added.after)
    return replace(found, stays=tuple(stays))


def tell_what_is_odd(added: Added, prompts: Sequence[Once]) -> None:
    """Name the prompts that spell what is added where it stays, and those that have characters without a token."""
    within = (
        f"spelling tokens of {added.before_text!r} in the middle, where they stay, beside those that the tokenizer "
        f"puts in front of every prompt"
    )
    end = f"spelling {added.after_text!r} at the end, where it stays and is read"
    dropped = "with characters that the tokenizer has no token for: read as if they were not there"
    for what, said in (("within", within), ("end", end), ("dropped", dropped)):
        odd = [one for one in prompts if what in one.stays or (what == "dropped" and one.n_dropped)]
        # A driver reads prompts several times.
        new = {one.who: key for one in odd if (key := (what, _digest(one.text))) not in _told}
        _told.update(new.values())
        if new:
            some = ", ".join(map(repr, list(new)[:_SHOWN])) + ", …" * (len(new) > _SHOWN)
            log.warning("%d prompt%s %s: %s", len(new), "s" * (len(new) > 1), said, some)


def _without_spelled(
    tokenizer: Tokenizer, who: str, text: str, reading: Reading, added: Added, keeps_after: bool
) -> tuple[Once, tuple[int, ...], str]:
    """Without the tokens before where the text begins with them, and those after where it ends so and they are kept.

    The tokens stay those of the text as it is written: without what it spells, some tokenizers would read its first
    word otherwise. Only where what it spells is not read as those tokens is it left out of the text. Beside the
    prompt, its own tokens alone, and its text alone.
    """
    own, n_before, n_after = added.content(text, reading.ids), len(added.before), len(added.after) * keeps_after
    asked = rest = text
    spells_before = spells_after = False
    if n_before and (cut := _cut(rest, added.before_text, own[:n_before] == added.before)) is not None:
        spells_before = own[:n_before] == added.before
        rest, asked, own = cut, asked if spells_before else cut, own[n_before:]
        _tell_spelled(added.before_text)
    if n_after and (cut := _cut(rest[::-1], added.after_text[::-1], own[-n_after:] == added.after)) is not None:
        spells_after = own[-n_after:] == added.after
        rest, asked = cut[::-1], asked if spells_after else asked.removesuffix(added.after_text)
        _tell_spelled(added.after_text)
    if asked != text:
        (again,) = read_texts(tokenizer, [asked])
        reading = readable(who, again)
    spells = spells_before, spells_after
    ids = _once(added, asked, reading.ids, spells, keeps_after)
    content = ids[n_before:] if ids[:n_before] == added.before else ids
    content = content[:-n_after] if n_after and content[-n_after:] == added.after else content
    return Once(who, asked, ids, spells, n_dropped=reading.n_dropped), content, rest


def _once(
    added: Added, text: str, ids: tuple[int, ...], spells: tuple[bool, bool], keeps_after: bool
) -> tuple[int, ...]:
    """Tokens without those that are added beside the ones that the text spells itself."""
    ids = ids if keeps_after else added.without_after(text, ids)
    before, after = added.before, added.after
    if spells[0] and ids[: 2 * len(before)] == before * 2:
        ids = ids[len(before) :]
    if spells[1] and ids[-2 * len(after) :] == after * 2:
        ids = ids[: -len(after)]
    return ids


def readable(who: str, found: Reading | Unread) -> Reading:
    """What is read of a prompt.

    Raises:
        PromptError: the tokenizer could not.
    """
    if isinstance(found, Unread):
        raise PromptError(
            f"prompt {who!r}: the model's tokenizer cannot read it: {found.words}: write it in what the model knows, "
            f"or choose another model (dataset.source, model.source)"
        )
    return found


def _cut(text: str, spelled: str, is_read_so: bool = False) -> str | None:
    """The text behind what is spelled at its beginning, None if it is not.

    Where the tokenizer does not read that as its tokens, it must at least be nothing that a longer word begins with.
    """
    if is_read_so:
        text = text.lstrip()
    elif not spelled or spelled[-1].isalnum():
        return None
    return text.removeprefix(spelled) if text.startswith(spelled) else None


def _is_spelled(text: str, spellings: Sequence[str]) -> bool:
    """Whether a text begins with one of the spellings, behind nothing that a person could see."""
    seen = next((i for i, c in enumerate(text) if unicodedata.category(c) not in _INVISIBLE), len(text))
    # A token of one or two letters may be a text's own.
    return any(_cut(text[seen:], spelled) is not None for spelled in spellings if len(spelled) > 2)


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
        f"prompt {who!r} would {does} with {list(names)}: the tokenizer puts {added_text!r} {where} every prompt, "
        f"and this one spells it again; leave that out, or write it whole, once, and {place} of all",
        change="dataset.source",
    )


def _tell_spelled(spelled: str) -> None:
    _tell(
        logging.INFO, "spelled", spelled,
        f"prompts that spell {spelled!r} are read without it: the tokenizer adds it to every text",
    )  # fmt: skip


def _tell(level: int, what: str, added_text: str, message: str) -> None:
    """Once a process, whichever prompt is the first."""
    if (what, added_text) not in _told:
        _told.add((what, added_text))
        log.log(level, "%s", message)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
