"""What chosen neurons predict: of each task its own, handed over as an object, or as the text of before."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError
from neg_service.measures import measure_of
from neg_service.measures.builtin.neuron_predictions import from_numbers, from_texts
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import Prompt
from tests.families import model_of
from tests.shards import INFO, measured_shard

PROMPTS = [
    Prompt("imdb/test/0", "w3 w14 w15 w9 w26 w5", (" w7", " w8", " w11"), 1),
    Prompt("paws/test/0", "w3 w14 w15 w9 w2", (" w7", " w8"), 0),
    Prompt("imdb/test/1", "w50 w51", (" w1", " w2", " w9"), 0),
]
SETS = {"imdb": NeuronSet.from_pairs([[0, 3], [2, 39], [2, 0]]), "paws": NeuronSet.from_pairs([[1, 7]])}
# Layers of 40 neurons.
TEXTS = {"imdb": "3 80 119", "paws": "47"}


def voted(neurons: NeuronsConfig, **options: Any) -> list[dict[str, Any]]:
    measure = measure_of({"name": "neuron_predictions", **options})
    measure.validate(INFO, neurons, PROMPTS)
    rows = measured_shard(measure, model_of("Llama 2"), PROMPTS, neurons)["neuron_predictions"].to_pylist()
    return sorted(rows, key=lambda row: row["prompt_id"])


def listed(neurons: Any) -> NeuronsConfig:
    return NeuronsConfig(choose="list", list=neurons)


def test_each_task_is_told_of_its_own_neurons_in_their_order() -> None:
    found = voted(listed(NeuronSet.by_task(SETS)))
    whole = measured_shard(measure_of({"name": "neurgrad"}), model_of("Llama 2"), PROMPTS)
    for row in found:
        own = SETS[row["prompt_id"].split("/")[0]]
        values = {
            (r["target_index"], r["layer"]): r["neurgrad"]
            for r in whole["neurgrad"].to_pylist()
            if r["prompt_id"] == row["prompt_id"]
        }
        k = 1 + max(target for target, _ in values)
        expected = np.array([[values[target, layer][n] for layer, n in own.tolist()] for target in range(k)])
        assert row["sign"] == np.sign(expected).ravel().astype(int).tolist()
        assert row["largest"] == expected.argmax(0).tolist()
        assert row["smallest"] == expected.argmin(0).tolist()


def test_the_text_of_before_is_still_taken_and_named_as_old(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert voted(NeuronsConfig(), chosen=TEXTS) == voted(listed(NeuronSet.by_task(SETS)))
    assert caplog.text.count("measure.chosen is deprecated: give neurons.list a NeuronSet by task") == 1
    assert from_texts(TEXTS, 40) == NeuronSet.by_task(SETS)
    assert from_numbers(np.array([119, 3]), 40).tolist() == [[0, 3], [2, 39]]
    # A run that was begun with it is found again, and one with an object says nothing of texts.
    assert measure_of({"name": "neuron_predictions", "chosen": TEXTS}).fingerprint_inputs() == {
        "name": "neuron_predictions", "basis": "paper", "chosen": TEXTS,
    }  # fmt: skip
    assert measure_of({"name": "neuron_predictions"}).fingerprint_inputs() == {
        "name": "neuron_predictions",
        "basis": "paper",
    }


def test_neurons_that_are_the_same_for_all_tasks() -> None:
    same = SETS["imdb"]
    assert voted(listed(same)) == voted(listed(NeuronSet.by_task({"imdb": same, "paws": same})))
    assert voted(listed(same.tolist())) == voted(listed(same))


def test_what_it_costs_follows_the_task_with_most_neurons() -> None:
    measure = measure_of({"name": "neuron_predictions"})
    assert measure.cost(INFO, listed(NeuronSet.by_task(SETS)), 2.0).bytes["neuron_predictions"] == 3 * (6 + 2)
    assert measure.describe_neurons(INFO, listed(NeuronSet.by_task(SETS))) == "4 of 2 tasks"
    assert measure.describe_neurons(INFO, listed(SETS["paws"])) == "1 of each task"


@pytest.mark.parametrize(
    ("neurons", "options", "message"),
    [
        (NeuronsConfig(), {}, r"neurons\.choose=all: measure=neuron_predictions takes a list"),
        (
            NeuronsConfig(choose="sample", count=3),
            {},
            r"neurons\.choose=sample: measure=neuron_predictions takes a list",
        ),
        (listed(NeuronSet.by_task({"imdb": SETS["imdb"]})), {}, r"neurons\.list: there are no neurons for .* 'paws'"),
        (listed([[3, 0]]), {}, r"neurons\.list: \(3, 0\) does not exist"),
        (listed([[2, 1, 0]]), {}, r"neurons\.list: \(2, 1, 0\) does not exist; layer 2 has no experts"),
        (NeuronsConfig(), {"chosen": {"imdb": "3"}}, r"measure\.chosen: there are no neurons for .* 'paws'"),
        (NeuronsConfig(), {"chosen": {"imdb": "3", "paws": "120"}}, r"measure\.chosen: \(3, 0\) does not exist"),
        (NeuronsConfig(), {"chosen": {"imdb": "3 3", "paws": "1"}}, r"measure\.chosen: numbers of 'imdb' must be asc"),
        (listed([[0, 1]]), {"chosen": TEXTS}, r"neurons\.choose=list: is for measure=sweep"),
    ],
)
def test_neurons_that_cannot_be_asked_are_refused(
    neurons: NeuronsConfig, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        voted(neurons, **options)
