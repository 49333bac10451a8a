"""Masked models through the same interfaces as causal ones: read at the mask token, against full forward passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import neg_service
from neg_service.errors import ModelError, PromptError
from neg_service.models.language_model import LanguageModel, inspect_model
from neg_service.models.source import fetch
from neg_service.prompts.prompt import Prompt, encode
from tests import oracle
from tests.fakes import MASK, MASKED, tiny_model, tiny_tokenizer

IDS, READOUT = (3, 14, MASK, 9, 26, 5, 35, 8), 2
TEXT = "w3 w14 w96 w9 w26 w5 w35 w8"
NEURONS = [(2, 39), (0, 5), (1, 17), (0, 0)]


@pytest.mark.parametrize("family", MASKED)
def test_neg_equals_one_full_forward_pass_an_intervention(family: str) -> None:
    model = tiny_model(family, torch.float64)
    shifts = [-2.0, -0.3, 0.1, 1.5]
    found = neg_service.neg(model, TEXT, "w7", NEURONS, shifts)
    before = oracle.probability_with_shift(model.model, IDS, 7, "paper", 0, 0, 0.0, READOUT)
    _, _, activation = oracle.gradients(model.model, IDS, [7], "paper", READOUT)
    assert found.probability == pytest.approx(before, rel=1e-9)
    for i, (layer, neuron) in enumerate(NEURONS):
        assert found.activation[i] == pytest.approx(activation[layer, neuron], rel=1e-9)
        sign = -1 if activation[layer, neuron] < 0 else 1
        for s, shift in enumerate(shifts):
            after = oracle.probability_with_shift(model.model, IDS, 7, "paper", layer, neuron, sign * shift, READOUT)
            assert found.delta_p[i, s] == pytest.approx(after - before, rel=1e-6, abs=1e-12 * before)


@pytest.mark.parametrize("family", MASKED)
def test_neurgrad_of_prompts_of_unequal_length_equals_the_textbook_way(family: str) -> None:
    model = tiny_model(family, torch.float64)
    texts = [TEXT, "w96 w5", "w1 w2 w96"]
    found = neg_service.neurgrad(model, texts, [["w7", "w11"]] * 3)
    for i, text in enumerate(texts):
        ids = [int(word[1:]) for word in text.split()]
        p, slopes, activation = oracle.neurgrad(model.model, ids, [7, 11], "paper", ids.index(MASK))
        np.testing.assert_allclose(found.probability[i], p, rtol=1e-5)
        np.testing.assert_allclose(found.activation[i], activation, rtol=1e-5, atol=1e-7)
        assert np.abs(found.neurgrad[i] - slopes).max() <= 1e-5 * np.abs(slopes).max()


def test_layers_below_an_intervention_do_not_run() -> None:
    model = tiny_model("bert")
    model.ensure_checked()
    ran: list[int] = []
    for index, layer in enumerate(model.feed_forward.layers):
        layer.register_forward_pre_hook(lambda _m, _a, index=index: ran.append(index))
    neg_service.neg(model, TEXT, "w7", [(2, 0)], [1.0])
    # Once each for the unshifted prompt, then the layer of the intervention alone.
    assert ran == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("w1 w2", "w7", "prompt 'a' has 0 mask tokens 'w96', a masked model needs exactly 1"),
        ("w1 w96 w2 w96", "w7", "prompt 'a' has 2 mask tokens"),
        ("w1 w96 w2", "w7 w8", "target 'w7 w8' is 2 tokens"),
        ("w1 w96 w2", "", "target '' is 0 tokens"),
    ],
)
def test_prompts_without_one_mask_token_or_with_longer_targets_are_refused(
    text: str, target: str, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        list(encode(tiny_tokenizer(), [Prompt("a", text, (target,))], None, MASK))


def test_a_target_is_encoded_in_the_place_of_the_mask() -> None:
    (found,) = encode(tiny_tokenizer(), [Prompt("a", "w1 w96 w2", ("w7", "w9"))], None, MASK)
    assert (found.ids, found.target_ids) == ((1, MASK, 2), (7, 9))


def test_a_checkpoint_says_whether_it_is_masked(tmp_path: Path) -> None:
    tiny_model("bert").model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert inspect_model(fetch(str(tmp_path))).is_masked
    model = neg_service.load_model(str(tmp_path))
    assert model.is_masked
    assert model.mask_token == MASK
    assert model.ensure_checked().logits < 1e-5


def test_a_masked_model_without_a_mask_token_is_refused() -> None:
    with pytest.raises(ModelError, match="has no mask token"):
        LanguageModel(tiny_model("bert").model)
