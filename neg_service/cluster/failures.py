"""What to do when something fails: pure functions of the error and of what happened before, and counters of that.

Nothing here knows a replica, a store or Ray. What a run does about the answers is the driver's and the pool's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from neg_service.cluster.messages import Shard
from neg_service.errors import (
    ConfigurationError,
    DoesNotFit,
    NegServiceError,
    NodeLost,
    NonFiniteError,
    OutOfMemory,
    ReplicaLost,
    StorageError,
)

# So often a shard may lose its node before that counts as a failure of the shard.
MOST_REQUEUES = 10
# So many shards given up without one done between them are no longer the shards' fault.
MOST_QUARANTINED_IN_A_ROW = 20


class Action(Enum):
    """What the driver does about a failed shard; the values are labels of a metric, and stand in the log."""

    RETRY = "retry"
    # Again with half the batch.
    RETRY_SMALLER = "retry smaller"
    # Again on a new replica: this one is gone or cannot be trusted.
    REPLACE = "replace"
    # Again elsewhere, and not counted: its node is gone.
    REQUEUE = "requeue"
    # Not again: keep the error, go on with the rest.
    QUARANTINE = "quarantine"
    # Nothing will get better: end the run with this error.
    ABORT = "abort"


def decide(error: BaseException, failures: int, most: int, requeues: int = 0) -> Action:
    """The action for a shard that has failed `failures` times, of at most `most`, and lost its node `requeues` times.

    Nodes come and go, on spot machines several times a day: a shard that loses its node is requeued, and only one that
    has lost more than ten is suspected of having ended them. A wrong configuration is wrong for every shard: abort. So
    is a store that stays away from one replica after another, each of which has waited as long as it was told to; a
    single one may have lost its network alone. A non-finite value is there again on every retry, and a prompt that did
    not fit alone asks for as much again: quarantined at once. All else may be the replica's or the moment's fault, and
    is tried again.
    """
    if isinstance(error, ConfigurationError):
        return Action.ABORT
    if isinstance(error, NodeLost) and requeues <= MOST_REQUEUES:
        return Action.REQUEUE
    if isinstance(error, StorageError):
        return Action.ABORT if failures >= most else Action.REPLACE
    if isinstance(error, NonFiniteError | DoesNotFit) or failures >= most:
        return Action.QUARANTINE
    if isinstance(error, OutOfMemory):
        return Action.RETRY_SMALLER
    # After an error on the device its process answers every later call with the same error.
    if isinstance(error, ReplicaLost) or "CUDA error" in str(error):
        return Action.REPLACE
    return Action.RETRY


@dataclass(slots=True)
class Failures:
    """How often one thing failed, and on which replicas; how often it was lost with a node is counted apart."""

    count: int = 0
    requeues: int = 0
    on: dict[int, int] = field(default_factory=dict)

    def add(self, error: Exception, replica: int, most: int) -> Action:
        """Count a failure on a replica, and give what is to be done; what is only requeued has not failed."""
        self.requeues += isinstance(error, NodeLost)
        if decide(error, self.count, most, self.requeues) is Action.REQUEUE:
            return Action.REQUEUE
        self.count += 1
        self.on[replica] = self.on.get(replica, 0) + 1
        return decide(error, self.count, most, self.requeues)


@dataclass(slots=True)
class Attempt:
    """A shard on its way, and what has happened to it so far."""

    shard: Shard
    failures: Failures = field(default_factory=Failures)
    batch_scale: float = 1.0

    @property
    def is_retry(self) -> bool:
        """Whether it has failed before: it may be the shard's fault, and it runs alone on its replica."""
        return self.failures.count > 0

    def fail(self, error: Exception, replica: int, most: int) -> Action:
        """Count a failure, and give what is to be done.

        Memory may have been the reason also where a replica was lost: the next batches are half as large.
        """
        action = self.failures.add(error, replica, most)
        if action is Action.RETRY_SMALLER or (action is Action.REPLACE and isinstance(error, ReplicaLost)):
            self.batch_scale *= 0.5
        return action


def final_error(action: Action, error: Exception, what: str, tries: int) -> NegServiceError | None:
    """The error that ends a run when what all its shards wait for fails: a start, a calibration.

    None where another try may succeed. The error itself where it says what is wrong, else how often `what` was tried.
    """
    if action not in (Action.ABORT, Action.QUARANTINE):
        return None
    if isinstance(error, NegServiceError) and not isinstance(error, ReplicaLost):
        return error
    final = NegServiceError(f"{what}, {tries} tries failed: {error}")
    final.__cause__ = error
    return final


@dataclass
class QuarantineStreak:
    """How many shards were given up since one was last done."""

    length: int = 0

    def clear(self) -> None:
        """A shard is done."""
        self.length = 0

    def add(self, error: Exception) -> NegServiceError | None:
        """Count one; the error that ends the run when there are too many."""
        self.length += 1
        if self.length < MOST_QUARANTINED_IN_A_ROW:
            return None
        final = NegServiceError(f"{self.length} shards in a row failed and none was done, the last with: {error}")
        final.__cause__ = error
        return final


@dataclass(frozen=True)
class Limits:
    """How much failure and silence a run bears.

    attempts: how often a shard, a start in a row, or a calibration may fail. start_seconds: how long a replica may take
    to start once its process is up, and to calibrate. stall_seconds: how long one may be silent; by default a multiple
    of what shards have taken so far. unreachable_seconds: for how long one that cannot be reached is asked again.
    """

    attempts: int = 3
    start_seconds: float = float("inf")
    stall_seconds: float | None = None
    unreachable_seconds: float = 120.0
