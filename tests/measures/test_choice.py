"""Which neurons: drawn, ranked, listed, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError
from neg_service.measures.choice import (
    check_choice,
    chosen_neurons,
    count_of,
    described,
    identity_of_choice,
    resolved,
    strongest_neurons,
    with_list_read,
)
from neg_service.neurons import NeuronSet
from tests.refusals import ANY, refused

SIZES = [40, 40, 40]


def choose(**given: Any) -> list[list[int]]:
    config = with_list_read(NeuronsConfig(**given))
    check_choice(config, SIZES)
    found = chosen_neurons(config, SIZES)
    assert len(found) == count_of(config, SIZES)
    return found.tolist()


def test_all_neurons_of_all_or_some_layers() -> None:
    assert choose() == [[layer, n] for layer in range(3) for n in range(40)]
    assert choose(layers=[2]) == [[2, n] for n in range(40)]


def test_a_sample_is_seeded_without_repeats_and_the_same_whatever_other_layers_are_chosen() -> None:
    found = choose(choose="sample", count=7, seed=1)
    assert found == choose(choose="sample", count=7, seed=1)
    assert found != choose(choose="sample", count=7, seed=2)
    assert [sum(layer == own for layer, _ in found) for own in range(3)] == [7, 7, 7]
    assert len({tuple(pair) for pair in found}) == 21
    assert [pair for pair in found if pair[0] == 1] == choose(choose="sample", count=7, seed=1, layers=[1])
    # Each layer draws for itself.
    assert [n for layer, n in found if layer == 0] != [n for layer, n in found if layer == 1]


def test_a_sample_in_all_is_spread_over_the_chosen_layers() -> None:
    found = choose(choose="sample", count=60, per="model", layers=[0, 2])
    assert len({tuple(pair) for pair in found}) == 60
    assert {layer for layer, _ in found} == {0, 2}
    assert found == sorted(found)


def test_a_list_inline_or_in_a_file(tmp_path: Path) -> None:
    assert choose(choose="list", list=[[2, 1], [0, 39]]) == [[0, 39], [2, 1]]
    # As in a table of results, with other columns, and a neuron once for each prompt.
    table = pa.table({"layer": [2, 0, 2], "neuron": [1, 39, 1], "neg": [0.1, 0.2, 0.3]})
    pq.write_table(table, tmp_path / "n.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "n.csv")
    (tmp_path / "n.jsonl").write_text('{"layer": 2, "neuron": 1}\n{"layer": 0, "neuron": 39}\n')
    for name in ("n.parquet", "n.csv", "n.jsonl"):
        assert choose(choose="list", list=str(tmp_path / name)) == [[0, 39], [2, 1]]


def test_a_folder_of_results_is_all_its_parts(tmp_path: Path) -> None:
    for shard, neuron in enumerate((1, 39, 1)):
        pq.write_table(pa.table({"layer": [2], "neuron": [neuron]}), tmp_path / f"shard-{shard:06d}.parquet")
    assert choose(choose="list", list=str(tmp_path)) == [[2, 1], [2, 39]]
    (tmp_path / "empty").mkdir()
    with refused(ConfigurationError, "neurons.list", says=r"be a folder of \.parquet files"):
        choose(choose="list", list=str(tmp_path / "empty"))


def test_the_strongest_and_ties_go_to_the_lower_neuron() -> None:
    strength = np.zeros((2, 5))
    strength[0, 3] = strength[1, 0] = 2.0
    strength[1, 4] = 5.0
    assert strongest_neurons([1, 4], strength, 2).tolist() == [[1, 3], [4, 4]]


def test_choices_of_layers_that_differ_in_size() -> None:
    sizes = [2, 5, 3]

    def of(**given: Any) -> list[list[int]]:
        config = NeuronsConfig(**given)
        check_choice(config, sizes)
        found = chosen_neurons(config, sizes)
        assert len(found) == count_of(config, sizes)
        found.require_existing(sizes)
        return found.tolist()

    assert of() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [1, 3], [1, 4], [2, 0], [2, 1], [2, 2]]
    assert of(layers=[0, 2]) == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2]]
    assert [layer for layer, _ in of(choose="sample", count=2)] == [0, 0, 1, 1, 2, 2]
    assert of(choose="sample", count=10, per="model") == of()
    assert of(choose="list", list=[[1, 4], [0, 1]]) == [[0, 1], [1, 4]]
    strengths = [np.array([1.0, 9.0]), np.array([0.0, 0.0, 0.0, 0.0, 9.0]), np.array([2.0, 1.0, 0.0])]
    assert strongest_neurons([0, 1, 2], strengths, 3).tolist() == [[0, 1], [1, 4], [2, 0]]
    with pytest.raises(
        ConfigurationError, match=r"neurons\.count=3: the choice must be from 1 to 2, the neurons of a l"
    ):
        check_choice(NeuronsConfig(choose="sample", count=3), sizes)
    with pytest.raises(ConfigurationError, match=r"\(0, 2\) does not exist; .* layer 0 neurons 0 to 1"):
        check_choice(NeuronsConfig(choose="list", list=[[0, 2]]), sizes)


def test_what_is_resolved_is_drawn_once() -> None:
    sample = NeuronsConfig(choose="sample", count=7, seed=1)
    found = resolved(sample, SIZES)
    assert isinstance(found.list, NeuronSet)
    assert found.list == chosen_neurons(sample, SIZES)
    assert chosen_neurons(found, SIZES) is found.list
    assert identity_of_choice(found, 3) == identity_of_choice(sample, 3)
    for follows in (NeuronsConfig(), NeuronsConfig(choose="top", count=3)):
        assert resolved(follows, SIZES) is follows


def test_only_what_decides_the_neurons_is_part_of_the_identity() -> None:
    assert identity_of_choice(NeuronsConfig(seed=5, count=3, over="dataset"), 2) == {"layers": [0, 1]}
    one = identity_of_choice(NeuronsConfig(choose="list", list=[[1, 2], [0, 3]]), 2)
    assert one == identity_of_choice(NeuronsConfig(choose="list", list=[[0, 3], [1, 2]]), 2)
    assert one != identity_of_choice(NeuronsConfig(choose="list", list=[[0, 3], [1, 1]]), 2)
    samples = [identity_of_choice(NeuronsConfig(choose="sample", count=3, seed=seed), 2) for seed in (0, 1)]
    assert samples[0] != samples[1]


def test_the_choice_is_told_in_words() -> None:
    assert described(NeuronsConfig(choose="sample", count=2, seed=4), SIZES) == (
        "6 in 3 layers: 2 of each layer, seed 4"
    )
    assert described(NeuronsConfig(choose="top", count=9, over="dataset"), SIZES) == (
        "9 in 3 layers: the strongest over the data set"
    )


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ({"choose": "best"}, ("neurons.choose", "best", "one of all, sample, top, list")),
        ({"choose": "sample", "count": 1, "per": "head"}, ("neurons.per", "head")),
        ({"choose": "top", "count": 1, "over": "time"}, ("neurons.over", "time")),
        (
            {"choose": "sample", "count": 0},
            ("neurons.count", "0", "the choice must be from 1 to 40, the neurons of a layer"),
        ),
        ({"choose": "sample", "count": 41}, ("neurons.count", "41", "the choice must be from 1 to 40")),
        (
            {"choose": "sample", "count": 121, "per": "model"},
            ("neurons.count", "121", "from 1 to 120, the neurons of the chosen layers"),
        ),
        ({"choose": "top", "count": 121}, ("neurons.count", "121", "the choice must be from 1 to 120")),
        ({"choose": "top", "count": 50, "layers": [1]}, ("neurons.count", "50", "from 1 to 40")),
        ({"choose": "list", "list": []}, ("neurons.list", ANY, "the choice is empty")),
        (
            {"choose": "list", "list": [[3, 0]]},
            ("neurons.list", ANY, r"\(3, 0\) does not exist; the model has layers 0 to 2"),
        ),
        ({"choose": "list", "list": [[0, 1], [0, 1]]}, ("neurons.list", ANY, r"\(0, 1\) is given twice")),
        (
            {"choose": "list", "list": [[0, 1]], "layers": [1]},
            ("neurons.list", ANY, "has neurons of layer 0, which neurons.layers"),
        ),
        ({"choose": "list", "list": 7}, ("neurons.list", "7", "a list of")),
        ({"choose": "list", "list": [[0, 1.5]]}, ("neurons.list", ANY, "must be a list of")),
        ({"choose": "list", "list": [[0, 1], [2]]}, ("neurons.list", ANY, "must be a list of")),
        ({"choose": "list", "list": [[0, True]]}, ("neurons.list", "[[0, True]]", "pairs of whole numbers")),
        ({"choose": "list", "list": [[False, True]]}, ("neurons.list", ANY, "must be a list of")),
        ({"choose": "list", "list": [[0, "1"]]}, ("neurons.list", ANY, "must be a list of")),
        ({"choose": "list", "list": [[0, None]]}, ("neurons.list", ANY, "must be a list of")),
        ({"choose": "list", "list": [[0, float("nan")]]}, ("neurons.list", ANY, "must be a list of")),
        (
            {"choose": "list", "list": [[0, 2**70]]},
            ("neurons.list", ANY, r"\(0, 1180591620717411303424\) does not exist"),
        ),
        ({"choose": "list", "list": [[-1, 0]]}, ("neurons.list", ANY, r"\(-1, 0\) does not exist")),
        (
            {"choose": "list", "list": "README.md"},
            ("neurons.list", "README.md", "must end in .csv, .jsonl, .parquet, be a folder"),
        ),
        ({"choose": "list", "list": "nowhere.csv"}, ("neurons.list", "nowhere.csv", "cannot be read")),
    ],
)
def test_bad_choices_are_refused(given: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    with refused(ConfigurationError, *refusal):
        choose(**given)


def test_a_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("layer,index\n0,1\n")
    with refused(ConfigurationError, "neurons.list", says="needs whole numbers in a column 'neuron'"):
        choose(choose="list", list=str(tmp_path / "n.csv"))


def test_a_sample_is_drawn_whatever_list_stands_beside_it() -> None:
    # Its fingerprint says count and seed, and nothing of a list.
    sample = NeuronsConfig(choose="sample", count=2)
    other = NeuronsConfig(choose="sample", count=2, list=NeuronSet.from_pairs([[0, 1]]))
    drawn = resolved(sample, [40, 40]).list
    assert len(drawn) == 4
    assert resolved(other, [40, 40]).list == drawn
    assert resolved(resolved(sample, [40, 40]), [40, 40]).list == drawn
