"""NeurGrad against the textbook oracle, against finite differences, and against itself in other batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ConfigurationError, ModelError, NonFiniteError, OutOfMemory, PromptError
from neg_service.measures.gradients import gradients
from neg_service.models.batches import Budget
from neg_service.models.engines import shared_prefix as engine
from neg_service.prompts import facts
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.prompts.tokens import encode
from tests import oracle
from tests.encodings import encoded
from tests.oracle import relative
from tests.refusals import refused
from tests.tiny_models import VOCABULARY, tiny_model


def random_prompts(lengths: Sequence[int], n_targets: Sequence[int], header: int = 0) -> list[EncodedPrompt]:
    draw = np.random.default_rng(0)
    shared = draw.integers(0, VOCABULARY, header).tolist()
    return [
        encoded(
            shared + draw.integers(0, VOCABULARY, length).tolist(),
            draw.choice(VOCABULARY, k, replace=False).tolist(),
            f"p{i}",
        )
        for i, (length, k) in enumerate(zip(lengths, n_targets, strict=True))
    ]


def measured(model: LanguageModel, prompts: list[EncodedPrompt], basis: str, n_bytes: float = 2**28) -> list:
    layers = range(model.feed_forward.n_layers)
    wanted = [range(len(prompt.target_ids)) for prompt in prompts]
    found = dict(gradients(model, prompts, wanted, basis, list(layers), Budget(n_bytes)))
    assert sorted(found) == list(range(len(prompts)))
    return [found[i] for i in range(len(prompts))]


def assert_equals_oracle(
    model: LanguageModel, prompts: list[EncodedPrompt], basis: str, tolerance: float, reference: nn.Module | None = None
) -> None:
    """The engine in its own precision, the oracle in float64: within the tolerance, or 1.5 times what the textbook way
    itself is off by in that precision, which depends on the processor's matrix products."""
    reference = reference or copy.deepcopy(model.model).double()
    for prompt, found in zip(prompts, measured(model, prompts, basis), strict=True):
        p, slopes, activation = oracle.gradients(reference, prompt.ids, prompt.target_ids, basis)
        _, textbook, _ = oracle.gradients(model.model, prompt.ids, prompt.target_ids, basis)
        np.testing.assert_allclose(found.probability_k, p, rtol=tolerance)
        for k in range(len(p)):
            assert relative(found.gradient_kln[k], slopes[k]) <= max(tolerance, 1.5 * relative(textbook[k], slopes[k]))
        assert relative(found.activation_ln, activation) <= tolerance


@pytest.mark.parametrize("family", ["Llama 2", "Gemma 2", "GPT-2", "GPT-J"])
def test_a_small_poke_moves_the_output_as_the_gradient_says(family: str) -> None:
    # Central differences in float64; the error of a step h is of order h^2. An RMSNorm rounds to float32 whatever
    # the model's precision, and GPT-J's attention; a large step has to drown that.
    step, tolerance = (1e-4, 1e-5) if family == "GPT-2" else (1e-2, 5e-3)
    model = tiny_model(family, torch.float64)
    (prompt,) = random_prompts([7], [1])
    (found,) = measured(model, [prompt], "hidden")
    for layer, neuron in [(0, 3), (1, 39), (2, 0)]:
        up, down = (
            oracle.probability_with_shift(model.model, prompt.ids, prompt.target_ids[0], "hidden", layer, neuron, s)
            for s in (step, -step)
        )
        assert found.gradient_kln[0, layer, neuron] == pytest.approx((up - down) / (2 * step), rel=tolerance, abs=1e-9)


@pytest.mark.model
@pytest.mark.parametrize(
    "basis", ["paper", *(pytest.param(own, marks=pytest.mark.faults) for own in ("hidden", "gate"))]
)
def test_equals_the_oracle_on_the_default_model(smollm2: LanguageModel, smollm2_float64: nn.Module, basis: str) -> None:
    # More texts in one basis alone: what differs between them has nothing to do with it.
    header = smollm2.tokenizer("Question and answer. " * 4)["input_ids"]
    texts = ["The capital of France is", "Hello", "One two three four five six seven"]
    ids = [smollm2.tokenizer(text)["input_ids"] for text in (texts if basis == "paper" else texts[:2])]
    prompts = [encoded(own, (260, 4200)) for own in ids]
    prompts += [encoded(header + own, (260,)) for own in ids[:2]]
    assert_equals_oracle(smollm2, prompts, basis, 1e-4, smollm2_float64)


