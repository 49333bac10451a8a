"""Prompts of a data set on disk, so that memory holds eight bytes of each however long their texts are."""

from __future__ import annotations

import marshal
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import overload

from neg_service.prompts.prompt import Prompt

# Read together when all are read.
_BLOCK = 1000
_FIELDS = [own.name for own in fields(Prompt)]


class PromptFile(Sequence[Prompt]):
    """Prompts in a temporary file without a name, which goes with this object or its process; memory has offsets."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        """Reads all of `prompts` once."""
        self._ends = array("q", [0])
        self._file, path = tempfile.mkstemp(prefix="neg-prompts-")
        weakref.finalize(self, os.close, self._file)
        Path(path).unlink()
        with os.fdopen(self._file, "wb", closefd=False) as file:
            for prompt in prompts:
                # Only this process reads it, so that what marshal writes need not be read elsewhere.
                size = file.write(marshal.dumps(tuple(getattr(prompt, name) for name in _FIELDS)))
                self._ends.append(self._ends[-1] + size)

    def __len__(self) -> int:
        """How many prompts."""
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...
    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt]:
        """One prompt, or several."""
        if isinstance(place, int):
            index = range(len(self))[place]
            return self._read(index, index + 1)[0]
        places = range(len(self))[place]
        if places.step == 1:
            return self._read(places.start, max(places.start, places.stop))
        return [self[index] for index in places]

    def __iter__(self) -> Iterator[Prompt]:
        """All, a block at a time."""
        for start in range(0, len(self), _BLOCK):
            yield from self._read(start, min(start + _BLOCK, len(self)))

    def _read(self, start: int, stop: int) -> list[Prompt]:
        begin = self._ends[start]
        # At no common place in the file, so that several threads may read.
        data = os.pread(self._file, self._ends[stop] - begin, begin)
        return [
            Prompt(*marshal.loads(data[self._ends[index] - begin : self._ends[index + 1] - begin]))
            for index in range(start, stop)
        ]
