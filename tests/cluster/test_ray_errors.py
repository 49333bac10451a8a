"""What errors of Ray's mean, and which exceptions travel: no Ray is started."""

from __future__ import annotations

import inspect
import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions as of_ray
from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext

from neg_service.cluster.failures import Action, decide
from neg_service.cluster.gcs import died_with_its_node
from neg_service.cluster.ray_errors import (
    KNOWN,
    Meaning,
    Unexpected,
    in_portable_errors,
    meaning_of,
    portable,
    translated,
)
from neg_service.errors import (
    ConfigurationError,
    DoesNotFit,
    ModelError,
    NegServiceError,
    NodeLost,
    NonFiniteError,
    OutOfMemory,
    ReplicaLost,
    StorageError,
)

EXPORTED = [cls for _, cls in inspect.getmembers(of_ray, inspect.isclass) if issubclass(cls, of_ray.RayError)]


def raised(cause: BaseException) -> Exception:
    """What Ray gives a caller whose method raised."""
    error: Exception = of_ray.RayTaskError("run", "Traceback ...", cause, ip="127.0.0.1").as_instanceof_cause()
    return error


class NeedsMore(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class HoldsALock(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("locked", threading.Lock())


class CannotSay(Exception):
    """Fails when it is shown."""

    def __str__(self) -> str:
        raise ValueError("not now")


class EndsWhoeverShowsIt(Exception):
    """Raises what ends a process when it is shown."""

    def __str__(self) -> str:
        raise SystemExit(1)


class HasOddNotes(Exception):
    """Fails when its notes are shown."""

    @property
    def __notes__(self) -> list[str]:
        raise ValueError("not now")


def odd_syntax_error() -> Exception:
    """One that Python cannot show, as generated code may give."""
    error = SyntaxError("odd", ("file", 1, 2, "text"))
    error.offset = "second"  # type: ignore[assignment]
    return error


class OfSomebodyElse(NonFiniteError):
    """Derived from one of ours, in a module that the driver may lack."""


class Odd(ModelError):
    """One of ours that cannot be made from its text."""

    def __init__(self, layer: int, what: str) -> None:
        super().__init__(f"layer {layer}: {what}")


def local() -> Exception:
    """Of a class that nobody can import."""

    class Local(Exception):
        pass

    return Local("from nowhere")


@pytest.mark.parametrize("cls", EXPORTED, ids=lambda cls: cls.__name__)
def test_every_error_that_ray_exports_has_a_meaning_of_its_own(cls: type[Exception]) -> None:
    assert cls in KNOWN


def test_an_error_that_is_not_known_yet_has_that_of_the_nearest_class() -> None:
    class Newer(of_ray.ActorDiedError):
        pass

    class Unheard(of_ray.RayError):
        pass

    assert meaning_of(Newer()) is Meaning.DEAD
    assert meaning_of(Unheard()) is Meaning.CALL_FAILED
    assert meaning_of(ValueError()) is Meaning.CALL_FAILED


@pytest.mark.parametrize(
    ("error", "is_node_lost", "expected", "action"),
    [
        (of_ray.ActorDiedError(), False, ReplicaLost, Action.REPLACE),
        (of_ray.ActorDiedError(), True, NodeLost, Action.REQUEUE),
        (of_ray.RayActorError(preempted=True), False, NodeLost, Action.REQUEUE),
        (
            of_ray.RayActorError(error_msg="The actor died because its node has died"),
            False,
            ReplicaLost,
            Action.REPLACE,
        ),
        (of_ray.WorkerCrashedError(), False, ReplicaLost, Action.REPLACE),
        (of_ray.OutOfMemoryError("killed by the memory monitor"), False, ReplicaLost, Action.REPLACE),
        (of_ray.NodeDiedError("gone"), False, NodeLost, Action.REQUEUE),
        (of_ray.ActorUnavailableError("no answer", None), False, NodeLost, Action.REQUEUE),
        (of_ray.TaskCancelledError(), False, Unexpected, Action.RETRY),
        (of_ray.UnserializableException("Traceback ..."), False, Unexpected, Action.RETRY),
        (of_ray.RaySystemError("cannot deserialise"), False, Unexpected, Action.RETRY),
        (of_ray.RpcError("unavailable"), False, Unexpected, Action.RETRY),
        (of_ray.ObjectLostError("ab", None, ""), True, Unexpected, Action.RETRY),
        (of_ray.GetTimeoutError("late"), False, Unexpected, Action.RETRY),
        (of_ray.RuntimeEnvSetupError("no pip"), False, ConfigurationError, Action.ABORT),
        (of_ray.ActorUnschedulableError("no such node"), False, ConfigurationError, Action.ABORT),
        (raised(Unexpected("ValueError: 3", "Traceback ...")), False, Unexpected, Action.RETRY),
        (raised(of_ray.TaskCancelledError()), False, Unexpected, Action.RETRY),
        (raised(StorageError("away")), False, StorageError, Action.REPLACE),
        (raised(OfSomebodyElse("NaN")), False, NonFiniteError, Action.QUARANTINE),
        (raised(MemoryError("4 GiB")), False, OutOfMemory, Action.RETRY_SMALLER),
        (raised(KeyError("x")), False, Unexpected, Action.RETRY),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_an_error_means_and_what_is_done(
    error: Exception, is_node_lost: bool, expected: type[Exception], action: Action
) -> None:
    found = translated(error, lambda: is_node_lost)
    assert type(found) is expected
    assert str(found)
    assert "\n" not in str(found)
    assert decide(found, 1, 3, 1) is action


@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (NeedsMore(1, 2), Unexpected, "NeedsMore: 1 and 2"),
        (HoldsALock(), Unexpected, "HoldsALock: ('locked', <unlocked"),
        (CannotSay(), Unexpected, "CannotSay: (it cannot say what it is: ValueError)"),
        (EndsWhoeverShowsIt(), Unexpected, "EndsWhoeverShowsIt: (it cannot say what it is: SystemExit)"),
        (HasOddNotes("noted"), Unexpected, "HasOddNotes: noted"),
        (odd_syntax_error(), Unexpected, "SyntaxError: odd"),
        (local(), Unexpected, "Local: from nowhere"),
        (ValueError("two\nlines"), Unexpected, "ValueError: two lines"),
        (ValueError("x" * 10**7), Unexpected, "ValueError: xxx"),
        (ValueError(bytes(10**6)), Unexpected, "ValueError: b'\\x00"),
        (SystemExit(3), Unexpected, "SystemExit: 3"),
        (ExceptionGroup("several", [ValueError("one")]), Unexpected, "ExceptionGroup: several"),
        (of_ray.TaskCancelledError(error_message="stopped"), Unexpected, "TaskCancelledError: stopped"),
        (OfSomebodyElse("NaN"), NonFiniteError, "NaN"),
        (Odd(3, "no gate"), ModelError, "layer 3: no gate"),
        (NegServiceError("itself"), NegServiceError, "itself"),
        (MemoryError(), OutOfMemory, "MemoryError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_leaves_a_replica_travels_and_stays_small(
    error: BaseException, expected: type[Exception], says: str
) -> None:
    @in_portable_errors
    def method() -> None:
        raise error

    with pytest.raises(expected) as caught:
        method()
    arrived = pickle.loads(pickle.dumps(caught.value))
    assert type(arrived) is expected
    assert str(arrived).startswith(says)
    assert len(pickle.dumps(caught.value)) < 20_000
    # Nothing of the error itself hangs on what is sent.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_where_an_unexpected_error_came_from_is_told() -> None:
    def deep() -> None:
        raise NeedsMore(1, 2)

    try:
        deep()
    except NeedsMore as error:
        found = portable(error)
    assert isinstance(found, Unexpected)
    assert "in deep" in found.where


@pytest.mark.parametrize(
    ("reason", "is_node_gone", "expected"),
    [
        ("NODE_DIED", False, True),
        ("WORKER_DIED", False, False),
        ("WORKER_DIED", True, True),
        ("RAY_KILL", False, False),
    ],
)
def test_a_death_with_the_node_is_told_by_the_record_of_it(reason: str, is_node_gone: bool, expected: bool) -> None:
    context = ActorDiedErrorContext(reason=ActorDiedErrorContext.Reason.Value(reason))
    assert died_with_its_node(ActorDeathCause(actor_died_error_context=context), is_node_gone) is expected


@pytest.mark.parametrize("cause", [None, SimpleNamespace(), ActorDeathCause()])
def test_without_a_record_only_the_node_tells(cause: Any) -> None:
    assert not died_with_its_node(cause, False)
    assert died_with_its_node(cause, True)


@pytest.mark.parametrize(
    ("cause", "action"),
    [
        (MemoryError("no memory"), Action.RETRY_SMALLER),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            Action.RETRY_SMALLER,
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Action.RETRY_SMALLER),
        (OutOfMemory("cuda:0 is full"), Action.RETRY_SMALLER),
        (DoesNotFit("prompt 'a' does not fit"), Action.QUARANTINE),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Action.REPLACE),
    ],
)
def test_memory_that_ended_in_a_replica_is_known_by_its_words(cause: Exception, action: Action) -> None:
    error = translated(of_ray.RayTaskError("run", "its traceback", cause))
    assert isinstance(error, OutOfMemory) == (action is not Action.REPLACE)
    assert decide(error, 1, 3) is action
