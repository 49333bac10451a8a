"""What an error of Ray's means for its caller: nothing here is read out of an English text.

Inside a replica every exception becomes one that surely travels (`portable`): one of this package's own classes, or
`Unexpected`, which is text. What Ray itself raises is told apart by its class; whether a dead replica's process or its
node is gone, by what the cluster says of both.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

import ray.exceptions as of_ray

from neg_service import errors
from neg_service.errors import ConfigurationError, NegServiceError, NodeLost, OutOfMemory, ReplicaLost, one_line
from neg_service.memory import is_out_of_memory

_F = TypeVar("_F", bound=Callable[..., Any])
_MOST_LETTERS, _MOST_OF_TRACEBACK, _MOST_OF_RAYS = 2000, 6000, 300


class Unexpected(Exception):
    """An exception that nobody foresaw, as text: its class and what it says, and where it came from."""

    def __init__(self, says: str, where: str = "") -> None:
        """`where` is a traceback."""
        super().__init__(says, where)
        self.says, self.where = says, where

    def __str__(self) -> str:
        """What it says."""
        return self.says


class Meaning(Enum):
    """What is known when a call ends in an error of Ray's."""

    # The method was run, and raised.
    RAISED = "raised"
    # Nobody answers at the moment; the replica may well be there.
    UNREACHABLE = "unreachable"
    # The process is gone, by itself or with its node.
    DEAD = "dead"
    NODE_DEAD = "node dead"
    # This call came to nothing, which says nothing of the replica.
    CALL_FAILED = "call failed"
    # No replica can be run as asked.
    REFUSED = "refused"


# Every class that Ray exports has its row: a test tells when a new version has more.
_MEANINGS: dict[Meaning, tuple[type[BaseException], ...]] = {
    Meaning.RAISED: (of_ray.RayTaskError,),
    Meaning.UNREACHABLE: (of_ray.ActorUnavailableError,),
    Meaning.DEAD: (
        of_ray.ActorDiedError,
        of_ray.ActorPlacementGroupRemoved,
        of_ray.AsyncioActorExit,
        of_ray.LocalRayletDiedError,
        of_ray.OutOfMemoryError,
        of_ray.RayActorError,
        of_ray.WorkerCrashedError,
    ),
    Meaning.NODE_DEAD: (of_ray.NodeDiedError,),
    Meaning.CALL_FAILED: (
        of_ray.ActorAlreadyExistsError,
        of_ray.ActorHandleNotFoundError,
        of_ray.CrossLanguageError,
        of_ray.GetTimeoutError,
        of_ray.ObjectFetchTimedOutError,
        of_ray.ObjectFreedError,
        of_ray.ObjectLostError,
        of_ray.ObjectReconstructionFailedError,
        of_ray.ObjectRefStreamEndOfStreamError,
        of_ray.ObjectStoreFullError,
        of_ray.OufOfBandObjectRefSerializationException,
        of_ray.OutOfDiskError,
        of_ray.OwnerDiedError,
        of_ray.PendingCallsLimitExceeded,
        of_ray.PlasmaObjectNotAvailable,
        of_ray.RayCgraphCapacityExceeded,
        of_ray.RayChannelError,
        of_ray.RayChannelTimeoutError,
        of_ray.RayDirectTransportError,
        of_ray.RayError,
        of_ray.RaySystemError,
        of_ray.ReferenceCountingAssertionError,
        of_ray.RpcError,
        of_ray.StreamingGeneratorReplayInconsistentError,
        of_ray.TaskCancelledError,
        of_ray.TaskPlacementGroupRemoved,
        of_ray.UnserializableException,
        of_ray.UserCodeException,
    ),
    Meaning.REFUSED: (
        of_ray.ActorUnschedulableError,
        of_ray.AuthenticationError,
        of_ray.RuntimeEnvSetupError,
        of_ray.TaskUnschedulableError,
    ),
}
KNOWN: dict[type[BaseException], Meaning] = {cls: meaning for meaning, row in _MEANINGS.items() for cls in row}


def meaning_of(error: BaseException) -> Meaning:
    """By the nearest class that is known; what is not known at all is a call that failed."""
    return next((KNOWN[cls] for cls in type(error).__mro__ if cls in KNOWN), Meaning.CALL_FAILED)


def translated(error: BaseException, is_node_lost: Callable[[], bool] = lambda: False) -> Exception:
    """An error that a call of Ray's ended with, as one of this package's or `Unexpected`.

    `is_node_lost` looks whether the node is gone, and is asked when a process is.
    """
    says = _says(error)[:_MOST_OF_RAYS]
    match meaning_of(error):
        case Meaning.RAISED:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Unexpected):
                return cause
            # Raised by Ray itself around the method, or by a class that does without `in_portable_errors`.
            return portable(cause) if cause is not None else Unexpected(says)
        case Meaning.NODE_DEAD | Meaning.UNREACHABLE:
            return NodeLost(says)
        case Meaning.DEAD:
            return NodeLost(says) if getattr(error, "preempted", False) or is_node_lost() else ReplicaLost(says)
        case Meaning.REFUSED:
            return ConfigurationError(f"Ray cannot run a replica: {one_line(error)}")
        case Meaning.CALL_FAILED:
            return Unexpected(f"{type(error).__name__}: {says}")


def portable(error: BaseException) -> Exception:
    """An exception as one that can be pickled, sent, and understood by a process that lacks its class.

    An error of this package stays of its class; one of a class derived from it elsewhere becomes the nearest of this
    package's. All others become `Unexpected`, but for want of memory, about which something can be done.
    """
    says = _says(error)
    own = next((cls for cls in type(error).__mro__ if cls.__module__ == errors.__name__), None)
    if own is not None and issubclass(own, NegServiceError):
        return own(says)
    if is_out_of_memory(error):
        return OutOfMemory(f"{type(error).__name__} {says}".strip())
    return Unexpected(f"{type(error).__name__}: {says}".removesuffix(": "), _where(error))


def in_portable_errors(method: _F) -> _F:
    """Make a method of an actor raise nothing but what is `portable`."""

    @functools.wraps(method)
    def guarded(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        # The last guard of a replica: nothing that a model, a measure or a library raises may end its process.
        except BaseException as error:  # noqa: BLE001
            raise portable(error) from None

    return guarded  # type: ignore[return-value]


def _says(error: BaseException) -> str:
    """In one line, and not without end."""
    try:
        text = str(error)
    # Its own `__str__` may fail in any way, and end processes with that.
    except BaseException as failed:  # noqa: BLE001
        text = f"(it cannot say what it is: {type(failed).__name__})"
    return _shortened(" ".join(text[: 2 * _MOST_LETTERS].split()), _MOST_LETTERS)


def _where(error: BaseException) -> str:
    try:
        told = "".join(traceback.TracebackException.from_exception(error, limit=-20).format())
    # Python itself shows notes and the fields of a SyntaxError, which may be anything.
    except BaseException:  # noqa: BLE001
        told = "".join(traceback.format_tb(error.__traceback__, limit=-20))
    return _shortened(told, _MOST_OF_TRACEBACK)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
