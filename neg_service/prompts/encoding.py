"""The prompts of a run as token ids, each encoded once: all ahead, or those of a shard when it is its turn.

Texts stay where they are; ids lie in arrays, four bytes each, so that a million prompts take what their tokens take.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

from neg_service.prompts.prompt import EncodedPrompt, EncodedWording, Prompt

Encode = Callable[[Iterable[Prompt]], Iterator[EncodedPrompt]]
OfPrompt = tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...], int | None, tuple[EncodedWording, ...]]


class Ids:
    """Token ids of prompts and of their targets, one prompt after the other."""

    def __init__(self) -> None:
        """None yet."""
        self._ids, self._target_ids, self._following = array("i"), array("i"), array("i")
        self._ends, self._target_ends, self._following_ends = array("q", [0]), array("q", [0]), array("q", [0])
        # Of the few that say it.
        self._at: dict[int, int] = {}
        # Of wordings, one behind the other, where any prompt has some; and up to which each prompt's are.
        self._wordings: Ids | None = None
        self._wording_ends = array("q", [0])

    def __len__(self) -> int:
        """How many prompts."""
        return len(self._ends) - 1

    def append(
        self, ids: Sequence[int], target_ids: Sequence[int], following: Sequence[Sequence[int]] = (),
        at: int | None = None, wordings: Sequence[EncodedWording] = (),
    ) -> None:  # fmt: skip
        """Of the next prompt; see `EncodedPrompt`."""
        if at is not None:
            self._at[len(self)] = at
        self._ids.extend(ids)
        self._target_ids.extend(target_ids)
        self._ends.append(len(self._ids))
        self._target_ends.append(len(self._target_ids))
        for own in following:
            # Each with its length before it.
            self._following.append(len(own))
            self._following.extend(own)
        self._following_ends.append(len(self._following))
        for wording in wordings:
            self._wordings = self._wordings or Ids()
            self._wordings.append(wording.ids, wording.target_ids)
        self._wording_ends.append(0 if self._wordings is None else len(self._wordings))

    def of(self, index: int) -> OfPrompt:
        """Of a prompt, its targets' first tokens, those behind, what is shifted, and wordings; see `EncodedPrompt`."""
        ids = self._ids[self._ends[index] : self._ends[index + 1]]
        target_ids = self._target_ids[self._target_ends[index] : self._target_ends[index + 1]]
        following, at, end = [], self._following_ends[index], self._following_ends[index + 1]
        while at < end:
            start, at = at + 1, at + 1 + self._following[at]
            following.append(tuple(self._following[start:at]))
        return tuple(ids), tuple(target_ids), tuple(following), self._at.get(index), self._wordings_of(index)

    def _wordings_of(self, index: int) -> tuple[EncodedWording, ...]:
        if self._wordings is None:
            return ()
        places = range(self._wording_ends[index], self._wording_ends[index + 1])
        return tuple(EncodedWording(*self._wordings.of(place)[:2]) for place in places)


class Encoding(Sequence[EncodedPrompt]):
    """Prompts in order, as the model reads them."""

    def __init__(self, prompts: Sequence[Prompt], encode: Encode, ids: Ids | None = None) -> None:
        """`encode` is asked for prompts whose ids are not known; `ids` are those of the first prompts."""
        self._prompts, self._encode = prompts, encode
        self._ids = ids or Ids()

    def encode_all(self) -> None:
        """Encode what is not encoded yet: all that is wrong with a prompt is told before anything starts.

        Raises:
            PromptError: see `encode`.
        """
        if len(self._ids) < len(self._prompts):
            remaining = (self._prompts[index] for index in range(len(self._ids), len(self._prompts)))
            for encoded in self._encode(remaining):
                self._ids.append(encoded.ids, encoded.target_ids, encoded.following, encoded.at, encoded.wordings)

    def __len__(self) -> int:
        """How many prompts."""
        return len(self._prompts)

    @overload
    def __getitem__(self, place: int) -> EncodedPrompt: ...
    @overload
    def __getitem__(self, place: slice) -> list[EncodedPrompt]: ...
    def __getitem__(self, place: int | slice) -> EncodedPrompt | list[EncodedPrompt]:
        """One prompt, or several, which are encoded together where they are not yet."""
        if isinstance(place, int):
            return self._of([range(len(self))[place]])[0]
        return self._of(range(len(self))[place])

    def _of(self, places: Sequence[int]) -> list[EncodedPrompt]:
        asked = [self._prompts[place] for place in places]
        if all(place < len(self._ids) for place in places):
            return [EncodedPrompt(prompt, *self._ids.of(place)) for place, prompt in zip(places, asked, strict=True)]
        return list(self._encode(asked))