@pytest.mark.parametrize("tokens", [1, 40, 200, 100_000])
def test_the_batch_size_does_not_change_results(tokens: int) -> None:
    model = tiny_model("Llama 2")
    prompts = random_prompts([1, 9, 4, 17, 2, 30, 5], [3, 2, 1, 4, 2, 2, 2])
    together = measured(model, prompts, "paper")
    for one, other in zip(together, measured(model, prompts, "paper", tokens), strict=True):
        assert relative(one.gradient_kln, other.gradient_kln) < 1e-5
        assert relative(one.activation_ln, other.activation_ln) < 1e-5


def test_only_the_wanted_targets_are_differentiated_and_only_the_chosen_layers() -> None:
    model = tiny_model("Llama 2")
    prompts = random_prompts([5, 8], [3, 4])
    full = measured(model, prompts, "paper")
    found = dict(gradients(model, prompts, [(2,), (0, 3)], "paper", [1], Budget(2**28)))
    assert found[0].gradient_kln.shape == (1, 1, 40)
    np.testing.assert_allclose(found[0].gradient_kln[0, 0], full[0].gradient_kln[2, 1], rtol=1e-4, atol=1e-10)
    np.testing.assert_allclose(found[1].gradient_kln[:, 0], full[1].gradient_kln[[0, 3], 1], rtol=1e-4, atol=1e-10)
    np.testing.assert_allclose(found[1].probability_k, full[1].probability_k, rtol=1e-5)


def test_the_sign_of_a_silent_neuron_is_plus_one() -> None:
    # ReLU (OPT) has silent neurons in plenty; their activation is exactly zero.
    model = tiny_model("OPT")
    result = neg_service.neurgrad(model, ["w3 w4 w5"], [[" w7", " w8"]], basis="hidden")
    (prompt,) = [encoded((3, 4, 5), (7, 8))]
    _, slopes, activation = oracle.gradients(model.model, prompt.ids, prompt.target_ids, "hidden")
    silent = activation == 0
    assert silent.mean() > 0.2
    np.testing.assert_allclose(result.neurgrad[0][:, silent], slopes[:, silent], rtol=1e-4, atol=1e-9)


def test_ragged_targets_are_padded_with_nan_and_layers_are_chosen() -> None:
    model = tiny_model("Llama 2")
    result = neg_service.neurgrad(
        model, ["w1 w2 w3", "w4"], [[" w5", " w6", " w7"], [" w8"]], basis="paper", layers=[0, 2]
    )
    assert result.probability.shape == (2, 3)
    assert result.neurgrad.shape == (2, 3, 2, 40)
    assert result.activation.shape == (2, 2, 40)
    assert result.neurgrad.dtype == result.probability.dtype == result.activation.dtype == np.float32
    assert result.n_targets.tolist() == [3, 1]
    assert result.layers == (0, 2)
    assert np.isnan(result.probability[1, 1:]).all()
    assert np.isnan(result.neurgrad[1, 1:]).all()
    assert np.isfinite(result.neurgrad[0]).all()
    p, expected, activation = oracle.neurgrad(model.model, (4,), (8,), "paper")
    assert result.probability[1, 0] == pytest.approx(p[0], rel=1e-5)
    assert relative(result.neurgrad[1, 0], expected[0, [0, 2]]) < 1e-5
    assert relative(result.activation[1], activation[[0, 2]]) < 1e-5


