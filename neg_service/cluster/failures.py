"""What to do when a shard fails: a pure function of the error and of what has happened to the shard before."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from neg_service.cluster.plan import Shard
from neg_service.errors import (
    ConfigurationError,
    DoesNotFit,
    NodeLost,
    NonFiniteError,
    OutOfMemory,
    ReplicaLost,
    StorageError,
)

# So often a shard may lose its node before that counts as a failure of the shard.
MOST_MOVES = 10


@dataclass
class Attempt:
    """A shard on its way, and what has happened to it so far."""

    shard: Shard
    failures: int = 0
    moves: int = 0
    batch_scale: float = 1.0
    failed_on: set[int] = field(default_factory=set)


class Action(Enum):
    """What the driver does about a failed shard."""

    RETRY = "retry"
    # Again with half the batch.
    SPLIT = "split"
    # Again on a new replica: this one is gone or cannot be trusted.
    REPLACE = "replace the replica"
    # Again elsewhere, and not counted: its node is gone.
    MOVE = "move"
    # Not again: keep the error, go on with the rest.
    SET_ASIDE = "set aside"
    # Nothing will get better: end the run with this error.
    STOP = "stop"


def decide(error: BaseException, failures: int, most: int, moves: int = 0) -> Action:
    """The action for a shard that has now failed `failures` times, of at most `most`, and lost its node `moves` times.

    Nodes come and go, on spot machines several times a day: a shard that loses its node is moved, and only one that
    has lost more than ten is suspected of having ended them. A wrong configuration is wrong for every shard: stop. So
    is a store that stays away from one replica after another, each of which has waited as long as it was told to; a
    single one may have lost its network alone. A non-finite value is there again on every retry, and a prompt that did
    not fit alone asks for as much again: set aside at once. All else may be the replica's or the moment's fault, and is
    tried again.
    """
    if isinstance(error, ConfigurationError):
        return Action.STOP
    if isinstance(error, NodeLost) and moves <= MOST_MOVES:
        return Action.MOVE
    if isinstance(error, StorageError):
        return Action.STOP if failures >= most else Action.REPLACE
    if isinstance(error, NonFiniteError | DoesNotFit) or failures >= most:
        return Action.SET_ASIDE
    if isinstance(error, OutOfMemory):
        return Action.SPLIT
    # After an error on the device its process answers every later call with the same error.
    if isinstance(error, ReplicaLost) or "CUDA error" in str(error):
        return Action.REPLACE
    return Action.RETRY
