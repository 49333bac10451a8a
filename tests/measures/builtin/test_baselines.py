"""The baselines as measures: against the textbook oracle, and a random draw that follows from what it is of."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError
from neg_service.measures import find_measure, measure_of
from neg_service.measures.builtin import baselines
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests import oracle
from tests.families import model_of
from tests.oracle import relative
from tests.refusals import refused
from tests.shards import INFO, PROMPTS, measured_shard

LAYERS = [0, 2]


def scanned(name: str, prompts: list[Prompt] = PROMPTS, **options: Any) -> dict[str, pa.Table]:
    measure, neurons = measure_of({"name": name, **options}), NeuronsConfig(LAYERS)
    measure.validate(INFO, neurons, prompts)
    found = measured_shard(measure, model_of("Llama 2"), prompts, neurons)
    assert list(found) == ["prompts", name]
    return found


@pytest.mark.parametrize("basis", ["paper", "gate"])
@pytest.mark.parametrize("name", ["gradient", "gradient_x_activation", "activation"])
def test_equals_the_oracle(name: str, basis: str) -> None:
    reference = copy.deepcopy(model_of("Llama 2").model).to(torch.float64)
    table = scanned(name, basis=basis)[name]
    encoded = {prompt.prompt.id: prompt for prompt in encode(model_of("Llama 2").tokenizer, PROMPTS, None)}
    for prompt_id, prompt in encoded.items():
        p_k, gradient_kln, activation_ln = oracle.gradients(reference, prompt.ids, prompt.target_ids, basis)
        expected = {
            "gradient": gradient_kln,
            "gradient_x_activation": gradient_kln * activation_ln,
            "activation": np.broadcast_to(activation_ln, gradient_kln.shape),
        }[name][:, LAYERS]
        rows = table.filter(pa.compute.field("prompt_id") == prompt_id).to_pylist()
        assert [(row["target_index"], row["layer"]) for row in rows] == [
            (k, layer) for k in range(len(p_k)) for layer in LAYERS
        ]
        assert relative(np.array([row[name] for row in rows]), expected.reshape(len(rows), -1)) < 1e-5
        np.testing.assert_allclose([row["probability"] for row in rows], np.repeat(p_k, len(LAYERS)), rtol=1e-5)


def test_a_random_draw_is_of_its_prompt_and_target_and_layer_whatever_else_is_measured() -> None:
    drawn = scanned("random", seed=3)["random"].to_pylist()
    values = {(row["prompt_id"], row["target"], row["layer"]): row["random"] for row in drawn}
    (alone,) = [row for row in scanned("random", [PROMPTS[1]], seed=3, keep="answer")["random"].to_pylist()
                if row["layer"] == 2]  # fmt: skip
    assert alone["random"] == values[alone["prompt_id"], alone["target"], 2]
    assert len({tuple(row) for row in values.values()}) == len(values)
    assert scanned("random", seed=4)["random"].to_pylist()[0]["random"] != drawn[0]["random"]
    everything = np.array(list(values.values()))
    assert abs(everything.mean()) < 0.1
    assert abs(everything.std() - 1) < 0.1
    first = baselines.random_draw(3, "a", " w7", 0, 10)
    np.testing.assert_array_equal(first, baselines.random_draw(3, "a", " w7", 0, 40)[:10])


def test_names_are_known_and_bad_options_refused() -> None:
    with refused(ConfigurationError, "measure.name", "gradiant", says="gradient, gradient_x_activation"):
        find_measure("gradiant")
    with refused(ConfigurationError, "measure.name", "baselines"):
        find_measure("baselines")
    with refused(ConfigurationError, "measure.keep", "top_k", allowed="all or answer"):
        scanned("gradient", keep="top_k")
    assert "seed" not in measure_of({"name": "activation"}).fingerprint_inputs()
    assert measure_of({"name": "random", "seed": 2}).fingerprint_inputs()["seed"] == 2