def test_nothing_of_the_measurement_stays_in_the_model() -> None:
    model = tiny_model("Llama 2")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = model.model(ids).logits
    state = copy.deepcopy(model.model.state_dict())
    implementation = model.model.config._attn_implementation
    measured(model, random_prompts([4, 7], [2, 2]), "paper")
    with refused(ConfigurationError, "measure.basis", "none"):
        measured(model, random_prompts([4], [2]), "none")
    with pytest.raises(IndexError):
        # The vocabulary has 97 words: the body fails in the middle of a pass.
        measured(model, [encoded((1, 2, 500), (3,))], "paper")
    assert model.model.config._attn_implementation == implementation
    assert torch.equal(model.model(ids).logits, before)
    assert all(torch.equal(state[name], value) for name, value in model.model.state_dict().items())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()]
    assert sum(hooks) == 0


def test_memory_that_ends_halves_the_batches_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama 2")
    prompts = random_prompts([5] * 8, [2] * 8)
    expected = measured(model, prompts, "paper")
    seen: list[int] = []
    real = engine.run_last_tokens

    def limited(plain, prefix, rows):
        seen.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(plain, prefix, rows)

    monkeypatch.setattr(engine, "run_last_tokens", limited)
    budget = Budget(2**28)
    found = dict(gradients(model, prompts, [(0, 1)] * 8, "paper", [0, 1, 2], budget))
    assert seen[0] == 8
    assert max(seen[-2:]) <= 2
    # Two prompts of two rows each fit: the batch of eight was halved twice.
    assert budget.bytes == 2 * model.engine.cost(5, 0, 2, 2)
    for i, one in enumerate(expected):
        assert relative(found[i].gradient_kln, one.gradient_kln) < 1e-5


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_one_prompt_that_does_not_fit_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(plain, prefix, rows):
        raise error

    model = tiny_model("Llama 2")
    model.ensure_checked()
    monkeypatch.setattr(engine, "run_last_tokens", never)
    with refused(OutOfMemory, setting=None, says="'p0' .5 tokens. in float32: its 2 rows do not fit"):
        measured(model, random_prompts([5], [2]), "paper")
    # A slower engine would need even more.
    with refused(ModelError, "model.source", says="self-check of Llama 2 .*: the graph of 13 tokens does not fit"):
        tiny_model("Llama 2").ensure_checked()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_prompt(value: float) -> None:
    model = tiny_model("Llama 2")
    with torch.no_grad():
        model.model.model.embed_tokens.weight[13] = value
    with refused(NonFiniteError, setting=None, says="'bad'"):
        measured(model, [encoded((1, 2), (3,), "good"), encoded((1, 13), (3,), "bad")], "paper")


def test_bad_requests_are_refused() -> None:
    model = tiny_model("GPT-2")
    with refused(ConfigurationError, "basis", "gate", says="GPT2MLP has no gate"):
        neg_service.neurgrad(model, ["w1"], [[" w2"]], basis="gate")
    with refused(ConfigurationError, "layers", "[3]", says="layer 3 does not exist; the model has layers 0 to 2"):
        neg_service.neurgrad(model, ["w1"], [[" w2"]], layers=[3])
    with refused(ConfigurationError, setting=None, says="2 prompts, but targets for 1"):
        neg_service.neurgrad(model, ["w1", "w2"], [["w2"]])
    with refused(PromptError, "prompts", says="0 prompts"):
        neg_service.neurgrad(model, [], [])
    with refused(PromptError, "model", says="65 tokens, the model's context holds 64"):
        neg_service.neurgrad(model, ["w1 " * 65], [["w2"]])


@pytest.mark.model
def test_the_facts_are_measured_right(smollm2: LanguageModel, smollm2_float64: nn.Module) -> None:
    prompts = facts.load()[::20]
    result = neg_service.neurgrad(smollm2, [p.text for p in prompts], [p.targets for p in prompts])
    right = result.probability.argmax(1) == [p.answer for p in prompts]
    assert right.mean() > 0.7
    prompts = [p for p in facts.load() if p.id in ("capital/0/France", "plural/1/goose")]
    encoded_facts = list(encode(smollm2.tokenizer, prompts, smollm2.context_length))
    assert_equals_oracle(smollm2, encoded_facts, "paper", 1e-4, smollm2_float64)
