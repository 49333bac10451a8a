"""Grouping by header and filling batches: against brute force, and at the edges."""

from __future__ import annotations

import random
from itertools import accumulate, combinations, pairwise

import pytest

from neg_service.models.batches import (
    MOST_PATIENCE,
    PASS_COST,
    Budget,
    Group,
    Limit,
    end_of_part,
    group_by_prefix,
)


def _cost(prompts: list[list[int]], groups: list[Group]) -> int:
    return sum(
        PASS_COST * (1 + (group.shared > 0)) + group.shared + sum(len(prompts[i]) - group.shared for i in group.members)
        for group in groups
    )


def _cheapest(prompts: list[list[int]]) -> int:
    """Every cutting of the sorted order, each run with its longest common header or none."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    best = None
    for n_cuts in range(len(order)):
        for cuts in combinations(range(1, len(order)), n_cuts):
            bounds = [0, *cuts, len(order)]
            groups = []
            for start, end in pairwise(bounds):
                members = tuple(order[start:end])
                longest = min(len(prompts[i]) for i in members) - 1
                common = next((c for c in range(longest) if len({prompts[i][c] for i in members}) > 1), longest)
                groups.append(min((Group(members, common), Group(members, 0)), key=lambda g: _cost(prompts, [g])))
            cost = _cost(prompts, groups)
            best = cost if best is None else min(best, cost)
    assert best is not None
    return best


def test_grouping_is_the_cheapest_and_headers_are_really_shared() -> None:
    draw = random.Random(0)
    for _ in range(200):
        base = [draw.randrange(2) for _ in range(400)]
        prompts = [
            base[: draw.choice([0, 20, 90, 300])] + [draw.randrange(5) for _ in range(draw.randrange(1, 60))]
            for _ in range(draw.randrange(1, 8))
        ]
        groups = group_by_prefix(prompts)
        assert sorted(i for group in groups for i in group.members) == list(range(len(prompts)))
        for group in groups:
            headers = {tuple(prompts[i][: group.shared]) for i in group.members}
            assert len(headers) == 1
            assert all(len(prompts[i]) > group.shared for i in group.members)
        assert _cost(prompts, groups) == _cheapest(prompts)


def test_a_long_header_is_found_and_the_stranger_stays_apart() -> None:
    header = list(range(300))
    prompts = [[*header, 900 + i, i] for i in range(8)] + [[7, 8]]
    groups = {group.members: group.shared for group in group_by_prefix(prompts)}
    assert groups == {(8,): 0, tuple(range(8)): 300} or groups == {tuple(range(8)): 300, (8,): 0}


def test_no_prompts_make_no_groups() -> None:
    assert group_by_prefix([]) == []


def parts(costs: list[int], room: int) -> list[list[int]]:
    """What items of these costs are cut into."""
    sums, start, found = [0, *accumulate(costs)], 0, []
    while start < len(costs):
        end = end_of_part(sums, start, room)
        found.append(costs[start:end])
        start = end
    return found


@pytest.mark.parametrize(
    ("costs", "room", "expected"),
    [
        # As many as fit, in parts of the same size: three of ten bytes would hold 4, 4 and 2 rows.
        ([1] * 10, 4, [[1] * 4, [1] * 3, [1] * 3]),
        ([1] * 10, 10, [[1] * 10]),
        ([1] * 10, 99, [[1] * 10]),
        # Half of 11 bytes, and no more than 6.
        ([2, 2, 2, 5], 6, [[2, 2, 2], [5]]),
        # What does not fit runs alone.
        ([3, 9, 3], 8, [[3], [9], [3]]),
        ([7, 7], 0, [[7], [7]]),
        ([], 5, []),
    ],
)
def test_parts_fill_the_room_evenly(costs: list[int], room: int, expected: list[list[int]]) -> None:
    assert parts(costs, room) == expected


def test_parts_leave_nobody_out_and_are_nearly_as_few_as_can_be() -> None:
    draw = random.Random(0)
    for _ in range(500):
        costs, room = sorted(draw.randrange(1, 20) for _ in range(draw.randrange(1, 40))), draw.randrange(1, 90)
        found = parts(costs, room)
        assert [cost for part in found for cost in part] == costs
        assert all(sum(part) <= room or len(part) == 1 for part in found)
        greedy, left = 1, room
        for cost in costs:
            greedy, left = (greedy, left - cost) if cost <= left else (greedy + 1, room - cost)
        assert len(found) <= greedy + 1


def test_a_lowered_limit_doubles_after_batches_that_fitted_and_stops_at_what_was_given() -> None:
    limit = Limit(100, 100, 3).lowered(50).lowered(25)
    seen = []
    for _ in range(8):
        limit = limit.after_fitting()
        seen.append(limit.now)
    assert seen == [25, 25, 50, 50, 50, 100, 100, 100]
    # One more, and the failures are forgotten.
    assert limit.after_fitting() == Limit(100, 100, 3)
    assert Limit(100, 60, 1).after_fitting().now == 100
    assert Limit(100, 100, 3).after_fitting() == Limit(100, 100, 3)


def test_a_size_that_does_not_fit_is_tried_less_and_less_often() -> None:
    limit, failures = Limit(64, 64, 4), []
    for step in range(20_000):
        # More than 20 never fits.
        if limit.now > 20:
            failures.append(step)
            limit = limit.lowered(limit.now / 2)
        else:
            limit = limit.after_fitting()
    # 64 and 32 at first; then 32 after 4, 8, 16, ... batches.
    assert failures[:6] == [0, 1, 6, 15, 32, 65]
    waits = [after - before for before, after in pairwise(failures[2:])]
    assert waits == sorted(waits)
    assert len(failures) < 20
    assert max(waits) <= MOST_PATIENCE + 1


def test_a_failure_long_after_all_was_well_begins_anew() -> None:
    limit = Limit(64, 64, 2)
    for _ in range(3):
        limit = limit.lowered(32)
        for _ in range(2 + 2):
            limit = limit.after_fitting()
        assert limit == Limit(64, 64, 2)


def test_a_budget_recovers_up_to_what_was_given_and_keeps_a_byte() -> None:
    budget = Budget(1000)
    budget.lower_to(125)
    # What is lower already stays.
    budget.lower_to(500)
    assert budget.bytes == 125
    part = budget.scaled(0.5)
    part.lower_to(1)
    assert (part.bytes, budget.scaled(0.5).bytes, budget.bytes) == (1, 62, 125)
    for _ in range(1000):
        budget.has_fitted()
    assert budget.bytes == 1000
    for _ in range(50):
        budget.lower_to(budget.bytes / 2)
    assert (budget.bytes, budget.scaled(1e-9).bytes) == (1, 1)
