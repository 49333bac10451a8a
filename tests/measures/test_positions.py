"""NeurGrad at every token, against what shifting neurons there does to a plain pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import neg_service
from neg_service.config import NeuronsConfig
from neg_service.errors import DoesNotFit
from neg_service.measures import measure_of
from neg_service.measures.positions import position_map
from neg_service.models.language_model import LanguageModel
from neg_service.models.precision import in_precision
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.prompts.tokens import encode
from tests import oracle
from tests.mixtures import tiny_mixture
from tests.shards import PROMPTS, measured_shard
from tests.tiny_models import tiny_model

TEXT, IDS = "w3 w14 w9 w26 w35 w8", [3, 14, 9, 26, 35, 8]


def encoded(model: LanguageModel, text: str = TEXT) -> EncodedPrompt:
    targets = ("w7", "w8") if model.is_masked else (" w7", " w8")
    (found,) = encode(model.tokenizer, [Prompt("0", text, targets)], None, model.mask_token)
    return found


@pytest.mark.parametrize(
    "family", [pytest.param("Llama 2", marks=pytest.mark.faults), "Mistral", "GPT-2", "Qwen 3.5", "BERT"]
)
def test_at_every_token_it_is_what_a_small_shift_there_does(family: str) -> None:
    model = tiny_model(family, torch.float64)
    prompt = encoded(model, "w3 w14 w9 [MASK] w35 w8" if model.is_masked else TEXT)
    found = position_map(model, prompt, "paper")
    ids, read = list(prompt.ids), prompt.ids.index(model.mask_token) if model.is_masked else -1
    assert found.total_ktl.shape == (2, len(ids), len(found.layers))
    h, seen = 3e-3, 0
    for t in range(len(ids)):
        # Each token in two layers, each layer at some tokens.
        for layer in {t % len(found.layers), (t + 1) % len(found.layers)}:
            neuron = int(found.neuron_ktl[1, t, layer])
            # Without the float32 to which models' own code rounds.
            with in_precision(model.model, model.feed_forward.layers, torch.float64):
                two, one = (
                    oracle.probability_with_shift(model.model, ids, 8, "paper", layer, neuron, s * h, t, read)
                    - oracle.probability_with_shift(model.model, ids, 8, "paper", layer, neuron, -s * h, t, read)
                    for s in (2, 1)
                )
            slope = (8 * one - two) / (12 * h)
            assert abs(found.strongest_ktl[1, t, layer]) == pytest.approx(abs(slope), rel=1e-3, abs=1e-7)
            seen += abs(slope) > 1e-6
    assert seen > len(ids)


def test_at_the_readout_token_it_is_neurgrad() -> None:
    for model in (tiny_model("Llama 2"), tiny_mixture("OLMoE")):
        found = position_map(model, encoded(model), "paper", [0, 2])
        whole = neg_service.neurgrad(model, [TEXT], [[" w7", " w8"]], layers=[0, 2])
        own_kln = whole.neurgrad[0]
        np.testing.assert_allclose(found.total_ktl[:, -1], np.nansum(np.abs(own_kln), 2), rtol=1e-4)
        best_kl = np.nanargmax(np.abs(own_kln), 2)
        for k, layer in np.ndindex(*best_kl.shape):
            value = own_kln[k, layer, best_kl[k, layer]]
            assert found.strongest_ktl[k, -1, layer] == pytest.approx(value, rel=1e-4)
            if whole.neuron is not None and whole.expert is not None:
                assert found.neuron_ktl[k, -1, layer] == whole.neuron[0, layer, best_kl[k, layer]]
                assert found.expert_ktl[k, -1, layer] == whole.expert[0, layer, best_kl[k, layer]]


def test_a_scan_has_a_row_for_each_token_and_layer() -> None:
    model = tiny_model("Llama 2")
    table = measured_shard(measure_of({"name": "positions"}), model, PROMPTS, NeuronsConfig([1, 2]))["positions"]
    assert table.num_rows == sum(len(p.text.split()) * len(p.targets) * 2 for p in PROMPTS)
    first = table.slice(0, 2 * 6).to_pylist()
    assert [row["position"] for row in first] == [t for t in range(6) for _ in range(2)]
    assert [row["token"].strip() for row in first[::2]] == PROMPTS[0].text.split()
    assert {row["layer"] for row in first} == {1, 2}
    assert all(row["total"] >= abs(row["neurgrad"]) for row in first)


def test_memory_that_ends_is_told_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama 2")
    model.ensure_checked()

    def ends(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.autograd, "grad", ends)
    with pytest.raises(DoesNotFit, match=r"prompt '0' .* gradients of all its tokens do not fit"):
        position_map(model, encoded(model), "paper")
