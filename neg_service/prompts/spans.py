"""At which token of a prompt neurons are read and shifted, where that is not its readout position.

A row says it as `at`: a text, of which it is the last token (`"France"`), a range of characters (`[15, 21]`), or a
token's place, counted from 0 or, below zero, from the end. Answers are read at the prompt's end all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

from neg_service.errors import PromptError, shortened
from neg_service.prompts.prompt import At

# The tokens of a text's beginning, with whatever stands before all texts.
Read = Callable[[str], tuple[int, ...]]


def at_of(who: str, value: Any) -> At | None:
    """What a row says.

    Raises:
        PromptError: it is none of the three.
    """
    if value is None:
        return None
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value:
        return str(value)
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(end, Integral) and not isinstance(end, bool) for end in value)
        and 0 <= value[0] < value[1]
    ):
        return int(value[0]), int(value[1])
    raise PromptError(
        f"prompt {who!r}: at must be a text, a range of characters such as [4, 11], or a token's place, not "
        f"{shortened(value)}"
    )


def place_of(who: str, text: str, ids: tuple[int, ...], at: At, read: Read, *, is_chat: bool) -> int | None:
    """The place of the token that `at` means; None where it is the prompt's last.

    is_chat: whether a template wrote the text, of which whoever wrote the row saw a part.

    Raises:
        PromptError: a text that is absent or there more than once, a range or a place beyond the prompt, or an end
            within a token; of a chat, a range or a place.
    """
    if is_chat and not isinstance(at, str):
        raise _refused(
            who,
            f"{at if isinstance(at, int) else list(at)} would count what the chat template writes, too: give a text",
        )
    if isinstance(at, int):
        if not -len(ids) <= at < len(ids):
            raise _refused(who, f"token {at} does not exist, the prompt has {len(ids)}")
        return _unless_last(at % len(ids), ids)
    if isinstance(at, str):
        starts = [start for start in range(len(text)) if text.startswith(at, start)]
        if len(starts) != 1:
            found = "is not in the prompt" if not starts else f"is there {len(starts)} times, from {starts}"
            raise _refused(who, f"{at!r} {found}; a range of characters or a token's place says which is meant")
        end = starts[0] + len(at)
    else:
        if at[1] > len(text):
            raise _refused(who, f"characters {list(at)} end beyond the prompt, which has {len(text)}")
        end = at[1]
    before = read(text[:end])
    if text[end - 1].isspace() and before == read(text[:end].rstrip()):
        raise _refused(who, f"{text[:end][-20:]!r} ends with white space, which is no token of its own")
    if not before or ids[: len(before)] != before:
        raise _refused(
            who, f"{text[:end][-20:]!r} ends within a token of the prompt; a token's place says which is meant"
        )
    return _unless_last(len(before) - 1, ids)


def _unless_last(place: int, ids: tuple[int, ...]) -> int | None:
    return None if place == len(ids) - 1 else place


def _refused(who: str, reason: str) -> PromptError:
    return PromptError(f"prompt {who!r}: at: {reason}", change="dataset.source")
