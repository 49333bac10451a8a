"""Masked models through the same interfaces as causal ones; that the numbers are right: `models/test_families.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

import neg_service
from jobs.benchmarks.tiny_models import MASK, tiny_model, tiny_tokenizer
from neg_service.errors import ModelError, PromptError
from neg_service.models.language_model import LanguageModel, inspect_model
from neg_service.models.source import fetch
from neg_service.prompts.prompt import Prompt, encode

TEXT = "w3 w14 w96 w9 w26 w5 w35 w8"


def test_layers_below_an_intervention_do_not_run() -> None:
    model = tiny_model("BERT")
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
    tiny_model("BERT").model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert inspect_model(fetch(str(tmp_path))).is_masked
    model = neg_service.load_model(str(tmp_path))
    assert model.is_masked
    assert model.mask_token == MASK
    assert model.ensure_checked().logits < 1e-5


def test_a_masked_model_without_a_mask_token_is_refused() -> None:
    with pytest.raises(ModelError, match="has no mask token"):
        LanguageModel(tiny_model("BERT").model)
