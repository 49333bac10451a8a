"""NEG by intervention: against full forward passes with a hook, against hand-computed curves, against NeurGrad."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ConfigurationError, NonFiniteError, PromptError
from neg_service.measures.interventions import Interventions
from neg_service.models.batches import Budget
from neg_service.models.feed_forward import Site
from neg_service.models.precision import in_precision
from tests import oracle
from tests.encodings import encoded
from tests.refusals import ANY, refused
from tests.tiny_models import tiny_model

TEXT, TARGET = "w3 w14 w15 w9 w26 w5 w35 w8", " w7"
IDS, TARGET_ID = (3, 14, 15, 9, 26, 5, 35, 8), 7
NEURONS = [(2, 39), (0, 5), (1, 17), (0, 0)]


def linear_network() -> LanguageModel:
    """A Llama whose last layer's neurons reach the logits without a norm in between: logits are linear in them."""
    model = tiny_model("Llama 2", torch.float64)
    model.model.model.norm = nn.Identity()
    # So small that the softmax is straight, too: its curvature is of the order of the square of this.
    model.model.lm_head.weight.mul_(1e-8)
    return model


def test_of_a_linear_network_neg_is_the_known_slope_to_the_last_digits() -> None:
    model = linear_network()
    model.ensure_checked()
    last = model.model.model.layers[2].mlp
    seen: list[torch.Tensor] = []
    handle = last.act_fn.register_forward_hook(lambda _m, _i, out: seen.append(out[0, -1]))
    # Without the float32 to which the model's own code rounds, and differences do not.
    with in_precision(model.model, model.feed_forward.layers, torch.float64):
        p_v = model.model(torch.tensor([IDS])).logits[0, -1].softmax(-1)
        handle.remove()
        found = neg_service.neg(model, TEXT, TARGET, [(2, n) for n in range(40)], shift="signed")
    # z = W·(x + D·(g * up)), so dz/d(up_n) = g_n·W·D_n, and dp_t = p_t·(dz_t - p·dz).
    slope_vn = model.model.lm_head.weight @ last.down_proj.weight * seen[0]
    slope_n = p_v[TARGET_ID] * (slope_vn[TARGET_ID] - p_v @ slope_vn)
    np.testing.assert_allclose(found.neg, slope_n.numpy(), rtol=1e-12)
    np.testing.assert_allclose(np.abs(found.r), 1, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.r2, 1, rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", ["GPT-2", "GPT-NeoX (Pythia)"])
@pytest.mark.parametrize("shift", ["magnitude", "signed"])
def test_on_a_shrinking_grid_neg_tends_to_the_gradient(family: str, shift: str) -> None:
    model = tiny_model(family, torch.float64)
    _, slopes, activation = oracle.gradients(model.model, IDS, [TARGET_ID], "hidden")
    expected = slopes[0] * np.where(activation < 0, -1, 1) if shift == "magnitude" else slopes[0]
    errors = []
    for size in (1.0, 0.1, 0.01):
        result = neg_service.neg(model, TEXT, TARGET, NEURONS, [-size, size], "hidden", shift)
        errors.append(max(abs(result.neg[i] / expected[n] - 1) for i, n in enumerate(NEURONS) if expected[n]))
    # Symmetric shifts: the error is of order size².
    assert errors[1] < errors[0] / 20
    assert errors[2] < 1e-3


def test_a_silent_neuron_grows() -> None:
    model = tiny_model("OPT", torch.float64)
    _, _, activation = oracle.gradients(model.model, IDS, [TARGET_ID], "hidden")
    silent = [(int(layer), int(neuron)) for layer, neuron in np.argwhere(activation == 0)[:3]]
    assert len(silent) == 3
    result = neg_service.neg(model, TEXT, TARGET, silent, [0.5], "hidden")
    for i, (layer, neuron) in enumerate(silent):
        after = oracle.probability_with_shift(model.model, IDS, TARGET_ID, "hidden", layer, neuron, 0.5)
        assert result.delta_p[i, 0] == pytest.approx(after - result.probability, rel=1e-6)


def test_neither_the_batch_nor_the_company_nor_the_order_changes_results(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama 2", torch.float64)
    whole = neg_service.neg(model, TEXT, TARGET)
    assert whole.neurons.tolist() == [[layer, n] for layer in range(3) for n in range(40)]
    assert whole.delta_p.shape == (120, 40)
    sizes: list[int] = []
    real = Interventions._run
    monkeypatch.setattr(
        Interventions,
        "_run",
        lambda self, *given: sizes.append(sum(len(own.shifts_i) for own in given[0])) or real(self, *given),
    )
    row = model.rows([IDS]).sizes.run
    small = neg_service.neg(model, TEXT, TARGET, NEURONS, batch_bytes=int(3.9 * row))
    # Three rows fit, of which one is not shifted.
    assert max(sizes) == 2
    for i, (layer, neuron) in enumerate(NEURONS):
        np.testing.assert_allclose(small.delta_p[i], whole.delta_p[layer * 40 + neuron], rtol=1e-6, atol=1e-15)


def test_neurons_are_told_in_the_order_in_which_they_were_asked_for_also_twice() -> None:
    model = tiny_model("Llama 2", torch.float64)
    asked = [(2, 7), (0, 3), (2, 1), (0, 3)]
    found = neg_service.neg(model, TEXT, TARGET, asked, [-1.0, 1.0])
    assert found.neurons.tolist() == [list(pair) for pair in asked]
    for i, neuron in enumerate(asked):
        alone = neg_service.neg(model, TEXT, TARGET, [neuron], [-1.0, 1.0])
        np.testing.assert_allclose(found.neg[i], alone.neg[0], rtol=1e-9)
        np.testing.assert_allclose(found.activation[i], alone.activation[0], rtol=1e-12)
    # Of no expert, as all neurons are here; the expert once stood in the middle.
    for of_no_expert in ([(layer, n, None) for layer, n in asked], [(layer, None, n) for layer, n in asked]):
        triples = neg_service.neg(model, TEXT, TARGET, of_no_expert, [-1.0, 1.0])
        assert triples.neurons.tolist() == found.neurons.tolist()
        assert triples.neg.tolist() == found.neg.tolist()
    with pytest.raises(ConfigurationError, match=r"neurons: \(2, 7, 0\) does not exist; layer 2 has no experts"):
        neg_service.neg(model, TEXT, TARGET, [(2, 7, 0)])


@pytest.fixture(scope="module")
def in_float64(smollm2: LanguageModel, smollm2_float64: nn.Module) -> LanguageModel:
    """The default model's weights in float64, which its check in float32 answers for: full passes do so below."""
    double = LanguageModel(smollm2_float64, smollm2.tokenizer)
    double.adopt(smollm2.ensure_checked())
    return double


@pytest.mark.faults
@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "target", "least", "most"),
    [
        ("The capital of France is", " Paris", 0.5, 1.0),
        ("The currency of Egypt is called the", " dollar", 1e-4, 0.2),
        ("The opposite of hot is", " big", 0.0, 1e-5),
    ],
    ids=["sure", "unsure", "unlikely"],
)
def test_float32_is_as_exact_as_promised(
    smollm2: LanguageModel, in_float64: LanguageModel, text: str, target: str, least: float, most: float
) -> None:
    double = in_float64
    draw = np.random.default_rng(0)
    # Every fifth of the full grid's shifts: the whole of it takes minutes in float64.
    neurons = [(layer, int(draw.integers(1536))) for layer in range(30)]
    shifts = [-2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0]
    found = neg_service.neg(smollm2, text, target, neurons, shifts)
    ids = smollm2.tokenizer(text)["input_ids"]
    (target_id,) = smollm2.tokenizer(target)["input_ids"]
    # The same weights in float64, what the model casts to float32 on its own included.
    with in_precision(double.model, double.feed_forward.layers, torch.float64):
        exact = neg_service.neg(double, text, target, neurons, shifts)
        # That reference is itself held against full forward passes, which take seconds each: at both ends and between.
        held = [neurons[0], neurons[14], neurons[-1]]
        single = neg_service.neg(double, text, target, held, [1.0], shift="signed")
        for i, (layer, neuron) in enumerate(held):
            changes = oracle.changes_with_shifts(double.model, ids, target_id, "paper", layer, [(neuron, 1.0)])
            np.testing.assert_allclose(single.delta_p[[i], 0], changes, rtol=1e-6, atol=1e-12 * single.probability)
    assert least <= found.probability <= most
    assert np.median(np.abs(found.neg / exact.neg - 1)) <= 5e-6
    assert np.abs(found.delta_p - exact.delta_p).max() <= 1e-6


