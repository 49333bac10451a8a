"""Parts are read on all cores, in their order, and as many at once as the memory bears."""

from __future__ import annotations

import os
import threading
import time

import pytest

from neg_service.studies.skills.parts import in_order, most_in_flight


@pytest.mark.parametrize(
    ("sizes", "together"), [([1] * 8, 2), ([40] * 6, 1), ([200, 1, 1, 200, 1], 1), ([50, 50] * 3, 2)]
)
def test_parts_in_work_are_bounded_by_their_bytes_and_results_keep_their_order(
    sizes: list[int], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More cores than this machine may have; 100 bytes may be in work, or one part.
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    most = 60 if together == 1 else 100
    lock, meeting = threading.Lock(), threading.Barrier(together)
    in_work: list[int] = []
    seen: list[list[int]] = []

    def work(item: int) -> int:
        with lock:
            in_work.append(sizes[item])
            seen.append(list(in_work))
        # The first get on only if so many are in work at once. (Were the later ones to meet as well, two of them could
        # leave an earlier one alone, whose result is waited for before another is begun.)
        if item < together:
            meeting.wait(timeout=20)
        with lock:
            in_work.remove(sizes[item])
        return item

    assert list(in_order(work, range(len(sizes)), lambda item: sizes[item], most)) == list(range(len(sizes)))
    assert all(sum(now) <= most or len(now) == 1 for now in seen)


def test_results_that_wait_to_be_taken_count_as_in_work() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    results = in_order(work, range(10), lambda item: 50, most=100)
    assert next(results) == 0
    time.sleep(0.1)
    assert sorted(begun) == [0, 1]
    assert list(results) == list(range(1, 10))


def test_what_may_be_in_work_follows_from_the_memory() -> None:
    assert 2**20 < most_in_flight() <= 2**30
    assert 8 * most_in_flight() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
