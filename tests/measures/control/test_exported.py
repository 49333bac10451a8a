"""Exported shifts in models that the library alone loads: where they act, and that nothing is left of them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from neg_service import load_shift
from neg_service.errors import ConfigurationError, ModelError
from tests.measures.control.exports import (
    IDS,
    added_by_hand,
    exported,
    hooks_of,
    logits,
    model_of,
    probability,
    reloaded,
    steered,
)
from tests.refusals import NOT_GIVEN, refused
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["Llama 2", "Phi-3 and 4"])
def test_at_all_positions_a_bias_is_the_parameter_of_the_projection(family: str, tmp_path: Path) -> None:
    place = exported(tmp_path, family, "bias")
    plain, by_hand = reloaded(family, tmp_path), reloaded(family, tmp_path)
    for name, own in load_file(place / "shift.safetensors").items():
        by_hand.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(own)
    before = logits(plain)
    with load_shift(place).applied(plain, at="all"):
        assert torch.equal(logits(plain), logits(by_hand))
        assert hooks_of(plain) == 0
    assert torch.equal(logits(plain), before)
    assert (logits(by_hand) - before)[0].abs().max() > 1e-3


def test_a_bias_is_added_to_the_one_that_is_there(tmp_path: Path) -> None:
    place = exported(tmp_path, "Llama 2", "bias")
    plain = reloaded("Llama 2", tmp_path)
    own = plain.model.layers[0].mlp.up_proj
    own.bias = nn.Parameter(torch.linspace(-1, 1, 40, dtype=torch.float64))
    before, tensors = own.bias, load_file(place / "shift.safetensors")
    modules = [(plain.get_submodule(name.removesuffix(".bias")), tensor) for name, tensor in tensors.items()]
    with added_by_hand(modules, slice(None)):
        expected = logits(plain)
    with load_shift(place).applied(plain, at="all"):
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-12)
    assert own.bias is before


def test_a_vector_at_all_positions_is_added_everywhere(tmp_path: Path) -> None:
    # OPT's MLPs see prompts and positions in one axis.
    place = exported(tmp_path, "OPT", "vector")
    plain, tensors = reloaded("OPT", tmp_path), load_file(place / "shift.safetensors")
    modules = [(plain.get_submodule(name.removesuffix(".output")), tensor) for name, tensor in tensors.items()]
    with added_by_hand(modules, slice(None)):
        expected = logits(plain)
    with load_shift(place).applied(plain, at="all"):
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-12)
        found = plain(torch.tensor([IDS, IDS]), use_cache=False).logits
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["Llama 2", "OPT"])
def test_each_prompt_of_a_batch_is_shifted_at_its_last_token(family: str, tmp_path: Path) -> None:
    place = exported(tmp_path, family, "vector")
    plain, shift = reloaded(family, tmp_path), load_shift(place)
    other = tuple(reversed(IDS))
    with shift.applied(plain):
        found = plain(torch.tensor([IDS, other]), use_cache=False).logits
        for row, ids in enumerate((IDS, other)):
            torch.testing.assert_close(found[row], logits(plain, ids), rtol=0, atol=1e-10)
    before = logits(plain)
    # Positions before the last one are as without it.
    torch.testing.assert_close(found[0, :-1], before[:-1], rtol=0, atol=1e-10)
    assert (found[0, -1] - before[-1]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["Llama 2", "Qwen 3.5"])
@torch.no_grad()
def test_over_a_cache_the_prompts_last_token_alone_is_shifted(family: str, tmp_path: Path) -> None:
    shift = load_shift(exported(tmp_path, family, "bias"))
    plain = reloaded(family, tmp_path)
    parts = [(plain.get_submodule(own.module), shift.tensors[own.tensor]) for own in shift.parts]
    with added_by_hand(parts, slice(len(IDS) - 1, len(IDS))):
        expected = logits(plain, (*IDS, 12, 13))
    with shift.applied(plain):
        first = plain(torch.tensor([IDS]), use_cache=True)
        # The cache also by its place in the signature.
        second = plain(torch.tensor([[12]]), None, None, first.past_key_values)
        third = plain(input_ids=torch.tensor([[13]]), past_key_values=second.past_key_values)
        again = plain(torch.tensor([IDS]), use_cache=True)
    found = torch.cat([own.logits[0] for own in (first, second, third)])
    # Chunks of recurrent layers round in float32, whatever their model is in.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if family == "Qwen 3.5" else 1e-10)
    torch.testing.assert_close(again.logits, first.logits)


@pytest.mark.parametrize(("form", "at"), [("bias", "readout"), ("bias", "all"), ("vector", "readout")])
def test_it_is_undone_to_the_bit_also_after_an_error(form: str, at: str, tmp_path: Path) -> None:
    shift = load_shift(exported(tmp_path, "Llama 2", form))
    plain = reloaded("Llama 2", tmp_path)
    before, names = logits(plain), [name for name, _ in plain.named_parameters()]
    for error in (None, RuntimeError("stop")):
        with pytest.raises(RuntimeError, match="stop") if error else nullcontext(), shift.applied(plain, at=at):
            assert not torch.equal(logits(plain), before)
            if error:
                raise error
        assert hooks_of(plain) == 0
        assert [name for name, _ in plain.named_parameters()] == names
        assert torch.equal(logits(plain), before)


def test_folders_that_are_damaged_are_refused(tmp_path: Path) -> None:
    place = exported(tmp_path, "Llama 2", "bias")
    text, tensors = (place / "shift.json").read_text(), (place / "shift.safetensors").read_bytes()
    with refused(ConfigurationError, "place", says=r"no shift\.json"):
        load_shift(tmp_path)
    for other, says in (
        ("[]", "not of a shift in format 1"),
        (text.replace('"format": 1', '"format": 2'), "not of a shift in format 1"),
        (text.replace('"form": "bias"', '"form": "patch"'), "not of a shift"),
        (text.replace("layers.0.mlp.up_proj.bias", "layers.1.mlp.up_proj.bias"), "name different tensors"),
        (text.replace('"module"', '"modul"'), "is damaged"),
        (text[:-9], "JSON"),
    ):
        (place / "shift.json").write_text(other)
        with refused(ConfigurationError, "place", says=says):
            load_shift(place)
    (place / "shift.json").write_text(text)
    (place / "shift.safetensors").write_bytes(tensors[:-8] + bytes(8))
    with refused(ConfigurationError, "place", says="not the file that shift.json was written with"):
        load_shift(place)
    (place / "shift.safetensors").unlink()
    with refused(ConfigurationError, "place", says=r"no shift\.safetensors"):
        load_shift(place)


def test_models_that_it_does_not_belong_to_are_refused(tmp_path: Path) -> None:
    shift = load_shift(exported(tmp_path, "Llama 2", "bias"))
    plain = model_of("Llama 2").model
    with refused(ConfigurationError, "at", "some", allowed="one of readout, all"), shift.applied(plain, at="some"):
        pass
    with refused(ConfigurationError, "model", "LanguageModel"), shift.applied(model_of("Llama 2")):  # type: ignore[arg-type]
        pass
    with refused(ModelError, None, NOT_GIVEN, "OPTForCausalLM has no module"), shift.applied(model_of("OPT").model):
        pass
    wider = tiny_model("Llama 2").model
    wider.model.layers[2].mlp.up_proj = nn.Linear(24, 41, bias=False)
    for at in ("readout", "all"):
        with refused(ModelError, None, NOT_GIVEN, "gives 41 values, the shift has 40"), shift.applied(wider, at=at):
            pass
        assert wider.model.layers[0].mlp.up_proj.bias is None
        assert hooks_of(wider) == 0
    other = tiny_model("Llama 2", torch.float64).model
    other.model.layers[2].mlp.up_proj = nn.Sequential(other.model.layers[2].mlp.up_proj)
    with refused(ConfigurationError, "at", "all", "takes no bias"), shift.applied(other, at="all"):
        pass
    assert other.model.layers[0].mlp.up_proj.bias is None
    with shift.applied(other):
        assert probability(other) == pytest.approx(steered("Llama 2").achieved[0], abs=1e-5)
