"""How long an operation is waited for, and when a person is told, second by second on a clock of the tests' own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from neg_service.storage import waiting
from neg_service.storage.waiting import NoAnswer, Waiting


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(waiting, "time", made)
    return made


def until_given_up(wait: Waiting, clock: Clock, bytes_a_second: Callable[[float], float], most: float = 1000) -> float:
    """The second at which an attempt is given up, looked at once a second."""
    moved = 0.0
    while clock.now < most:
        try:
            wait.look(int(moved), "there")
        except NoAnswer:
            return clock.now
        clock.now += 1
        moved += bytes_a_second(clock.now)
    return most


def given_up_with(go_on: Callable[[int], None]) -> str:
    """What is said when something that goes on second by second is given up."""
    for second in range(1000):
        try:
            go_on(second)
        except NoAnswer as error:
            return str(error)
    return "nothing"


def test_patience_counts_from_when_an_operation_was_last_seen_to_get_on(clock: Clock) -> None:
    # 600 s, the default: a minute for the first attempt, so that there are others.
    wait = Waiting(600, is_repeated=True)
    assert until_given_up(wait, clock, lambda now: 0) == 60
    assert wait.fail() == 540
    # The next one gets on for ten minutes and stalls then: there is no other after it.
    wait.begin_attempt()
    assert until_given_up(wait, clock, lambda now: 10_000 if now < 700 else 0) == 699 + 60
    assert wait.fail() == 0
    # What gets on for long in its first attempt has its patience from there.
    clock.now = 0
    wait = Waiting(30, is_repeated=True)
    assert until_given_up(wait, clock, lambda now: 10_000 if now <= 100 else 0) == 115
    assert wait.fail() == 15
    # Half of what is left, but never less than ten seconds while there are as many.
    wait.begin_attempt()
    assert until_given_up(wait, clock, lambda now: 0) == 125
    wait.begin_attempt()
    assert until_given_up(wait, clock, lambda now: 0) == 130
    assert wait.fail() == 0


def test_a_trickle_is_no_transfer_and_a_slow_link_is_one(clock: Clock) -> None:
    for bytes_a_second, given_up in ((0, 30), (1, 30), (900, 30), (2000, 1000)):
        clock.now = 0
        assert until_given_up(Waiting(30), clock, lambda now, speed=bytes_a_second: speed) == given_up


def test_what_moves_for_requests_that_are_refused_is_no_getting_on(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    wait, told_at = Waiting(30, is_repeated=True), list[float]()

    def go_on(second: int) -> None:
        """Two seconds for a megabyte each time, and one of pause."""
        clock.now = second
        if second % 3 == 0:
            wait.ask()
        wait.look(10**6 * (second // 3 + (second % 3 > 1)), "there")
        if second % 3 == 2:
            wait.refuse("503 SlowDown")
        if caplog.messages and not told_at:
            told_at.append(clock.now)

    assert given_up_with(go_on) == "503 SlowDown; tried for 16 s"
    assert told_at[0] <= 10
    assert caplog.messages == ["there: 503 SlowDown; tried for 8 s; waiting for up to 22 s more"]
    assert wait.fail() <= 16


def test_a_transfer_after_a_refusal_takes_as_long_as_it_gets_on(clock: Clock) -> None:
    wait = Waiting(30, is_repeated=True)
    wait.ask()
    wait.refuse("503 SlowDown")
    wait.ask()
    assert until_given_up(wait, clock, lambda now: 20_000 if now <= 300 else 0) == 315
    # One that succeeded is where time counts from.
    clock.now = 0
    wait = Waiting(30, is_repeated=True)
    for second in range(0, 300, 10):
        clock.now = second
        wait.ask()
        wait.refuse("503 SlowDown")
        wait.ask()
        wait.get_on()
    assert wait.left == 30


def test_what_was_said_before_a_silence_is_not_forgotten(clock: Clock) -> None:
    wait = Waiting(30, is_repeated=True)
    wait.ask()
    wait.refuse("503 SlowDown")
    wait.fail()
    wait.begin_attempt()
    wait.ask()

    def go_on(second: int) -> None:
        clock.now = second
        wait.look(0, "there")

    assert given_up_with(go_on) == "timed out: no answer for 15 s; before that: 503 SlowDown"


def test_a_part_that_is_done_is_getting_on(clock: Clock) -> None:
    wait = Waiting(10)
    for _ in range(20):
        clock.now += 9
        wait.look(0, "there")
        wait.get_on()


def test_a_person_is_told_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    wait = Waiting(30)
    until_given_up(wait, clock, lambda now: 0)
    assert caplog.messages == ["there: no answer for 8 s; waiting for up to 22 s more"]
