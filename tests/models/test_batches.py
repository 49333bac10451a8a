"""Grouping by header and filling batches: against brute force, and at the edges."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

from neg_service.models.batches import (
    MOST_PATIENCE,
    PASS_COST,
    ROW_COST,
    Budget,
    Group,
    Limit,
    RowBudget,
    fill_batches,
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


def test_batches_keep_the_budget_and_leave_nobody_out() -> None:
    lengths, branches = [5, 50, 7, 30, 1], [2, 1, 4, 4, 1]
    batches = list(fill_batches(lengths, branches, Budget(100)))
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
    for batch in batches:
        spent = sum(lengths[i] + ROW_COST * branches[i] for i in batch)
        assert spent <= 100 or len(batch) == 1


def test_halving_the_budget_shrinks_the_batches_that_follow() -> None:
    budget = Budget(10 * (1 + ROW_COST))
    sizes = []
    for batch in fill_batches([1] * 20, [1] * 20, budget):
        sizes.append(len(batch))
        budget.halve()
    assert sizes[:3] == [10, 5, 2]
    assert sum(sizes) == 20
    assert budget.tokens >= 1


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


def test_budgets_recover_up_to_what_was_given_and_keep_their_least() -> None:
    budget, rows = Budget(1000, 0.5), RowBudget(64)
    budget.halve()
    budget.lower(0.25)
    rows.lower(9)
    assert (budget.tokens, budget.scale, rows.rows) == (125, 0.0625, 9)
    for _ in range(1000):
        budget.has_fitted()
        rows.has_fitted()
    assert (budget.tokens, budget.scale, rows.rows) == (1000, 0.5, 64)
    for _ in range(50):
        budget.halve()
        rows.lower(1)
    assert (budget.tokens, rows.rows) == (1, 2)
    assert budget.scale > 0
