"""A sweep's noise: measured against a higher precision, and NEGs below it have no sign."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

import neg_service
from neg_service.config import NeuronsConfig
from neg_service.errors import ModelError, NonFiniteError, OutOfMemory
from neg_service.measures import interventions
from neg_service.measures.noise import measure_noise, resolution
from neg_service.measures.shifts import Sweep, full_grid
from neg_service.models.batches import Budget
from neg_service.models.precision import in_precision
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests.refusals import refused
from tests.shards import measured_shard
from tests.sweeps import PROMPTS, SHIFTS, sweep_of, swept
from tests.tiny_models import tiny_model


def test_a_neg_below_the_resolution_has_no_sign() -> None:
    model = tiny_model("Llama 2", torch.float64)
    exact = swept(model, NeuronsConfig())["sweep"]
    assert pc.all(exact["is_resolved"]).as_py()
    # With this σ, half of the NEGs of each target are below 2·p·σ/√(Σ δ²).
    relative = np.abs(exact["neg"].to_numpy()) / exact["probability"].to_numpy()
    sigma = float(np.median(relative)) * np.sqrt(np.square(SHIFTS).sum()) / 2
    noisy = swept(model, NeuronsConfig(), sigma=sigma)["sweep"]
    below = relative < np.median(relative)
    np.testing.assert_array_equal(noisy["is_resolved"].to_numpy(), ~below)
    np.testing.assert_array_equal(np.array([s is None for s in noisy["signs_agree"].to_pylist()]), below)
    np.testing.assert_allclose(noisy["resolution"], np.median(relative) * noisy["probability"].to_numpy(), rtol=1e-6)


def test_noise_is_measured_and_low_precision_is_marked() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("Llama 2", dtype, engine="shared_prefix")
        neurons = NeuronsConfig(choose="sample", count=9)
        encoded = list(encode(model.tokenizer, PROMPTS, None))
        found[dtype] = sweep_of().calibrate(model, encoded, neurons)["noise"]
        marked = swept(model, neurons)["sweep"]["dtype"].unique().to_pylist()
        assert marked == [str(dtype).removeprefix("torch.")]
    assert found[torch.float32]["reference"] == "float64"
    assert found[torch.bfloat16]["reference"] == "float32"
    assert 1e-9 < found[torch.float32]["sigma"] < 1e-5
    assert found[torch.float32]["neg_error"] < 1e-4
    assert found[torch.float32]["signs_agree"] == 1
    assert 1e-4 < found[torch.bfloat16]["sigma"] < 1
    assert found[torch.bfloat16]["neg_error"] > 100 * found[torch.float32]["neg_error"]


def test_sigma_is_the_spread_of_the_error_against_float64() -> None:
    model = tiny_model("Llama 2", engine="shared_prefix")
    exact = tiny_model("Llama 2", torch.float64)
    pairs = [(layer, n) for layer in range(3) for n in range(4)]
    (encoded,) = encode(model.tokenizer, [Prompt("a", PROMPTS[0].text, (" w7",))], None)
    noise = measure_noise(model, [encoded], NeuronSet.from_pairs(pairs), Sweep(full_grid()), Budget(10**7))
    error = []
    for own in (model, exact):
        result = neg_service.neg(own, PROMPTS[0].text, " w7", pairs, grid="full")
        error.append(np.log1p(result.delta_p / result.probability))
    # The reference here lets norms round to float32, as the model's own code says; that of the check does not.
    assert noise.sigma == pytest.approx(np.std(error[0] - error[1]), rel=0.5)
    square = 2 * sum((s / 10) ** 2 for s in range(1, 21))
    assert resolution(full_grid(), 0.1) == pytest.approx(2 * 0.1 / np.sqrt(square))


@pytest.mark.parametrize(
    ("dtype", "products", "error"),
    [
        pytest.param(torch.float32, "exact", 1e-5, marks=pytest.mark.faults),
        (torch.bfloat16, "exact", 1e-5),
        pytest.param(torch.bfloat16, "fast", 2e-2, marks=pytest.mark.faults),
    ],
)
def test_of_differences_the_noise_is_a_share_of_each_row_and_resolved_negs_have_their_sign(
    dtype: torch.dtype, products: str, error: float
) -> None:
    model = tiny_model("Llama 2", dtype, products=products)
    encoded = list(encode(model.tokenizer, PROMPTS, None))
    neurons = NeuronsConfig(choose="sample", count=9)
    # More of them, and others.
    swept_neurons = NeuronsConfig(choose="sample", count=20, seed=1)
    noise = sweep_of(shifts=SHIFTS).calibrate(model, encoded, neurons)["noise"]
    # Against float64 over the same weights, whatever their precision.
    assert noise["is_per_row"]
    assert noise["reference"] == "float64"
    assert noise["sigma"] < error
    assert noise["neg_error"] < error
    found = measured_shard(sweep_of(shifts=SHIFTS), model, PROMPTS, swept_neurons, {"noise": noise})["sweep"]
    with in_precision(model.model, model.feed_forward.layers, torch.float64):
        exact = measured_shard(sweep_of(shifts=SHIFTS), model, PROMPTS, swept_neurons, {"noise": noise})["sweep"]
    own, true, least = (np.array(own) for own in (found["neg"], exact["neg"], found["resolution"]))
    np.testing.assert_array_equal(found["is_resolved"], np.abs(own) > least)
    is_resolved = found["is_resolved"].to_numpy(zero_copy_only=False)
    assert is_resolved.mean() > 0.9
    assert (np.sign(own) == np.sign(true))[is_resolved].mean() >= 0.99
    # It is neither far too small nor far too large.
    assert (np.abs(own - true) < least + 1e-7 * np.abs(true)).mean() > 0.9
    assert np.median(least / np.maximum(np.abs(own - true), 1e-12)) < 300
    # Of weak neurons it is small, and not the same for all.
    assert least.max() > 20 * least.min()


def test_a_run_whose_noise_is_per_row_does_not_go_on_with_rows() -> None:
    model = tiny_model("Llama 2", engine="shared_prefix")
    noise = {"noise": {"sigma": 1e-6, "is_per_row": True}}
    with refused(ModelError, "model.engine", says="runs as shared_prefix"):
        measured_shard(sweep_of(shifts=SHIFTS), model, PROMPTS, NeuronsConfig(), noise)


def test_prompts_with_bad_logits_are_named_and_skipped_by_the_noise_check() -> None:
    model = tiny_model("Llama 2")
    with torch.no_grad():
        model.model.model.embed_tokens.weight[51] = float("inf")
    encoded = list(encode(model.tokenizer, PROMPTS, None))
    neurons = NeuronSet.from_pairs([[0, 1], [2, 3]])
    assert measure_noise(model, encoded, neurons, Sweep(full_grid()), Budget(10**7)).n_prompts == 2
    with refused(NonFiniteError, setting=None, says="prompt 'c'"):
        measure_noise(model, encoded[2:], neurons, Sweep(full_grid()), Budget(10**7))
    with refused(NonFiniteError, setting=None, says="prompt 'c'"):
        swept(model, NeuronsConfig(choose="sample", count=1))


@pytest.mark.parametrize("failing", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.faults)])
def test_prompts_that_do_not_fit_are_left_out_by_the_noise_check_in_either_precision(
    failing: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("Llama 2")
    run, head = interventions.Interventions._run, model.model.get_output_embeddings()
    full: list[str] = []

    def short_of_memory(self: interventions.Interventions, *arguments: Any) -> Any:
        if any(f"prompt {name!r}" in self._who for name in full) and head.weight.dtype == failing:
            raise MemoryError("no memory")
        return run(self, *arguments)

    monkeypatch.setattr(interventions.Interventions, "_run", short_of_memory)
    encoded = list(encode(model.tokenizer, PROMPTS, None))
    neurons = NeuronSet.from_pairs([[0, 1], [2, 3]])
    full.append(encoded[0].prompt.id)
    assert measure_noise(model, encoded, neurons, Sweep(full_grid()), Budget(10**7)).n_prompts == len(encoded) - 1
    full.extend(own.prompt.id for own in encoded)
    with pytest.raises(OutOfMemory):
        measure_noise(model, encoded, neurons, Sweep(full_grid()), Budget(10**7))


def test_where_no_neg_can_be_compared_the_noise_says_so_and_is_json() -> None:
    model = tiny_model("Llama 2")
    with torch.no_grad():
        # Targets so unlikely that their probability is 0 in float32.
        model.model.lm_head.weight *= 3000
    encoded = list(encode(model.tokenizer, PROMPTS, None))
    noise = measure_noise(model, encoded, NeuronSet.from_pairs([[0, 1], [2, 3]]), Sweep(full_grid()), Budget(10**7))
    assert noise.neg_error is noise.signs_agree is None
    json.dumps(asdict(noise), allow_nan=False)
