"""`control` against plain passes with hooks, closed forms by hand, and every refusal."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

import neg_service
from neg_service import ControlResult, LanguageModel, control
from neg_service.errors import ConfigurationError, PromptError
from tests import oracle
from tests.measures.control.exports import hooks_of
from tests.mixtures import tiny_mixture
from tests.refusals import refused
from tests.tiny_models import tiny_model

TEXTS = ["w3 w14 w15 w9 w26 w5", "w3 w14 w2", "w50 w51 w52 w53 w54 w55 w56"]
TARGETS = [" w7", " w8", " w11"]


@torch.no_grad()
def by_hand(model: LanguageModel, found: ControlResult, index: int, text: str) -> np.ndarray:
    """log p [V] of a plain pass with the neurons moved at the last token, in the model's own code."""
    ids = [int(word[1:]) for word in text.split()]
    with ExitStack() as stack:
        for row, layer in enumerate(found.layers):
            shift = torch.from_numpy(found.shift[index, row])

            def move(x: torch.Tensor, shift: torch.Tensor = shift) -> torch.Tensor:
                moved = x.clone()
                moved.view(-1, x.shape[-1])[len(ids) - 1, -len(shift) :] += shift.to(x.dtype)
                return moved

            module, side = oracle.neuron_module(oracle.layers_of(model.model)[layer], found.basis)
            if side == "input":
                own = module.register_forward_pre_hook(lambda _m, given, move=move: (move(given[0]), *given[1:]))
            else:
                own = module.register_forward_hook(lambda _m, _g, output, move=move: move(output))
            stack.callback(own.remove)
        logits = model.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits.double().log_softmax(0).numpy()


@pytest.mark.parametrize("basis", ["paper", "hidden"])
@pytest.mark.parametrize("family", ["Llama 2", "Phi-3 and 4", "Gemma 2", "GPT-2"])
def test_what_is_achieved_is_what_a_plain_pass_with_hooks_gives(family: str, basis: str) -> None:
    model = tiny_model(family, torch.float64)
    before = neg_service.neurgrad(model, TEXTS, [[target] for target in TARGETS]).probability[:, 0].astype(float)
    wanted = (before * [2, 0.5, 3]).tolist()
    found = control(model, TEXTS, TARGETS, probability=wanted, basis=basis, tolerance=1e-5)
    assert found.reached.all()
    np.testing.assert_allclose(found.achieved, wanted, atol=1e-5)
    for index, (text, target) in enumerate(zip(TEXTS, TARGETS, strict=True)):
        log_p = by_hand(model, found, index, text)
        # Gemma's norms round to float32 whatever the model's precision.
        np.testing.assert_allclose(
            math.exp(log_p[int(target[2:])]), found.achieved[index], rtol=1e-6 if family == "Gemma 2" else 1e-9
        )
    np.testing.assert_allclose(found.probability_before, before, rtol=1e-5)
    assert hooks_of(model.model) == 0


def test_a_small_move_is_the_closed_form_and_what_neg_predicts() -> None:
    model = tiny_model("Llama 2", torch.float64)
    (before,) = control(model, TEXTS[0], TARGETS[0], probability=0.4).probability_before
    wanted = before * 1.0001
    found = control(model, TEXTS[0], TARGETS[0], probability=wanted, tolerance=before * 1e-7, max_passes=1)
    gradient = neg_service.neurgrad(model, [TEXTS[0]], [[TARGETS[0]]])
    slope = gradient.neurgrad[0, 0].astype(float) * np.where(gradient.activation[0] < 0, -1, 1)
    dense = np.linalg.lstsq(slope.reshape(1, -1), np.array([wanted - before]), rcond=None)[0]
    # To what a curve bends by over a ten-thousandth.
    np.testing.assert_allclose(found.shift[0].ravel(), dense, rtol=3e-4, atol=1e-9)
    np.testing.assert_allclose(found.predicted.by_neg, found.achieved, rtol=1e-6)
    np.testing.assert_allclose(found.norm, np.linalg.norm(dense), rtol=3e-4)
    assert found.largest[0] == np.abs(found.shift).max()
    np.testing.assert_allclose(found.relative_norm, found.norm / np.linalg.norm(gradient.activation[0]), rtol=1e-5)