def test_nothing_of_a_sweep_stays_in_the_model() -> None:
    model = tiny_model("Llama 2")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before, state = model.model(ids).logits, copy.deepcopy(model.model.state_dict())
    layers = list(model.feed_forward.layers)
    neg_service.neg(model, TEXT, TARGET, NEURONS, [1.0])
    interventions = Interventions(model, encoded(IDS, (TARGET_ID,)), "paper")
    with pytest.raises(IndexError):
        interventions.delta_log_p(Site(2), torch.tensor([40]), torch.tensor([1.0]), Budget(2**28))
    assert list(model.feed_forward.layers) == layers
    assert all(a is b for a, b in zip(model.feed_forward.layers, layers, strict=True))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()) == 0
    assert torch.equal(model.model(ids).logits, before)
    assert all(torch.equal(state[name], value) for name, value in model.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (
            {"neurons": [(3, 0)]},
            ("neurons", ANY, r"\(3, 0\) does not exist; the model has layers 0 to 2 and neurons 0 to 39"),
        ),
        ({"neurons": []}, ("neurons", ANY, "the choice is empty")),
        ({"neurons": "some"}, ("neurons", "'some'", "'all' or a list")),
        ({"neurons": 7}, ("neurons", ANY, "must be a list of")),
        ({"shifts": [0.0, 1.0]}, ("shifts", ANY, "0 is no shift")),
        ({"shifts": ["a"]}, ("shifts", "['a']", "numbers")),
        ({"shift": "sideways"}, ("shift", "sideways", "one of magnitude, signed")),
        ({"batch_bytes": 100}, ("batch_bytes", "100", "at least 6552; holds 0 rows of 3276 bytes")),
    ],
)
def test_bad_requests_are_refused(changes: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    with refused(ConfigurationError, *refusal):
        neg_service.neg(tiny_model("Llama 2"), TEXT, TARGET, **changes)


def test_one_prompt_and_one_target_are_texts() -> None:
    for prompt, target in ((TEXT, [TARGET]), ([TEXT], TARGET)):
        with refused(PromptError, setting=None, says="neg takes one prompt and one target"):
            neg_service.neg(tiny_model("Llama 2"), prompt, target)  # type: ignore[arg-type]


def test_the_coarse_grid_is_for_the_library_too() -> None:
    model = tiny_model("Llama 2", torch.float64)
    coarse, full = (neg_service.neg(model, TEXT, TARGET, [(0, 5)], grid=grid) for grid in ("coarse", "full"))
    assert coarse.delta_p.shape == (1, 4)
    np.testing.assert_allclose(coarse.neg, full.neg, rtol=0.05)
    with refused(ConfigurationError, "grid", "coarse", says="places its own shifts"):
        neg_service.neg(model, TEXT, TARGET, NEURONS, [1.0], grid="coarse")


def test_logits_that_are_not_finite_are_refused_by_prompt() -> None:
    model = tiny_model("Llama 2")
    with torch.no_grad():
        model.model.model.embed_tokens.weight[8] = float("inf")
    with refused(NonFiniteError, setting=None, says="prompt '0'"):
        neg_service.neg(model, TEXT, TARGET, NEURONS, [1.0])
