"""What is done about failures: pure functions, no cluster."""

from __future__ import annotations

import pytest

from neg_service.cluster import failures as module
from neg_service.cluster.failures import Action, Attempt, Failures, QuarantineStreak, decide, final_error
from neg_service.cluster.messages import Shard
from neg_service.errors import (
    ConfigurationError,
    DestinationError,
    DoesNotFit,
    ModelError,
    NegServiceError,
    NodeLost,
    NonFiniteError,
    OutOfMemory,
    PromptError,
    ReplicaLost,
    StorageError,
)


@pytest.mark.parametrize(
    ("error", "failures", "action"),
    [
        (ConfigurationError("x"), 1, Action.ABORT),
        (PromptError("x"), 1, Action.ABORT),
        (ModelError("x"), 1, Action.ABORT),
        (DestinationError("x"), 1, Action.ABORT),
        (NonFiniteError("x"), 1, Action.QUARANTINE),
        (OutOfMemory("x"), 1, Action.RETRY_SMALLER),
        (DoesNotFit("x"), 1, Action.QUARANTINE),
        (OutOfMemory("x"), 3, Action.QUARANTINE),
        (ReplicaLost("x"), 1, Action.REPLACE),
        (ReplicaLost("x"), 3, Action.QUARANTINE),
        (RuntimeError("CUDA error: device-side assert triggered"), 1, Action.REPLACE),
        (StorageError("x"), 1, Action.REPLACE),
        (StorageError("x"), 3, Action.ABORT),
        (RuntimeError("anything"), 2, Action.RETRY),
        (RuntimeError("anything"), 3, Action.QUARANTINE),
    ],
)
def test_what_is_done_about_a_failure(error: Exception, failures: int, action: Action) -> None:
    assert decide(error, failures, 3) is action


def test_a_shard_that_lost_its_node_is_requeued_and_only_after_ten_of_them_suspected() -> None:
    for requeues in (1, 10):
        assert decide(NodeLost("gone"), 0, 3, requeues) is Action.REQUEUE
        assert decide(NodeLost("gone"), 2, 3, requeues) is Action.REQUEUE
    assert decide(NodeLost("gone"), 1, 3, 11) is Action.REPLACE
    assert decide(NodeLost("gone"), 3, 3, 11) is Action.QUARANTINE


@pytest.mark.parametrize(
    ("error", "scale"),
    [(RuntimeError("odd"), 1.0), (OutOfMemory("full"), 0.5), (ReplicaLost("killed"), 0.5), (StorageError("away"), 1.0)],
)
def test_a_shard_is_tried_again_in_smaller_batches_where_memory_may_have_been_short(
    error: Exception, scale: float
) -> None:
    attempt = Attempt(Shard(0, ()))
    assert not attempt.is_retry
    attempt.fail(error, 4, 3)
    assert attempt.is_retry
    assert (attempt.batch_scale, attempt.failures.count, list(attempt.failures.on)) == (scale, 1, [4])


def test_a_shard_that_was_lost_with_its_node_has_not_failed_until_that_is_too_often() -> None:
    attempt = Attempt(Shard(0, ()))
    for _ in range(10):
        assert attempt.fail(NodeLost("gone"), 4, 3) is Action.REQUEUE
    assert (attempt.is_retry, attempt.batch_scale) == (False, 1.0)
    assert [attempt.fail(NodeLost("gone"), 4, 3) for _ in range(3)] == [
        Action.REPLACE, Action.REPLACE, Action.QUARANTINE,
    ]  # fmt: skip


def test_what_all_wait_for_ends_the_run_with_itself_or_with_how_often_it_failed() -> None:
    failures = Failures()
    assert final_error(failures.add(ReplicaLost("dead"), 0, 2), ReplicaLost("dead"), "no start", 1) is None
    lost = ReplicaLost("dead")
    final = final_error(failures.add(lost, 0, 2), lost, "no start", failures.count)
    assert type(final) is NegServiceError
    assert str(final) == "no start, 2 tries failed: dead"
    assert final.__cause__ is lost
    wrong = ModelError("another model")
    assert final_error(Failures().add(wrong, 0, 2), wrong, "no start", 1) is wrong


def test_many_shards_given_up_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_QUARANTINED_IN_A_ROW", 2)
    streak = QuarantineStreak()
    assert streak.add(NonFiniteError("a")) is None
    streak.clear()
    assert streak.add(NonFiniteError("b")) is None
    assert str(streak.add(NonFiniteError("c"))) == "2 shards in a row failed and none was done, the last with: c"
