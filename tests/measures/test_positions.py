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
from tests import oracle, sequences
from tests.mixtures import tiny_mixture
from tests.shards import PROMPTS, measured_shard
from tests.tiny_models import tiny_model

KEYS = [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
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
    own = found.targets[1]
    ids, read = list(prompt.ids), prompt.ids.index(model.mask_token) if model.is_masked else -1
    assert [target.total_tl.shape for target in found.targets] == [(len(ids), len(found.layers))] * 2
    h, seen = 3e-3, 0
    for t in range(len(ids)):
        # Each token in two layers, each layer at some tokens.
        for layer in {t % len(found.layers), (t + 1) % len(found.layers)}:
            neuron = int(own.neuron_tl[t, layer])
            # Without the float32 to which models' own code rounds.
            with in_precision(model.model, model.feed_forward.layers, torch.float64):
                two, one = (
                    oracle.probability_with_shift(model.model, ids, 8, "paper", layer, neuron, s * h, t, read)
                    - oracle.probability_with_shift(model.model, ids, 8, "paper", layer, neuron, -s * h, t, read)
                    for s in (2, 1)
                )
            slope = (8 * one - two) / (12 * h)
            assert abs(own.strongest_tl[t, layer]) == pytest.approx(abs(slope), rel=1e-3, abs=1e-7)
            seen += abs(slope) > 1e-6
    assert seen > len(ids)


def test_at_the_readout_token_it_is_neurgrad() -> None:
    for model in (tiny_model("Llama 2"), tiny_mixture("OLMoE")):
        found = position_map(model, encoded(model), "paper", [0, 2])
        whole = neg_service.neurgrad(model, [TEXT], [[" w7", " w8"]], layers=[0, 2])
        own_kln = whole.neurgrad[0]
        totals_kl = [own.total_tl[-1] for own in found.targets]
        np.testing.assert_allclose(totals_kl, np.nansum(np.abs(own_kln), 2), rtol=1e-4)
        best_kl = np.nanargmax(np.abs(own_kln), 2)
        for k, layer in np.ndindex(*best_kl.shape):
            value = own_kln[k, layer, best_kl[k, layer]]
            own = found.targets[k]
            assert own.strongest_tl[-1, layer] == pytest.approx(value, rel=1e-4)
            if whole.neuron is not None and whole.expert is not None:
                assert own.neuron_tl[-1, layer] == whole.neuron[0, layer, best_kl[k, layer]]
                assert own.expert_tl[-1, layer] == whole.expert[0, layer, best_kl[k, layer]]


@pytest.mark.parametrize("family", ["Mistral", "Qwen 3.5", "OLMoE"])
def test_the_map_of_a_target_of_several_tokens_goes_on_along_it(family: str) -> None:
    model = tiny_mixture(family, torch.float64) if family == "OLMoE" else tiny_model(family, torch.float64)
    prompt = sequences.encoded(IDS, sequences.TARGETS)
    found = position_map(model, prompt, "paper")
    assert [own.ids_t for own in found.targets] == [(*IDS, *target[:-1]) for target in sequences.TARGETS]
    for k, target in enumerate(sequences.TARGETS):
        own, places = found.targets[k], range(len(IDS) + len(target) - 1)
        p = float(sequences.probability(model.model, IDS, target).detach())
        assert found.probability_k[k] == pytest.approx(p, rel=1e-5)
        assert found.token_log_p is not None
        np.testing.assert_allclose(found.token_log_p[k], sequences.log_p(model.model, IDS, target).detach(), rtol=1e-5)
        if family == "OLMoE":
            # At the readout position, as rows of experts have it.
            texts = [" ".join(f"w{token}" for token in IDS), " " + " ".join(f"w{token}" for token in target)]
            whole = neg_service.neurgrad(model, texts[:1], [texts[1:]], not_one_token="sequence")
            np.testing.assert_allclose(
                own.total_tl[len(IDS) - 1], np.nansum(np.abs(whole.neurgrad[0, 0]), 1), rtol=1e-4
            )
            continue
        _, slope_tln, activation_tln = sequences.gradients(model.model, IDS, target, "paper", places)
        signed_tln = np.where(activation_tln < 0, -slope_tln, slope_tln)
        np.testing.assert_allclose(own.total_tl, np.abs(signed_tln).sum(-1), rtol=1e-4, atol=1e-12)
        best_tl = np.abs(signed_tln).argmax(-1)
        np.testing.assert_array_equal(own.neuron_tl, best_tl)
        strongest_tl = np.take_along_axis(signed_tln, best_tl[..., None], -1)[..., 0]
        np.testing.assert_allclose(own.strongest_tl, strongest_tl, rtol=1e-4, atol=1e-12)


def test_a_scan_has_a_row_for_each_token_and_layer() -> None:
    model = tiny_model("Llama 2")
    table = measured_shard(measure_of({"name": "positions"}), model, PROMPTS, NeuronsConfig([1, 2]))["positions"]
    assert table.num_rows == sum(len(p.text.split()) * len(p.targets) * 2 for p in PROMPTS)
    first = table.slice(0, 2 * 6).to_pylist()
    assert [row["position"] for row in first] == [t for t in range(6) for _ in range(2)]
    assert [row["token"].strip() for row in first[::2]] == PROMPTS[0].text.split()
    assert {row["layer"] for row in first} == {1, 2}
    assert all(row["total"] >= abs(row["neurgrad"]) for row in first)


def test_a_scan_of_targets_of_several_tokens_has_their_tokens_too() -> None:
    model = tiny_model("Llama 2")
    prompts = [Prompt("0", "w3 w14", (" w7 w8 w9", " w8"), 0), Prompt("1", "w3", (" w7", " w8"), 0)]
    found = measured_shard(measure_of({"name": "positions"}), model, prompts, NeuronsConfig([1]), sequences=True)
    rows = found["positions"].to_pylist()
    tokens = [[row["token"].strip() for row in rows if (row["prompt_id"], row["target_index"]) == own] for own in KEYS]
    assert tokens == [["w3", "w14", "w7", "w8"], ["w3", "w14"], ["w3"], ["w3"]]
    first, second = found["prompts"].to_pylist()
    assert [len(own) for own in first["token_probabilities"]] == [3, 1]
    assert second["token_probabilities"] is None


def test_memory_that_ends_is_told_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama 2")
    model.ensure_checked()

    def ends(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.autograd, "grad", ends)
    with pytest.raises(DoesNotFit, match=r"prompt '0' .* gradients of all its tokens do not fit"):
        position_map(model, encoded(model), "paper")
