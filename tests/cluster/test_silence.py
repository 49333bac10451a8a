"""When a replica of which nothing is heard is asked what it is doing, and when it is given up."""

from __future__ import annotations

from typing import Any

import pytest

from neg_service.cluster.failures import Attempt
from neg_service.cluster.messages import Shard
from neg_service.cluster.pool import Outage, ReplicaHandle, TimedCall
from neg_service.cluster.silence import Silence


def busy_since(progressed_at: float) -> ReplicaHandle:
    """A replica that has a shard since then."""
    in_flight = {object(): Attempt(Shard(0, ()))}
    return ReplicaHandle(
        0, None, None, None, has_started=True, node="a", in_flight=in_flight, progressed_at=progressed_at
    )


def test_a_question_goes_out_every_half_minute_and_its_answer_counts_only_after_a_long_silence() -> None:
    silence = Silence(stall_seconds=100)
    one = busy_since(1000)
    assert not silence.should_probe(one, 1029)
    assert silence.should_probe(one, 1031)
    one.probe = TimedCall(object(), 1031)
    assert not silence.should_probe(one, 1090)
    assert silence.unanswered(one, 1090) is None
    assert silence.answered(one, False, 1090) is None
    assert not silence.should_probe(one, 1119)
    assert silence.should_probe(one, 1121)
    one.probe = TimedCall(object(), 1121)
    assert "does not answer" in str(silence.unanswered(one, 1132))
    assert silence.answered(one, True, 1122) is None
    assert one.progressed_at == 1122, "one that only stores is left alone"
    one.progressed_at = 1000
    assert "122 s and still computes" in str(silence.answered(one, False, 1122))


def test_before_anything_is_known_of_shards_no_silence_is_too_long() -> None:
    silence = Silence(None)
    one = busy_since(0)
    one.probe = TimedCall(object(), 31)
    assert silence.unanswered(one, 10**6) is None
    assert silence.answered(one, False, 10**6) is None


@pytest.mark.parametrize(
    "busy",
    [
        {"has_started": True, "placed_at": 1.0, "calibrate_call": TimedCall(object(), 1000.0)},
        {"start_call": object(), "placed_at": 1000.0},
    ],
    ids=["calibrates", "loads"],
)
@pytest.mark.parametrize("stall_seconds", [None, 50.0])
def test_one_that_calibrates_or_loads_is_asked_for_the_sake_of_its_connection_alone(
    busy: dict[str, Any], stall_seconds: float | None
) -> None:
    silence = Silence(stall_seconds)
    one = ReplicaHandle(0, None, None, **{"start_call": None, **busy})
    assert not silence.should_probe(one, 1029)
    assert silence.should_probe(one, 1031)
    one.probe = TimedCall(object(), 1031)
    assert not silence.should_probe(one, 5000)
    # For how long that may take is not asked here.
    assert silence.unanswered(one, 5000) is None
    assert silence.answered(one, False, 5000) is None
    assert not silence.should_probe(one, 5029)
    assert silence.should_probe(one, 5031)
    one.outage = Outage(5031, "no answer", 5031)
    assert not silence.should_probe(one, 6000)


def test_who_has_nothing_to_do_or_no_node_is_not_asked() -> None:
    assert not Silence(None).should_probe(ReplicaHandle(0, None, None, None, has_started=True, placed_at=1.0), 5000)
    assert not Silence(None).should_probe(ReplicaHandle(0, None, object(), object()), 5000)
