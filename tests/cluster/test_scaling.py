"""How many replicas to launch and to remove, as arithmetic."""

from __future__ import annotations

import pytest

from neg_service.cluster.scaling import Capacity, Change, changes


@pytest.mark.parametrize(
    ("capacity", "n_left", "there", "expected"),
    [
        # A number is a number, and what waits for a node counts as there.
        (Capacity(3), None, {"present": 0, "unplaced": 0, "starting": 0}, Change(3, 0)),
        (Capacity(3), None, {"present": 2, "unplaced": 2, "starting": 2}, Change(1, 0)),
        (Capacity(3), None, {"present": 4, "unplaced": 0, "starting": 0}, Change(0, 0)),
        # As many as are free, less those that will take what is free: 5 + (4 - 1) are wanted.
        (Capacity(None, free=4), None, {"present": 5, "unplaced": 1, "starting": 2}, Change(3, 0)),
        (Capacity(None, free=4), None, {"present": 5, "unplaced": 6, "starting": 6}, Change(0, 0)),
        # One waits where there is no capacity at all.
        (Capacity(None), None, {"present": 0, "unplaced": 0, "starting": 0}, Change(1, 0)),
        # No more than shards are left: 5 + 4 would fit, 7 are wanted.
        (Capacity(None, free=4), 7, {"present": 5, "unplaced": 0, "starting": 0}, Change(2, 0)),
        (Capacity(3), 0, {"present": 0, "unplaced": 0, "starting": 0}, Change(0, 0)),
        # Two too many, of which only those go that have not started.
        (Capacity(5), 3, {"present": 5, "unplaced": 0, "starting": 3}, Change(0, 2)),
        (Capacity(5), 3, {"present": 5, "unplaced": 0, "starting": 1}, Change(0, 1)),
        (Capacity(5), 0, {"present": 5, "unplaced": 0, "starting": 0}, Change(0, 0)),
    ],
)
def test_what_is_launched_and_removed(
    capacity: Capacity, n_left: int | None, there: dict[str, int], expected: Change
) -> None:
    assert changes(capacity, n_left, **there) == expected
