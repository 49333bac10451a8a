"""Held references: their rows against plain backward passes, and the closed form against dense solutions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import neg_service
from neg_service import LanguageModel
from neg_service.errors import PromptError
from neg_service.measures.batching import budget_of
from neg_service.measures.control.least_shift import RIDGE, LeastShift
from neg_service.measures.control.references import RUNNERS_UP, HeldReferences, encoded_references
from neg_service.measures.control.shifted_rows import ShiftedRows
from neg_service.measures.routing import slots_of
from tests import mixtures_oracle, oracle
from tests.measures.control.by_hand import ids_of, logits_with_shifts
from tests.mixtures import MIXTURES, tiny_mixture
from tests.refusals import refused
from tests.tiny_models import tiny_model

TEXT, TARGET = "w3 w14 w15 w9 w26 w5", " w7"
REFERENCES = [("w3 w14 w2", " w8"), ("w50 w51 w52 w53 w54", " w1"), ("w3 w20 w21 w22", " w7"), ("w60 w61", " w9")]
# Tokens of a reference that are held.
K = 1 + RUNNERS_UP


def _dense(g_m: np.ndarray, lacks: float, held_qm: np.ndarray, scale_m: np.ndarray) -> np.ndarray:
    """The d with g·d = lacks and the least ‖G·d‖² + μ·Σ (d/scale)², by all its conditions at once (Lagrange)."""
    moves = scale_m > 0
    scaled_qm = held_qm[:, moves] * scale_m[moves]
    mu = RIDGE * (scaled_qm**2).sum(1).mean()
    n = int(moves.sum())
    left = np.zeros((n + 1, n + 1))
    left[:n, :n] = scaled_qm.T @ scaled_qm + mu * np.eye(n)
    left[:n, n] = left[n, :n] = g_m[moves] * scale_m[moves]
    found = np.linalg.solve(left, np.concatenate([np.zeros(n), [lacks]]))[:n]
    shift_m = np.zeros(len(g_m))
    shift_m[moves] = found * scale_m[moves]
    return shift_m


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-5), (np.float32, 1e-4)])
def test_the_closed_form_is_the_dense_solution(dtype: Any, tolerance: float) -> None:
    draw = np.random.default_rng(0)
    g_m, held_qm = draw.normal(size=70), draw.normal(size=(9, 70)).astype(dtype)
    # Some neurons stay, others are measured by their activations.
    scale_m = np.where(draw.random(70) < 0.3, 0.0, draw.uniform(0.1, 3, 70))
    least = LeastShift.of(scale_m, held_qm)
    found_m = least.step(g_m[None], np.array([1.7]))
    assert found_m is not None
    expected_m = _dense(g_m, 1.7, held_qm.astype(np.float64), scale_m)
    assert g_m @ found_m == pytest.approx(1.7)
    np.testing.assert_allclose(found_m, expected_m, atol=tolerance * np.abs(expected_m).max())
    plain_m = LeastShift.of(scale_m).step(g_m[None], np.array([1.7]))
    assert plain_m is not None
    assert np.linalg.norm(held_qm @ found_m) < 0.5 * np.linalg.norm(held_qm @ plain_m)


def _held_tokens(p_v: torch.Tensor, answer: int) -> list[int]:
    """The answer, and the most probable others."""
    order = p_v.argsort(descending=True).tolist()
    return [answer, *(token for token in order if token != answer)][:K]


def _rows(model: LanguageModel, basis: str = "paper") -> ShiftedRows:
    return ShiftedRows(model, basis, range(3), budget_of(model))


@pytest.mark.parametrize("basis", ["paper", "hidden"])
def test_rows_are_gradients_of_plain_passes(basis: str) -> None:
    model = tiny_model("Llama 2", torch.float64)
    references = encoded_references(model, REFERENCES, "holding")
    held = HeldReferences.of(_rows(model, basis), references)
    assert held.row_qm is not None
    # d√... of each token: √p·∇log p = ∇p / √p.
    for (text, answer), found_km in zip(REFERENCES, held.row_km, strict=True):
        p_v = logits_with_shifts(model, text, None).softmax(-1)
        tokens = _held_tokens(p_v, int(answer.strip()[1:]))
        p_k, slope_kln, _ = oracle.gradients(model.model, ids_of(text), tokens, basis)
        expected_km = slope_kln.reshape(K, -1) / np.sqrt(p_k)[:, None]
        np.testing.assert_allclose(found_km, expected_km, atol=1e-5 * np.abs(expected_km).max())
    # One array for all prompts, which is not copied.
    assert held(held.slots[0]) is held.row_qm


def test_half_the_squares_along_rows_of_all_tokens_are_the_divergence_of_small_shifts() -> None:
    model = tiny_model("Llama 2", torch.float64)
    text, answer = REFERENCES[1]
    held = HeldReferences.of(_rows(model), encoded_references(model, [(text, answer)], "holding"), runners_up=96)
    shift_m = np.random.default_rng(0).normal(size=120)
    for size in (1e-3, 1e-4):
        before, after = (logits_with_shifts(model, text, one).log_softmax(-1)
                         for one in (None, size * shift_m.reshape(3, 40)))  # fmt: skip
        divergence = float((before.exp() * (before - after)).sum())
        assert 0.5 * ((held.row_km[0] @ (size * shift_m)) ** 2).sum() == pytest.approx(divergence, rel=30 * size)


@pytest.mark.parametrize("norm", ["l2", "scaled"])
def test_a_small_held_shift_is_the_dense_solution_of_plain_gradients(norm: str) -> None:
    model = tiny_model("Llama 2", torch.float64)
    p, slope_kln, activation_ln = oracle.gradients(model.model, ids_of(TEXT), [7], "paper")
    wanted, tolerance = float(p[0]) * (1 + 1e-3), float(p[0]) * 1e-5
    found = neg_service.control(
        model, TEXT, TARGET, probability=wanted, tolerance=tolerance, holding=REFERENCES, norm=norm
    )
    # One step from there on, which is what the first gradient gives.
    assert found.reached[0]
    assert found.passes[0] == 1
    assert found.held == tuple(text for text, _ in REFERENCES)
    held_qm = []
    for text, answer in REFERENCES:
        p_v = logits_with_shifts(model, text, None).softmax(-1)
        tokens = _held_tokens(p_v, int(answer.strip()[1:]))
        p_k, own_kln, _ = oracle.gradients(model.model, ids_of(text), tokens, "paper")
        held_qm.append(own_kln.reshape(K, -1) / np.sqrt(p_k)[:, None])
    scale_m = np.abs(activation_ln).reshape(-1) if norm == "scaled" else np.ones(120)
    # Of log-odds: ∇p / (p·(1 - p)).
    g_m = slope_kln.reshape(-1) / (p[0] * (1 - p[0]))
    lacks = np.log(wanted / (1 - wanted)) - np.log(p[0] / (1 - p[0]))
    expected_m = _dense(g_m, lacks, np.concatenate(held_qm), scale_m)
    np.testing.assert_allclose(found.shift[0].reshape(-1), expected_m, atol=1e-5 * np.abs(expected_m).max())
    plain = neg_service.control(model, TEXT, TARGET, probability=wanted, tolerance=tolerance, norm=norm)
    assert np.abs(plain.shift[0].reshape(-1) - expected_m).max() > 0.1 * np.abs(expected_m).max()


def test_a_held_shift_does_less_to_what_is_held_at_equal_effect() -> None:
    model = tiny_model("Llama 2", torch.float64)
    p = float(logits_with_shifts(model, TEXT, None).softmax(-1)[7])
    divergences = []
    # As far as the rows tell: the divergence is of second order there, and answers and runners-up carry most of it.
    references = REFERENCES[2:3]
    for holding in (None, references):
        found = neg_service.control(model, TEXT, TARGET, probability=1.5 * p, tolerance=0.01 * p, holding=holding)
        assert found.reached[0]
        before, after = (logits_with_shifts(model, references[0][0], one).log_softmax(-1)
                         for one in (None, found.shift[0]))  # fmt: skip
        divergences.append(float((before.exp() * (before - after)).sum()))
    assert divergences[1] < 0.5 * divergences[0]


def test_what_is_held_stays_held_where_gradients_are_taken_anew() -> None:
    model = tiny_model("Llama 2", torch.float64)
    row_qm = HeldReferences.of(_rows(model), encoded_references(model, REFERENCES, "holding")).row_qm
    seen = []
    for holding in (None, REFERENCES):
        found = neg_service.control(model, TEXT, TARGET, probability=0.2, holding=holding, max_passes=40)
        assert found.reached[0]
        # The ray of the first gradient saturates long before.
        assert found.passes[0] >= 8
        shift_m = found.shift[0].reshape(-1)
        seen.append(np.linalg.norm(row_qm @ shift_m) / np.linalg.norm(shift_m))
    assert seen[1] < 0.05 < 0.5 < seen[0]


@pytest.mark.parametrize("family", ["Mixtral", "Qwen 2 MoE", "LongCat Flash"])
def test_rows_of_experts_are_zero_where_the_reference_uses_others(family: str) -> None:
    model = tiny_mixture(family, torch.float64)
    rows = _rows(model)
    encoded = encoded_references(model, REFERENCES, "holding")
    held = HeldReferences.of(rows, encoded)
    (steered,) = encoded_references(model, [(TEXT, TARGET)], "holding")
    (found,) = rows.slopes([steered], [steered.target_ids], [None])
    slots = slots_of(model.feed_forward, found.routing.experts, model.feed_forward.sites("paper"))
    row_qm = held(slots)
    assert row_qm.shape == (K * len(REFERENCES), slots.m)
    n_zero = 0
    for index, ((text, answer), own) in enumerate(zip(REFERENCES, encoded, strict=True)):
        p_v = mixtures_oracle.probabilities(model.model, MIXTURES[family], ids_of(text), "paper").detach()
        tokens = _held_tokens(p_v, own.target_ids[0])
        p_k, by_key, _ = mixtures_oracle.gradients(model.model, MIXTURES[family], ids_of(text), tokens, "paper")
        assert tokens[0] == int(answer.strip()[1:])
        for group, (layer, expert) in enumerate(zip(slots.layer.tolist(), slots.expert.tolist(), strict=True)):
            found_kn = row_qm[K * index : K * index + K, slots.start[group] : slots.start[group + 1]]
            key = (layer, max(expert, -1))
            expected_kn = by_key[key] / np.sqrt(p_k)[:, None] if key in by_key else np.zeros_like(found_kn)
            n_zero += key not in by_key
            np.testing.assert_allclose(found_kn, expected_kn, atol=1e-5 * max(1e-3, np.abs(expected_kn).max()))
    # Some experts are shared, and some are not.
    assert 0 < n_zero < len(REFERENCES) * len(slots.layer)
    assert neg_service.control(model, TEXT, TARGET, probability=0.2, holding=REFERENCES).reached[0]


BAD = [
    ([], "at least 1", "0 references"),
    ([("w3 w14 w2", " w8"), ("w3 w14 w2", " w9")], None, "reference 1 .* is also reference 0"),
    ([(TEXT, " w8")], None, "reference 0 .* is also prompt 1, which is steered"),
    (["w3 w14 w2"], None, "reference 0 must be a pair"),
    ("w3 w14 w2", None, "reference 0 must be a pair"),
    ([("w3 w14 w2", [" w8"])], None, "reference 0 must be a pair"),
    ([("", " w8")], None, "'reference 0' is empty"),
    ([("w3", " w8"), ("w4", " w8 w9")], None, "'reference 1'.* 2 tokens"),
]


@pytest.mark.parametrize(("holding", "allowed", "says"), BAD)
def test_what_cannot_be_held_is_refused(holding: Any, allowed: str | None, says: str) -> None:
    model = tiny_model("Llama 2")
    with refused(PromptError, "holding", says=says) as caught:
        neg_service.control(model, ["w1 w2", TEXT], TARGET, holding=holding)
    assert (caught.value.allowed or "").startswith(allowed or "")
