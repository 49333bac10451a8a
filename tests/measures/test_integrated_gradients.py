"""Integrated gradients against the textbook oracle, against what they must add up to, and against other batches."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

import neg_service
from neg_service import LanguageModel, schema
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, NonFiniteError
from neg_service.measures import measure_of
from neg_service.measures.integrated_gradients import integrals
from neg_service.models.batches import Budget
from neg_service.prompts.prompt import Prompt
from tests import oracle
from tests.encodings import encoded
from tests.families import bases_of, float64_of, model_of, readout
from tests.integrals import integral_kln, measured, random_prompts
from tests.oracle import relative
from tests.refusals import refused
from tests.shards import INFO, PROMPTS, measured_shard
from tests.tiny_models import MASK, tiny_model

NAME = "integrated_gradients"

# Each engine; a layer that cannot grow rows at its neurons (OPT, BLOOM); one that brings grown rows to another axis
# (GPT-2); a fused gate (Phi-3); a soft cap (Gemma 2); layers that cannot be begun at (DeBERTa 2).
ENGINES = {
    "differences": ["Llama 2", "GPT-2", "OPT", "Phi-3 and 4", "Gemma 2"],
    "kv_cache": ["GPT-J", "BLOOM"],
    "full_sequence": ["BERT", "ModernBERT", "DeBERTa 2 and 3"],
}


@pytest.mark.parametrize(
    ("engine", "family", "basis"),
    [
        # Where neurons are taken is the same for every engine.
        pytest.param(engine, family, basis, marks=() if basis == "paper" or family == "Llama 2" else pytest.mark.faults)
        for engine, own in ENGINES.items()
        for family in own
        for basis in bases_of(family)
    ],
)
def test_equals_the_oracle_on_every_engine(engine: str, family: str, basis: str) -> None:
    model = model_of(family)
    assert model.engine.name == engine
    prompts = random_prompts(model.is_masked)
    for prompt, found in zip(prompts, measured(model, prompts, basis, 5), strict=True):
        place, reference = readout(prompt.ids, model.is_masked), float64_of(family)
        p, _, activation = oracle.gradients(reference, prompt.ids, prompt.target_ids, basis, place)
        np.testing.assert_allclose(found.probability_k, p, rtol=1e-5)
        assert relative(found.activation_m, activation.ravel()) < 1e-5
        for layer in range(model.feed_forward.n_layers):
            args = (reference, prompt.ids, prompt.target_ids, basis, layer, 5, place)
            for own, expected in zip(integral_kln(found)[:, layer], oracle.integrated_gradients(*args), strict=True):
                assert relative(own, expected) < 2e-5


@pytest.mark.parametrize(
    ("family", "basis"),
    [("Llama 2", "paper"), ("Llama 2", "hidden"), ("Llama 2", "gate"), ("GPT-J", "paper"), ("BERT", "paper")],
)
def test_over_a_layer_they_add_up_to_what_the_layer_brings(family: str, basis: str) -> None:
    # With s(x) = Σ_n a_n·∂p/∂a_n at a·x, the right Riemann sum of m points is ∫ s = p(full) - p(zero), plus
    # (s(1) - s(0))/(2m), plus terms of order 1/m². So m times the error tends to (s(1) - s(0))/2.
    model = tiny_model(family, torch.float64)
    (prompt,) = [encoded((3, 14, MASK if model.is_masked else 15, 9, 26), (7,))]
    place = readout(prompt.ids, model.is_masked)
    sums = {m: integral_kln(measured(model, [prompt], basis, m)[0]).sum(-1, dtype=float)[0] for m in (10, 100, 1000)}
    for layer in range(model.feed_forward.n_layers):
        ends = {}
        for factor in (1e-9, 1.0):
            args = (model.model, prompt.ids, basis, layer, factor, place)
            p_v, neurons_n = oracle.probabilities_with_scaled_layer(*args)
            (slope_n,) = torch.autograd.grad(p_v[7], neurons_n)
            ends[factor] = float(p_v.detach()[7]), float(slope_n @ neurons_n.detach() / factor)
        (p_zero, s_zero), (p_full, s_full) = ends[1e-9], ends[1.0]
        errors = {m: sums[m][layer] - (p_full - p_zero) for m in sums}
        limit = (s_full - s_zero) / 2
        assert abs(errors[1000]) < 0.01 * abs(p_full - p_zero)
        assert abs(errors[100]) < abs(errors[10]) / 5
        assert abs(errors[1000]) < abs(errors[100]) / 5
        assert 1000 * errors[1000] == pytest.approx(limit, rel=0.03)


def test_of_one_point_they_are_activation_times_gradient() -> None:
    model = model_of("Llama 2")
    for prompt, found in zip(random_prompts(False), measured(model, random_prompts(False), "paper", 1), strict=True):
        _, slopes, activation = oracle.gradients(float64_of("Llama 2"), prompt.ids, prompt.target_ids, "paper")
        assert relative(integral_kln(found), activation * slopes) < 1e-5


def test_more_targets_than_are_differentiated_at_once() -> None:
    model = tiny_model("Llama 2")
    (found,) = measured(model, [encoded((3, 14, 15), range(70))], "paper", 2)
    for k in (0, 31, 32, 69):
        (alone,) = measured(model, [encoded((3, 14, 15), [k])], "paper", 2)
        assert relative(integral_kln(found)[k], integral_kln(alone)[0]) < 1e-5


def test_layers_below_run_once_for_all_points() -> None:
    model = tiny_model("BERT")
    model.ensure_checked()
    ran: list[int] = []
    for index, layer in enumerate(model.feed_forward.layers):
        layer.register_forward_pre_hook(lambda _m, _a, index=index: ran.append(index))
    neg_service.integrated_gradients(model, ["w3 w14 w96 w9"], [["w7", "w8"]], layers=[1])
    # Once each without scaling, then all points together from layer 1 on.
    assert ran == [0, 1, 2, 1, 2]


def test_ragged_targets_are_padded_with_nan_and_layers_are_chosen() -> None:
    model = model_of("Llama 2")
    result = neg_service.integrated_gradients(
        model, ["w1 w2 w3", "w4"], [[" w5", " w6", " w7"], [" w8"]], basis="hidden", layers=[2, 0]
    )
    assert result.probability.shape == (2, 3)
    assert result.integrated_gradients.shape == (2, 3, 2, 40)
    assert result.activation.shape == (2, 2, 40)
    assert {array.dtype for array in (result.probability, result.integrated_gradients, result.activation)} == {
        np.dtype(np.float32)
    }
    assert result.n_targets.tolist() == [3, 1]
    assert result.layers == (0, 2)
    assert np.isnan(result.probability[1, 1:]).all()
    assert np.isnan(result.integrated_gradients[1, 1:]).all()
    for i, layer in enumerate(result.layers):
        # 20 points if nothing else is asked for.
        expected = oracle.integrated_gradients(float64_of("Llama 2"), (1, 2, 3), (5, 6, 7), "hidden", layer, 20)
        assert relative(result.integrated_gradients[0, :, i], expected) < 2e-5
        expected = oracle.integrated_gradients(float64_of("Llama 2"), (4,), (8,), "hidden", layer, 20)
        assert relative(result.integrated_gradients[1, :1, i], expected) < 2e-5


def test_nothing_of_the_measurement_stays_in_the_model() -> None:
    model = tiny_model("Llama 2")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before, state = model.model(ids).logits, copy.deepcopy(model.model.state_dict())
    layers = list(model.feed_forward.layers)
    measured(model, random_prompts(False), "paper", 3)

    def broken(_module: Any, _inputs: Any) -> None:
        if not isinstance(model.feed_forward.layers[0], type(layers[0])):
            raise IndexError("in the middle of a resumed pass")

    handle = layers[2].register_forward_pre_hook(broken)
    with pytest.raises(IndexError, match="resumed"):
        measured(model, random_prompts(False), "paper", 3)
    handle.remove()
    assert list(model.feed_forward.layers) == layers
    assert torch.equal(model.model(ids).logits, before)
    assert all(torch.equal(state[name], value) for name, value in model.model.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()) == 0
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.model.parameters())


def test_what_is_not_finite_on_the_way_is_refused_with_its_prompt_and_layer() -> None:
    model = tiny_model("Llama 2")
    model.ensure_checked()
    rows: list[int] = []

    def overflow(_module: Any, _inputs: Any, output: torch.Tensor) -> Any:
        # Logits are good without scaling, and not with the layer's neurons near zero.
        rows.append(output.shape[-2])
        return output if rows[-1] == 1 else output.index_fill(-2, torch.tensor([0]), float("inf"))

    model.feed_forward.layers[2].mlp.register_forward_hook(overflow)
    with refused(
        NonFiniteError, setting=None, says="prompt 'bad' .* neurons of layer 2 between zero and what they are"
    ):
        list(integrals(model, [encoded((1, 2), (3,), "bad")], [[0]], "paper", [2], 4, Budget(2**28)))
    with torch.no_grad():
        model.model.model.embed_tokens.weight[13] = float("nan")
    with refused(NonFiniteError, setting=None, says="prompt 'worse'"):
        measured(model, [encoded((1, 13), (3,), "worse")], "paper", 2)


def test_in_low_precision_they_are_about_the_same() -> None:
    model = tiny_model("Llama 2", torch.bfloat16)
    (prompt,) = [encoded((3, 14, 15, 9), (7, 8))]
    (found,) = measured(model, [prompt], "paper", 4)
    assert integral_kln(found).dtype == np.float32
    reference = copy.deepcopy(model.model).double()
    for layer in range(3):
        expected = oracle.integrated_gradients(reference, prompt.ids, prompt.target_ids, "paper", layer, 4)
        assert relative(integral_kln(found)[:, layer], expected) < 0.1


@pytest.mark.model
@pytest.mark.parametrize(
    ("basis", "layer", "m"),
    [pytest.param("paper", 21, 3, marks=pytest.mark.faults), ("hidden", 28, 2), ("gate", 27, 2)],
)
def test_equals_the_oracle_on_the_default_model(
    smollm2: LanguageModel, smollm2_float64: nn.Module, basis: str, layer: int, m: int
) -> None:
    ids = smollm2.tokenizer("The capital of France is")["input_ids"]
    # " London", " Rome", and " Paris", of which the model is nearly sure, so that what float32 loses in its log p is
    # more of what is left: how much depends on the processor, and is the same for the textbook way in float32.
    targets = (4528, 7268, 7042)
    ((_, found),) = integrals(smollm2, [encoded(ids, targets)], [range(3)], basis, [layer], m, Budget(2**28))
    expected_kn, textbook_kn = (
        oracle.integrated_gradients(model, ids, targets, basis, layer, m) for model in (smollm2_float64, smollm2.model)
    )
    for own, textbook, expected in zip(integral_kln(found)[:, 0], textbook_kn, expected_kn, strict=True):
        assert relative(own, expected) <= max(1e-4, 1.5 * relative(textbook, expected))


# --- as a measure of a scan


def scanned(
    neurons: NeuronsConfig, prompts: list[Prompt] = PROMPTS, family: str = "Llama 2", **given: Any
) -> dict[str, pa.Table]:
    measure = measure_of({"name": NAME, **given})
    measure.validate(INFO, neurons, prompts)
    return measured_shard(measure, model_of(family), prompts, neurons)


def test_a_scan_gives_a_row_a_prompt_target_and_layer() -> None:
    found = scanned(NeuronsConfig([0, 2]), steps=4, basis="hidden")
    table = found["integrated_gradients"]
    assert table.schema == schema.integrated_gradients(40)
    texts, targets = [p.text for p in PROMPTS], [p.targets for p in PROMPTS]
    expected = neg_service.integrated_gradients(model_of("Llama 2"), texts, targets, basis="hidden", layers=[0, 2], m=4)
    rows = iter(table.to_pylist())
    for p, prompt in enumerate(PROMPTS):
        for k, target in enumerate(prompt.targets):
            for i, layer in enumerate((0, 2)):
                row = next(rows)
                assert (row["prompt_id"], row["target_index"], row["target"]) == (prompt.id, k, target)
                assert (row["layer"], row["basis"], row["is_answer"]) == (layer, "hidden", k == prompt.answer)
                assert row["probability"] == expected.probability[p, k]
                np.testing.assert_allclose(
                    row["integrated_gradients"], expected.integrated_gradients[p, k, i], rtol=1e-4, atol=1e-9
                )
    assert next(rows, None) is None
    beside = measured_shard(measure_of({"name": "neurgrad"}), model_of("Llama 2"), PROMPTS, NeuronsConfig([0]))[
        "prompts"
    ]
    for name in ("prompt_id", "prompt", "targets", "target_tokens", "answer", "prediction"):
        assert found["prompts"][name].equals(beside[name])
    for own, other in zip(found["prompts"]["probabilities"], beside["probabilities"], strict=True):
        np.testing.assert_allclose(own.as_py(), other.as_py(), rtol=1e-5)


def test_only_the_answers_values_are_kept_where_that_is_asked() -> None:
    everything = scanned(NeuronsConfig(), steps=3)["integrated_gradients"]
    answers = scanned(NeuronsConfig(), steps=3, keep="answer")
    own = answers["integrated_gradients"]
    right = everything.filter(everything["is_answer"])
    assert own.select(["prompt_id", "target_index", "layer"]) == right.select(["prompt_id", "target_index", "layer"])
    np.testing.assert_allclose(
        own["integrated_gradients"].combine_chunks().flatten(),
        right["integrated_gradients"].combine_chunks().flatten(),
        rtol=1e-4,
        atol=1e-8,
    )
    # Probabilities are of all targets all the same.
    assert [len(own) for own in answers["prompts"]["probabilities"].to_pylist()] == [3, 2, 1]


def test_a_masked_model_is_scanned_like_a_causal_one() -> None:
    prompts = [Prompt("m", "w3 w96 w15 w9", ("w7", "w8"), 0), Prompt("n", "w5 w3 w96", ("w1",), None)]
    found = scanned(NeuronsConfig([1]), prompts, "BERT", steps=3)["integrated_gradients"]
    expected = oracle.integrated_gradients(float64_of("BERT"), (3, MASK, 15, 9), (7, 8), "paper", 1, 3, 1)
    assert relative(np.array(found["integrated_gradients"].to_pylist()[:2]), expected) < 2e-5
    assert found["is_answer"].to_pylist() == [True, False, None]


@pytest.mark.parametrize(
    ("options", "neurons", "refusal"),
    [
        ({"steps": 0}, {}, ("measure.steps", "0", "at least 1")),
        ({"steps": -3}, {}, ("measure.steps", "-3", "at least 1")),
        ({"keep": "top_k"}, {}, ("measure.keep", "top_k", "all or answer")),
        ({}, {"layers": [3]}, ("neurons.layers", "[3]", "layer 3 does not exist")),
        (
            {},
            {"choose": "sample", "count": 3},
            ("neurons.choose", "sample", "measure=integrated_gradients takes neurons=all"),
        ),
    ],
)
def test_bad_requests_are_refused_before_anything_starts(
    options: dict[str, Any], neurons: dict[str, Any], refusal: tuple[Any, ...]
) -> None:
    with refused(ConfigurationError, *refusal):
        measure_of({"name": NAME, **options}).validate(INFO, NeuronsConfig(**neurons), PROMPTS)


def test_bad_requests_of_the_library_are_refused() -> None:
    unanswered = [Prompt("u", "w1", (" w2",))]
    with refused(
        ConfigurationError, "measure.keep", "answer", says=r"prompt 'u' has no answer; use measure\.keep=all$"
    ):
        measure_of({"name": NAME, "keep": "answer"}).validate(INFO, NeuronsConfig(), unanswered)
    model = model_of("GPT-2")
    with refused(ConfigurationError, "m", "0", allowed="at least 1, the number of points that are summed over"):
        neg_service.integrated_gradients(model, ["w1"], [[" w2"]], m=0)


def test_steps_are_part_of_what_a_run_is_and_of_its_cost() -> None:
    measure = measure_of({"name": NAME, "steps": 7})
    assert measure.fingerprint_inputs() == {
        "name": "integrated_gradients", "basis": "paper", "keep": "all", "steps": 7
    }  # fmt: skip
    cost = measure.cost(INFO, NeuronsConfig([0, 1]), 3.0)
    assert cost.rows == 7 * 2 * 3
    assert cost.bytes["integrated_gradients"] == 4 * 40 * 2 * 3
    answer = measure_of({"name": NAME, "steps": 7, "keep": "answer"}).cost(INFO, NeuronsConfig([0, 1]), 3.0)
    assert answer.rows == 7 * 2
    assert answer.bytes["integrated_gradients"] == 4 * 40 * 2
