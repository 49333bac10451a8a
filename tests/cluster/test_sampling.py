"""What a sample says of the whole, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from neg_service.cluster.sampling import (
    Measured,
    Piece,
    Units,
    distinct_tokens,
    even_steps,
    extrapolate,
    extrapolate_bytes,
    makespan,
    part_of,
    pieces,
    prices,
    sample_seconds,
    spread,
    units_of,
    whole_prompts,
)
from neg_service.config import NeuronsConfig
from neg_service.layer_neurons import LayerNeurons
from neg_service.measures.base import Cost
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import EncodedPrompt, Prompt

TWO_LAYERS = (LayerNeurons(8), LayerNeurons(8))


def test_a_common_beginning_counts_once_and_each_last_token_counts() -> None:
    # 1 2 3 4; of 1 2 3 5 the last; of 1 2 3 4 again the last: 4 + 1 + 1. 9 is new.
    assert distinct_tokens([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4], [9]]) == 7
    assert distinct_tokens([]) == 0


def test_units_are_summed_and_rows_that_are_prompts_count_their_tokens() -> None:
    prompts = [_encoded(3, 2), _encoded(5, 1)]

    def cost_of(n_targets: int, share: float) -> Cost:
        return Cost({"values": 100 * n_targets}, 10 * n_targets * share)

    found = units_of(prompts, cost_of, 0.5, rows_are_prompts=False)
    # Tokens are 0 1 2 and 0 1 2 3 4.
    assert (found.prompts, found.tokens, found.rows, found.raw_bytes) == (2, 5, 15, {"values": 300})
    assert units_of(prompts, cost_of, 0.5, rows_are_prompts=True).rows == 10 * 3 + 5 * 5


def _encoded(n_tokens: int, n_targets: int) -> EncodedPrompt:
    targets = tuple(f" {i}" for i in range(n_targets))
    return EncodedPrompt(Prompt("a", "text", targets), tuple(range(n_tokens)), tuple(range(n_targets)))


def test_prices_are_found_and_none_is_negative() -> None:
    units = np.array([[1, 10, 100], [1, 20, 100], [2, 10, 300], [4, 40, 100]], float)
    assert prices(units, units @ [3, 0.5, 0.01]) == pytest.approx([3, 0.5, 0.01])
    # Seconds that shrink with tokens: a price below zero would make long shards free.
    assert (prices(units, np.array([4.0, 3.0, 8.0, 12.0])) >= 0).all()
    # One piece says no more than how much its whole is.
    assert units[0] @ prices(units[:1], np.array([7.0])) == pytest.approx(7)


def test_units_in_the_same_proportion_everywhere_say_the_whole_whoever_gets_the_price() -> None:
    units = np.array([[1, 5, 4], [2, 10, 8], [4, 20, 16]], float)
    assert np.array([100, 500, 400]) @ prices(units, np.array([2.0, 4.0, 8.0])) == pytest.approx(200)


@pytest.mark.parametrize(
    # 5 shards of 2 s on 2 replicas: one of them has 3. The third is dealt to who is free first.
    ("seconds", "replicas", "takes"),
    [([2] * 5, 1, 10), ([2] * 5, 2, 6), ([2] * 5, 9, 2), ([6, 1, 1, 1], 2, 6), ([], 3, 0)],
)
def test_shards_are_dealt_out_as_replicas_are_free(seconds: list[float], replicas: int, takes: float) -> None:
    assert makespan(seconds, replicas) == takes


def test_a_sample_says_what_the_whole_takes_with_the_last_shard_alone() -> None:
    # A shard is 0.5 s and a token 0.1 s; 5 shards of 25 tokens on 2 replicas: 3 of them one after the other.
    found = extrapolate(_measured(1.5, 2.5, 4.5), _tokens(10, 20, 40), _tokens(25), 5, 2)
    assert found.seconds == pytest.approx(9)
    assert (found.low, found.high) == (pytest.approx(9), pytest.approx(9))


def test_pieces_that_disagree_make_the_interval_wide() -> None:
    found = extrapolate(_measured(1.0, 3.0, 1.0, 3.0), _tokens(10, 10, 10, 10), _tokens(10), 10, 1)
    # 2 s each in the mean, not the 1.2 s that come nearest to each in its own measure. Without one piece the mean is
    # 5/3 or 7/3: twice the jackknife's error is 2 * sqrt(3/4 * 4 * (10/3)^2) s of 20.
    assert found.seconds == pytest.approx(20)
    assert (found.low, found.high) == (pytest.approx(20 - 2 * 3**0.5 * 10 / 3), pytest.approx(20 + 2 * 3**0.5 * 10 / 3))


def test_encoding_counts_unless_it_is_done_beside_computing() -> None:
    measured = [Measured(Piece(0, 1), 2.0, 1.0)] * 2
    whole = [extrapolate(measured, _tokens(10, 10), _tokens(10), 4, 1, overlaps=own).seconds for own in (False, True)]
    assert whole == [pytest.approx(12), pytest.approx(8)]


def test_few_shards_at_even_steps_stand_for_all() -> None:
    # Half of 6 shards are of 10 tokens, half of 30.
    assert extrapolate(_measured(1.0, 2.0), _tokens(10, 20), _tokens(10, 30), 6, 1).seconds == pytest.approx(12)


def test_bytes_are_those_of_parts_and_of_what_is_in_them() -> None:
    units = [Units(1, 1, 1, {"values": raw}) for raw in (100, 200, 400)]
    # A part has 50 bytes of its own, and is compressed to a half.
    measured = [Measured(Piece(0, 1), 1, bytes={"values": 50 + raw // 2}) for raw in (100, 200, 400)]
    shards = [Units(1, 1, 1, {"values": 1000})] * 3
    assert extrapolate_bytes(measured, units, shards, 3) == {"values": 3 * (50 + 500)}
    # Seen of one shard in two: both count.
    assert extrapolate_bytes(measured, units, shards[:1], 2) == {"values": 2 * (50 + 500)}


def _tokens(*counts: float) -> list[Units]:
    return [Units(0, count, 0) for count in counts]


def _measured(*seconds: float) -> list[Measured]:
    return [Measured(Piece(0, 1), own) for own in seconds]


def test_prompts_are_drawn_evenly_over_their_sorted_lengths() -> None:
    lengths = [50, 10, 40, 20, 30, 60]
    assert sorted(lengths[i] for i in spread(lengths, 3)) == [20, 40, 60]
    assert spread(lengths, 1) == [2]
    assert sorted(spread(lengths, 99)) == [0, 1, 2, 3, 4, 5]


def test_pieces_are_neighbours_within_a_shard() -> None:
    shards, lengths = [range(0, 8), range(8, 16), range(16, 20)], list(range(20))
    # 0.1 s for a prompt: 2.4 s are 24 prompts, 4 in each of six pieces, or rather 2 and 6; the last shard has 4.
    found = pieces(shards, lengths, 0.1, 2.4, can_share=True)
    assert [own.n_prompts for own in found][:5] == [2, 6, 2, 6, 2]
    assert all(any(own.start in shard and own.start + own.n_prompts <= shard.stop for shard in shards) for own in found)
    assert {own.share for own in found} == {1.0}
    # No piece is larger than a shard; more of them then.
    assert max(own.n_prompts for own in pieces(shards, lengths, 0.001, 1.8, can_share=False)) == 8


def test_a_prompt_that_takes_too_long_is_measured_on_two_parts_of_its_neurons() -> None:
    # 1 s for each piece, 20 s for a prompt: half a second's share and one and a half's.
    found = pieces([range(0, 9)], [5] * 9, 20.0, 6.0, can_share=True)
    assert sorted({own.share for own in found}) == [0.025, 0.075]
    assert [own.n_prompts for own in found] == [1] * 6
    # Where the neurons follow from the prompt, all of them are measured.
    assert {own.share for own in pieces([range(0, 9)], [5] * 9, 20.0, 6.0, can_share=False)} == {1.0}


def test_where_each_piece_is_one_prompt_what_is_there_once_is_the_prompts() -> None:
    # 2 s and 1 s for each 100 rows, on parts of a prompt's neurons; a shard of 8 prompts of 500 rows each.
    units = [Units(1, 5, rows) for rows in (100, 200, 300)]
    found = extrapolate(_measured(3.0, 4.0, 5.0), units, [Units(8, 40, 4000)], 1, 1)
    assert found.seconds == pytest.approx(8 * (2 + 5))


def test_where_a_part_takes_as_long_as_a_larger_one_prompts_are_measured_whole() -> None:
    rest = [Piece(place, 1, share) for place in (4, 7) for share in (0.05, 0.15)]
    small = Measured(Piece(1, 1, 0.05), 2.0)
    assert whole_prompts(rest, small, Measured(Piece(1, 1, 0.15), 5.0)) == rest
    assert whole_prompts(rest, small, Measured(Piece(1, 1, 0.15), 2.5)) == [Piece(4, 1), Piece(7, 1)]
    # Of all neurons there is no part.
    whole = [Piece(1, 2), Piece(4, 2)]
    assert whole_prompts(whole, Measured(Piece(1, 2), 2.0), Measured(Piece(1, 2), 2.0)) == whole


@pytest.mark.parametrize(("whole", "sampled"), [(3, 3), (100, 8), (400, 20), (1e6, 60)])
def test_a_sample_takes_a_twentieth_within_bounds(whole: float, sampled: float) -> None:
    assert sample_seconds(whole) == sampled


def test_neurons_are_drawn_evenly_over_the_chosen_ones() -> None:
    part = part_of(NeuronsConfig(), TWO_LAYERS, 0.25)
    assert part is not None
    assert part.list.rows.tolist() == [[0, -2, 2], [0, -2, 6], [1, -2, 2], [1, -2, 6]]
    listed = NeuronsConfig(choose="list", list=NeuronSet.from_pairs([[0, 1], [0, 3], [1, 5], [1, 7]]))
    half = part_of(listed, TWO_LAYERS, 0.5)
    assert half is not None
    assert (half.choose, half.list.rows[:, [0, 2]].tolist()) == ("list", [[0, 3], [1, 7]])
    assert part_of(listed, TWO_LAYERS, 1.0) is None
    assert part_of(NeuronsConfig(choose="top", count=3), TWO_LAYERS, 0.5) is None
    assert even_steps(10, 2).tolist() == [2, 7]