def test_the_top_and_margins_are_those_of_the_whole_vocabulary() -> None:
    model = tiny_model("Llama 2", torch.float64)
    top = control(model, TEXTS, TARGETS, top=True)
    assert top.reached.all()
    margin = control(model, TEXTS, TARGETS, margin=-0.5)
    against = control(model, TEXTS, TARGETS, margin=[0.5, 0.2, -1.0], against=" w20")
    for index, (text, target) in enumerate(zip(TEXTS, TARGETS, strict=True)):
        own = int(target[2:])
        log_p = by_hand(model, top, index, text)
        assert log_p.argmax() == own
        assert top.reason[index] == "already there" or 0 < log_p[own] - np.delete(log_p, own).max() <= 0.1
        log_p = by_hand(model, margin, index, text)
        assert log_p[own] - np.delete(log_p, own).max() == pytest.approx(-0.5, abs=0.01)
        log_p = by_hand(model, against, index, text)
        assert log_p[own] - log_p[20] == pytest.approx([0.5, 0.2, -1.0][index], abs=0.01)
    again = control(model, TEXTS[0], TARGETS[0], top=True)
    assert again.kind == ("top",)


def test_some_neurons_alone_move() -> None:
    model = tiny_model("Llama 2", torch.float64)
    few = control(model, TEXTS[0], TARGETS[0], probability=0.1, neurons=3)
    assert np.count_nonzero(few.shift) == 3
    layers = control(model, TEXTS[0], TARGETS[0], probability=0.1, neurons=[1])
    assert (layers.layers, layers.shift.shape[1]) == ((1,), 1)
    listed = control(model, TEXTS[0], TARGETS[0], probability=0.1, neurons=[(2, 5), (0, 1)])
    assert {tuple(own) for own in listed.neurons(0)[0].tolist()} == {(0, 1), (2, 5)}
    for found in (few, layers, listed):
        np.testing.assert_allclose(math.exp(by_hand(model, found, 0, TEXTS[0])[7]), found.achieved[0], rtol=1e-9)
    scaled = control(model, TEXTS[0], TARGETS[0], probability=0.1, norm="scaled")
    assert scaled.reached.all()


def test_what_cannot_be_reached_says_how_near_it_came() -> None:
    model = tiny_model("Llama 2", torch.float64)
    found = control(model, TEXTS[0], TARGETS[0], probability=0.999, neurons=[(0, 1)])
    assert not found.reached[0]
    assert found.reason[0]
    assert found.achieved[0] < 0.9
    np.testing.assert_allclose(math.exp(by_hand(model, found, 0, TEXTS[0])[7]), found.achieved[0], rtol=1e-9)


def test_what_is_there_already_is_left_alone() -> None:
    model = tiny_model("Llama 2", torch.float64)
    (before,) = control(model, TEXTS[0], TARGETS[0], probability=0.4).probability_before
    found = control(model, TEXTS[0], TARGETS[0], probability=before + 0.004)
    assert (found.reason, found.passes.tolist(), found.reached.tolist()) == (("already there",), [0], [True])
    assert not found.shift.any()
    assert found.edits() == []


def test_intervene_reads_what_control_writes() -> None:
    model = tiny_model("Llama 2", torch.float64)
    found = control(model, TEXTS, TARGETS, probability=0.2)
    edits = found.edits()
    seen = neg_service.intervene(model, TEXTS, [[target] for target in TARGETS], edits)
    assert seen.edits == ("0", "1", "2")
    np.testing.assert_allclose(np.diagonal(seen.probability[:, :, 0]), found.achieved, rtol=1e-9)


