"""Everything that can go wrong, as one small tree.

A message says the value, the limit, and the configuration key to change, in one line. The class says what the
driver may do about it; `cluster/failures.py` decides from the class alone.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence


class NegServiceError(Exception):
    """Any error that this package raises on purpose."""


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


def nearest(name: str, known: Sequence[str]) -> str:
    """A question whether one of the names that are known was meant, or nothing."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? " if near else ""


def one_line(error: BaseException) -> str:
    """The first line that an error says, or its class if it says nothing."""
    return next((" ".join(line.split()) for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shortened(value: object) -> str:
    """A value as Python writes it, with so much left out that it fits into a line, however large or nested it is."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 4, 12, 8, 120, 120
