"""Rows, shared prefixes that are kept, and what every engine answers for."""

from __future__ import annotations

import pytest

from neg_service.errors import ModelError
from neg_service.models.engines.base import KeptPrefixes, Row, SplitPrompt
from tests.families import model_of
from tests.refusals import refused
from tests.tiny_models import tiny_model


def test_a_shared_prefix_serves_single_prompts_too() -> None:
    model = tiny_model("Llama 2")
    prefixes = model.engine.prefixes
    model.engine.shared_prefix(range(1, 9))
    assert prefixes.longest([(*range(1, 9), 50, 51)]) == 8
    assert prefixes.longest([tuple(range(1, 9))]) == 0
    assert prefixes.longest([(*range(1, 9), 50), (1, 2, 3)]) == 0


def test_an_empty_prefix_takes_the_place_of_none() -> None:
    model = tiny_model("Llama 2")
    kept = [model.engine.shared_prefix(range(first, first + 4)) for first in (1, 2, 3, 4)]
    for _ in range(5):
        assert model.engine.shared_prefix(()).ids == ()
        model.rows([(7, 8)], ())
    assert all(model.engine.shared_prefix(own.ids) is own for own in kept)


def test_a_row_is_a_tree_of_which_one_token_is_shifted_and_some_are_read() -> None:
    # The last token, and two answers behind it that begin alike: t, a, then b or c.
    row = Row((7, 1, 2, 3), (-1, 0, 1, 1), 0, (0, 1))
    assert row.depths == (0, 1, 2, 2)
    assert row.positions(10) == (10, 11, 12, 12)
    assert not row.is_chain
    chain = Row.chain([5, 6, 7], 1)
    assert (chain.parents, chain.shifted, chain.read, chain.is_chain) == ((-1, 0, 1), 1, (1,), True)
    assert SplitPrompt((3, 4), chain).ids == (3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("parents", "shifted", "read"),
    [
        ((-1, 1), 0, (0,)),
        ((-1,), 0, (0,)),
        ((-2, 0), 0, (0,)),
        ((-1, 0), 2, (0,)),
        ((-1, 0), 0, (-1,)),
        ((-1, 0), 0, ()),
    ],
)
def test_what_is_no_row_is_refused(parents: tuple[int, ...], shifted: int, read: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"(parents|shifted)="):
        Row((5, 6), parents, shifted, read)


def test_the_last_few_prefixes_are_kept_and_run_once() -> None:
    ran: list[tuple[int, ...]] = []
    prefixes = KeptPrefixes[int]()

    def run(ids: tuple[int, ...]) -> int:
        ran.append(ids)
        return len(ran)

    assert [prefixes.of(ids, run) for ids in ([1, 2], [3], [1, 2], [4], [5])] == [1, 2, 1, 3, 4]
    # [3] was used longest ago.
    assert [prefixes.of(ids, run) for ids in ([6], [1, 2], [3])] == [5, 1, 6]
    prefixes.forget()
    assert prefixes.longest([(1, 2, 9)]) == 0
    assert prefixes.of([1, 2], run) == 7


@pytest.mark.parametrize("family", ["Llama 2", "GPT-J", "BERT"])
def test_rows_that_an_engine_cannot_run_are_refused(family: str) -> None:
    engine = model_of(family).engine
    two = SplitPrompt((3, 4), Row.chain([5, 6], 1))
    tree = SplitPrompt((), Row((7, 1, 2), (-1, 0, 0), 0, (0,)))
    for prompt in (two, tree):
        with refused(ModelError, says=rf"its engine \({engine.name}\) runs .*: ask for targets of one token"):
            engine.prepare([prompt])
    # The same tokens in the row that it runs.
    ids = (3, 96, 4)
    assert engine.prepare([engine.split(ids)]).run([1]).shape == (1, 97)


# Values of a row: 3·97 logits, 6·40 neurons and 12·24 hidden values are 819 for one token, 528 for each other one, and
# 3 of each of 6 or 4 heads for each token that one of its tokens looks at; of a cache 4·24 a token are copied. Four
# bytes each.
@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("Llama 2", 4 * (819 + 18 * 5)),
        ("GPT-J", 4 * (819 + 12 * 5 + 96 * 5)),
        ("BERT", 4 * (819 + 4 * 528 + 5 * 12 * 5)),
    ],
)
def test_what_a_row_costs(family: str, expected: int) -> None:
    model = model_of(family)
    assert model.rows([(1, 2, 96, 4, 5)]).sizes.run == expected
    assert model.engine.row_sizes(5) == model.rows([(1, 2, 96, 4, 5)]).sizes


@pytest.mark.parametrize(
    ("family", "frozen", "groups"),
    [("Llama 2", 4 * 7 * (48 + 528 + 18 * 9), 1), ("GPT-J", 4 * 7 * (144 + 528 + 12 * 9), 2), ("BERT", 0, 1)],
)
def test_how_prompts_are_grouped_and_what_they_cost(family: str, frozen: int, groups: int) -> None:
    engine = model_of(family).engine
    row = engine.row_sizes(9)
    # Keys and values of seven tokens, and a layer's values; four rows, or three with a graph and five targets' slopes.
    assert engine.cost(9, 2, 4) == frozen + 4 * row.run
    assert engine.cost(9, 2, 3, 5) == frozen + 3 * row.graph + 5 * row.slopes
    found = engine.groups([(1, 2, 3), (4, 96)])
    assert sorted(i for group in found for i in group.members) == [0, 1]
    assert len(found) == groups