def test_masked_models_are_steered_at_their_mask() -> None:
    model = tiny_model("BERT", torch.float64)
    text = "w3 w14 w96 w15"
    found = control(model, text, "w7", probability=0.2, tolerance=1e-4)
    assert found.reached.all()
    seen = neg_service.intervene(model, [text], [["w7"]], found.edits())
    np.testing.assert_allclose(seen.probability[0, 0, 0], found.achieved[0], rtol=1e-9)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen 2 MoE"])
def test_neurons_of_experts_are_moved_where_they_are_used(name: str) -> None:
    model = tiny_mixture(name, torch.float64)
    found = control(model, TEXTS[:2], TARGETS[:2], probability=0.1, tolerance=1e-4)
    assert found.reached.all()
    assert found.expert is not None
    seen = neg_service.intervene(model, TEXTS[:2], [[target] for target in TARGETS[:2]], found.edits())
    np.testing.assert_allclose(np.diagonal(seen.probability[:, :, 0]), found.achieved, rtol=1e-8)


def test_weights_in_bfloat16_are_steered_by_differences_and_not_by_rows() -> None:
    model = tiny_model("Llama 2", torch.bfloat16)
    found = control(model, TEXTS[:2], TARGETS[:2], probability=0.2, tolerance=1e-3)
    assert found.reached.all()
    # The same weights in float64, with the same shifts.
    precise = tiny_model("Llama 2", torch.bfloat16)
    precise.model.double()
    for index, text in enumerate(TEXTS[:2]):
        log_p = by_hand(precise, found, index, text)
        np.testing.assert_allclose(math.exp(log_p[int(TARGETS[index][2:])]), found.achieved[index], rtol=1e-3)


def test_a_tolerance_that_the_precision_cannot_tell() -> None:
    # By what is called in a notebook, and by no setting of a command.
    with refused(ConfigurationError, setting="tolerance", says=r"or use load_model's dtype=float32, or an engine"):
        control(tiny_model("Llama 2"), TEXTS[0], TARGETS[0], tolerance=1e-9)
    mixture = tiny_mixture("Mixtral", torch.bfloat16)
    with refused(ConfigurationError, setting="tolerance"):
        control(mixture, TEXTS[0], TARGETS[0], tolerance=1e-4)


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("probability", {"probability": 0.0}),
        ("probability", {"probability": 1}),
        ("probability", {"probability": float("nan")}),
        ("probability", {"probability": "0.5"}),
        ("probability", {"probability": [0.5, 0.5]}),
        ("probability", {"probability": 0.4, "top": True}),
        ("tolerance", {"tolerance": 0.5}),
        ("tolerance", {"tolerance": 0}),
        ("margin", {"margin": 1.0, "top": True}),
        ("margin", {"margin": float("inf")}),
        ("against", {"against": " w1"}),
        ("top", {"top": "yes"}),
        ("norm", {"norm": "l1"}),
        ("max_passes", {"max_passes": 0}),
        ("neurons", {"neurons": 0}),
        ("neurons", {"neurons": "some"}),
        ("neurons", {"neurons": [99]}),
        ("neurons", {"neurons": [(0, 10**6)]}),
        ("basis", {"basis": "none"}),
    ],
)
def test_what_cannot_be_asked_for(setting: str, given: dict[str, Any]) -> None:
    with refused(ConfigurationError, setting=setting):
        control(tiny_model("Llama 2"), TEXTS[0], TARGETS[0], **given)


def test_targets_that_are_none() -> None:
    model = tiny_model("Llama 2")
    with refused(PromptError, setting="against"):
        control(model, TEXTS[0], TARGETS[0], margin=1.0, against=TARGETS[0])
    with pytest.raises(PromptError, match="targets must be a text"):
        control(model, TEXTS[:1], [[]])
    with pytest.raises(ConfigurationError, match="one for each prompt"):
        control(model, TEXTS, TARGETS[:1])
    with pytest.raises(PromptError, match="must be exactly 1"):
        control(model, TEXTS[0], " w7 w8")
