"""Everything that can go wrong, as one small tree.

An error says in one line the value, the limit, and the setting to change, and carries these as fields, so that it can
be told by the name under which a person gave the value: `measure.shift` to a command, `shift` in a notebook,
`study.basis` where a study hands it on. The class says what the driver may do about it; `cluster/failures.py` decides
from that alone.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Absent(Enum):
    """An enumeration, so that it is itself also after it crossed processes."""

    NOT_GIVEN = "not given"


NOT_GIVEN = _Absent.NOT_GIVEN


class NegServiceError(Exception):
    """Any error that this package raises on purpose.

    reason: what is wrong, in words, without setting and value; other settings stand in it by their keys.
    setting: the key of the setting, or the name of the parameter, that is to be changed; None where there is none.
    value: what it was given as, as it is shown; `NOT_GIVEN` where it was not given at all, or is too large to be shown.
    allowed: what it must be, to be read after "must be"; None where the reason says more than that.

    In the place of setting and value: `given`, both in one text, KEY=VALUE; or `change`, the setting that is named
    behind the words, or in them, because these speak of a prompt or a model in the first place.
    """

    def __init__(
        self,
        reason: str = "",
        *,
        setting: str | None = None,
        value: Any = NOT_GIVEN,
        allowed: str | None = None,
        given: str | None = None,
        change: str | None = None,
    ) -> None:
        super().__init__(reason)
        if given is not None:
            setting, is_value, text = given.partition("=")
            value = text if is_value else NOT_GIVEN
        self.reason, self.value, self.allowed = reason, value, allowed
        self.setting = change if setting is None else setting
        self._is_named_last = setting is None

    def __str__(self) -> str:
        must = f"must be {self.allowed}" if self.allowed is not None else ""
        words = "; ".join(part for part in (must, self.reason) if part)
        if self.setting is None:
            return words
        if self._is_named_last:
            is_in_words = re.search(rf"(?<![\w.]){re.escape(self.setting)}(?!\w)", words)
            return words if is_in_words else f"{words} ({self.setting})".lstrip()
        shown = self.setting if self.value is NOT_GIVEN else f"{self.setting}={self.value}"
        return f"{shown}: {words}" if words else shown

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> Any:
        # It crosses processes with its fields; a value that might not is shown there as it would have been here.
        is_plain = self.value is None or isinstance(self.value, bool | int | float | str | _Absent)
        return type(self), (self.reason,), self.__dict__ | {"value": self.value if is_plain else str(self.value)}

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same error, told by other names of settings: in its field, and where its words mention them."""
        # A key without a dot may be any word.
        keys = "|".join(re.escape(key) for key in sorted(names, key=len, reverse=True) if "." in key)

        def told(words: str | None) -> str | None:
            return words and re.sub(rf"(?<![\w.])(?:{keys})(?!\w)", lambda found: names[found[0]], words)

        other = type(self)(self.reason)
        other.__dict__.update(self.__dict__)
        if keys:
            other.reason, other.allowed, other.setting = told(self.reason) or "", told(self.allowed), told(self.setting)
        if self.setting is not None and self.setting in names:
            other.setting = names[self.setting]
        return other


class ConfigurationError(NegServiceError):
    """What was asked for cannot be done; no retry will change that."""


class PromptError(ConfigurationError):
    """A prompt, a target or a data set file is unusable; the message names the prompt or the line."""


class TargetError(PromptError):
    """The model's tokenizer has not exactly one token of its own for a target after its prompt."""


class ModelError(ConfigurationError):
    """The model cannot be loaded, is not understood, or failed its self-check."""


class DestinationError(ConfigurationError):
    """The place for results cannot be used: unwritable, unknown, or holding something else."""


class NonFiniteError(NegServiceError):
    """NaN or infinity in logits or gradients of a prompt; its shard is never stored, and a retry gives it again."""


class OutOfMemory(NegServiceError):
    """Memory ended, which smaller batches may help."""


class DoesNotFit(OutOfMemory):
    """One prompt alone did not fit into memory, at the smallest batch: a retry asks for as much again."""


class StorageError(NegServiceError):
    """Object storage failed in a way that may pass: worth a retry."""


class ReplicaLost(NegServiceError):
    """A replica's process or node is gone, with what it was doing."""


class NodeLost(ReplicaLost):
    """A replica's node is gone, drained, pre-empted or out of reach; that says nothing of what it was doing."""


def told_by_parameters(**others: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """For functions that people call: what is refused is told by the parameter that they gave, not by the setting.

    A parameter takes the place of the setting of its name in any group; `others` says which one takes the place of
    settings of other names, with `__` for the dot: `neurons__list="neurons"`.
    """

    def told(function: Callable[P, T]) -> Callable[P, T]:
        names = {f"{group}.{name}": name for group in _GROUPS for name in signature(function).parameters}
        names |= {setting.replace("__", "."): name for setting, name in others.items()}

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except NegServiceError as error:
                raise error.renamed(names).with_traceback(error.__traceback__) from error.__cause__

        return call

    return told


_GROUPS = ("measure", "neurons", "model", "dataset", "cluster", "storage")


def nearest(name: str, known: Sequence[str]) -> str:
    """A question whether one of the names that are known was meant, or nothing."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? " if near else ""


def one_line(error: BaseException) -> str:
    """The first line that an error says, with the next after a colon, or its class if it says nothing."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    first = next((place for place, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: first + 1]) or type(error).__name__


def shortened(value: object) -> str:
    """A value as Python writes it, with so much left out that it fits into a line, however large or nested it is."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 4, 12, 8, 120, 120
