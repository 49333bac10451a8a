"""What neurons layers have, counted by hand, and how they are told."""

from __future__ import annotations

import pytest

from neg_service.layer_neurons import ALWAYS_ON, NO_EXPERT, LayerNeurons, described_layers, layers_of_sizes

DENSE, ALONE, BESIDE = LayerNeurons(5), LayerNeurons(0, 3, 2, 1), LayerNeurons(7, 4, 3, 2)


@pytest.mark.parametrize(
    ("own", "total", "slots", "mlps"),
    [
        (DENSE, 5, 5, [(NO_EXPERT, 5)]),
        # 3 experts of 2 neurons, of which a token uses one.
        (ALONE, 6, 2, [(0, 2), (1, 2), (2, 2)]),
        # 7 beside 4 experts of 3 neurons, of which a token uses two.
        (BESIDE, 19, 13, [(ALWAYS_ON, 7), (0, 3), (1, 3), (2, 3), (3, 3)]),
    ],
)
def test_a_layer_counts_what_there_is_and_what_acts_on_a_token(
    own: LayerNeurons, total: int, slots: int, mlps: list[tuple[int, int]]
) -> None:
    assert (own.total, own.n_slots, own.mlps) == (total, slots, mlps)
    sizes = dict(mlps)
    for expert in range(NO_EXPERT, 6):
        assert own.size_of(expert) == sizes.get(expert, 0)


def test_layers_are_told_in_words_each_kind_once() -> None:
    assert described_layers([DENSE] * 3) == "3 layers of 5 neurons"
    assert described_layers([ALONE] * 2) == "2 layers with 3 experts of 2 neurons, 1 of them used by a token"
    assert described_layers([DENSE, BESIDE, DENSE]) == (
        "3 layers: 2 with 5 neurons; "
        "1 with 4 experts of 3 neurons, 2 of them used by a token, and 7 neurons that are always on"
    )


def test_a_number_is_a_layer_without_experts() -> None:
    assert layers_of_sizes([5, BESIDE]) == [DENSE, BESIDE]
