"""Readouts other than the probability, against plain passes: log-probability, log-odds, logits, and contrasts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import neg_service
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, NonFiniteError, PromptError
from neg_service.measures import measure_of
from neg_service.models.precision import in_precision
from tests import oracle
from tests.mixtures import tiny_mixture
from tests.shards import INFO, PROMPTS, measured_shard
from tests.tiny_models import tiny_model

TEXT, IDS, TARGETS, TARGET_IDS = "w3 w14 w9", [3, 14, 9], [" w7", " w8", " w50"], [7, 8, 50]
NEURONS = [(1, 5), (0, 3), (2, 7)]
SHIFTS = [-1.5, -0.5, 0.5, 1.5]
# In the words of the settings, with what target 0 is worth, from logits.
VALUES: list[tuple[str, int | str | None, Callable[[Tensor], Tensor]]] = [
    ("probability", None, lambda z: z.softmax(-1)[7]),
    ("log_probability", None, lambda z: z.log_softmax(-1)[7]),
    ("log_odds", None, lambda z: torch.logit(z.softmax(-1)[7])),
    ("log_odds", 1, lambda z: z[7] - z[8]),
    ("log_odds", "others", lambda z: z[7] - torch.logsumexp(z[[8, 50]], 0)),
    ("logit", None, lambda z: z[7]),
    ("logit", " w50", lambda z: z[7] - z[50]),
    ("logit", "others", lambda z: z[7] - z[[8, 50]].mean()),
]


@pytest.mark.parametrize("family", ["Llama 2", pytest.param("Gemma 2", marks=pytest.mark.faults), "Qwen 3.5"])
def test_neg_and_neurgrad_are_those_of_plain_passes(family: str) -> None:
    model = tiny_model(family, torch.float64)
    model.ensure_checked()
    # Slopes by five points.
    h = 1e-3
    # Without the float32 to which models' own code rounds.
    with in_precision(model.model, model.feed_forward.layers, torch.float64):
        logits = {
            (layer, neuron, shift): oracle.logits_with_shift(model.model, IDS, "paper", layer, neuron, shift)
            for layer, neuron in NEURONS
            for shift in (*SHIFTS, 0.0, -2 * h, -h, h, 2 * h)
        }
    for readout, against, value in VALUES:
        at = {key: float(value(own)) for key, own in logits.items()}
        found = neg_service.neurgrad(model, [TEXT], [TARGETS], readout=readout, against=against)
        for layer, neuron in NEURONS:
            sign = -1 if found.activation[0, layer, neuron] < 0 else 1
            two, one = (at[layer, neuron, own] - at[layer, neuron, -own] for own in (2 * h, h))
            slope = sign * (8 * one - two) / (12 * h)
            assert found.neurgrad[0, 0, layer, neuron] == pytest.approx(slope, rel=1e-4, abs=1e-7), (readout, against)
        if against == "others":
            continue
        text = TARGETS[against] if isinstance(against, int) else against
        with in_precision(model.model, model.feed_forward.layers, torch.float64):
            swept = neg_service.neg(
                model, TEXT, TARGETS[0], NEURONS, SHIFTS, shift="signed", readout=readout, against=text
            )
        expected = np.array([[at[*one, shift] - at[*one, 0.0] for shift in SHIFTS] for one in NEURONS])
        np.testing.assert_allclose(swept.delta_p, expected, rtol=1e-8, atol=1e-13)
        np.testing.assert_allclose(swept.neg, expected @ SHIFTS / np.dot(SHIFTS, SHIFTS), rtol=1e-8)


def test_of_experts_too() -> None:
    model = tiny_mixture("OLMoE", torch.float64)
    found = neg_service.neurgrad(model, [TEXT], [TARGETS], readout="log_odds", against=1)
    layer, slot = 1, 3
    neuron = (layer, int(found.neuron[0, layer, slot]), int(found.expert[0, layer, slot]))
    small = neg_service.neg(model, TEXT, " w7", [neuron], [-1e-2, 1e-2], readout="log_odds", against=" w8")
    assert small.neg[0] == pytest.approx(found.neurgrad[0, 0, layer, slot], rel=1e-3)
    each = [
        neg_service.neg(model, TEXT, target, [neuron], SHIFTS, readout="log_probability") for target in (" w7", " w8")
    ]
    contrast = neg_service.neg(model, TEXT, " w7", [neuron], SHIFTS, readout="log_odds", against=" w8")
    np.testing.assert_allclose(contrast.delta_p, each[0].delta_p - each[1].delta_p, rtol=1e-8)


def test_a_sweep_and_neurgrad_say_what_they_are_of() -> None:
    model = tiny_model("Llama 2")
    few = NeuronsConfig(choose="list", list=[[0, 3], [1, 5]])
    options = {"name": "sweep", "shifts": [-1.0, 1.0], "keep_curves": True, "readout": "log_odds", "against": 1}
    measure = measure_of(options)
    swept = measured_shard(measure, model, PROMPTS[:1], few, {"noise": {"sigma": 0.0}})["sweep"]
    assert set(swept["readout"].to_pylist()) == {"log_odds against 1"}
    # Not of the target itself.
    assert set(swept["target_index"].to_pylist()) == {0, 2}
    assert {"delta", "max_abs_delta"} <= set(swept.column_names)
    assert "delta_p" not in swept.column_names
    table = measure.tables(model.feed_forward)["sweep"]
    assert table.label == "NEG of log-odds against 1 (nats a unit of |activation|)"
    prompt = PROMPTS[0]
    alone = neg_service.neg(
        model, prompt.text, prompt.targets[0], [(0, 3), (1, 5)], [-1.0, 1.0], readout="log_odds",
        against=prompt.targets[1],
    )  # fmt: skip
    np.testing.assert_allclose(swept["neg"][:2], alone.neg, rtol=1e-5)
    for more in ({}, {"keep": "top_k", "top_k": 4}):
        measure = measure_of({"name": "neurgrad", "readout": "logit", "against": "others", **more})
        found = measured_shard(measure, model, PROMPTS[:2])
        table = found["top_neurons" if more else "neurgrad"]
        assert set(table["readout"].to_pylist()) == {"logit against others"}
        assert "logit" in measure.tables(model.feed_forward)["top_neurons" if more else "neurgrad"].label


def test_other_readouts_make_other_runs_and_the_probability_the_same_as_before() -> None:
    plain = measure_of({"name": "neurgrad"}).fingerprint_inputs()
    assert "readout" not in plain
    seen = [plain]
    for more in ({"readout": "logit"}, {"readout": "log_odds"}, {"readout": "log_odds", "against": 0}):
        seen.append(measure_of({"name": "neurgrad", **more}).fingerprint_inputs())
    assert all(seen.count(own) == 1 for own in seen)


def test_what_cannot_be_compared_is_refused() -> None:
    model = tiny_model("Llama 2")
    with pytest.raises(ConfigurationError, match=r"readout=odds: one of|readout"):
        neg_service.neurgrad(model, [TEXT], [TARGETS], readout="odds")
    with pytest.raises(ConfigurationError, match=r"probability is not compared .*readout=log_odds or logit"):
        neg_service.neurgrad(model, [TEXT], [TARGETS], against=1)
    with pytest.raises(PromptError, match=r"prompt '0' has no target 3, .* 3 targets are numbered from 0"):
        neg_service.neurgrad(model, [TEXT], [TARGETS], readout="logit", against=3)
    with pytest.raises(PromptError, match="prompt '0' has no target ' w9'"):
        neg_service.neurgrad(model, [TEXT], [TARGETS], readout="logit", against=" w9")
    with pytest.raises(PromptError, match="prompt '0' has 1 target, which would be compared with itself"):
        neg_service.neurgrad(model, [TEXT], [[" w7"]], readout="logit", against="others")
    with pytest.raises(ConfigurationError, match="against"):
        neg_service.neg(model, TEXT, " w7", readout="logit", against=" w7")
    measure = measure_of({"name": "neurgrad", "keep": "answer", "readout": "logit", "against": 0})
    with pytest.raises(PromptError, match="prompt 'b': its answer ' w7' would be compared with itself"):
        measure.validate(INFO, NeuronsConfig(), PROMPTS[:2])


def test_log_odds_of_certainty_are_no_number() -> None:
    model = tiny_model("Llama 2", torch.float64)
    model.ensure_checked()
    with torch.no_grad():
        model.model.lm_head.weight *= 1e5
    (best,) = [int(oracle.logits_with_shift(model.model, IDS, "paper", 0, 0, 0.0).argmax())]
    with pytest.raises(NonFiniteError, match="probability is 1"):
        neg_service.neg(model, TEXT, f" w{best}", NEURONS, readout="log_odds")
