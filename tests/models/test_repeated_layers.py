"""Layers that run again, each run as a layer of its own, against the model as it was loaded, whose runs are counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ConfigurationError, ModelError
from neg_service.models.feed_forward import find_feed_forward
from neg_service.models.inspection import inspect_model
from neg_service.models.layers import find_layers
from neg_service.models.placement import device_map
from neg_service.models.precision import in_precision
from neg_service.models.repeated_layers import as_loaded, layers_as_run, unroll, weights_run_again
from neg_service.models.source import fetch
from tests.configurations import fill
from tests.families import NEURGRAD_TOLERANCE, SWEEP_TOLERANCE
from tests.oracle import relative
from tests.refusals import refused
from tests.tiny_models import MASK, VOCABULARY, tiny_tokenizer

_TINY = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Twelve runs: of the low stack's two layers (L) twice, then of the high one's (H), and that twice.
_HRM = {"num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 2, "head_dim": 8, "embedding_scale": 2.0}
HRM_ORDER = ["L0", "L1", "L0", "L1", "H0", "H1", "L0", "L1", "L0", "L1", "H0", "H1"]
# Eight runs: of two layers (0) in a row, twice, then likewise of two others (1).
_ALBERT = {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2, "embedding_size": 20}
ALBERT_ORDER = ["00", "01", "00", "01", "10", "11", "10", "11"]
ORDERS = {"albert": ALBERT_ORDER, "hrm_text": HRM_ORDER}
BASES = [*(("albert", basis) for basis in ("paper", "hidden")),
         ("hrm_text", "paper"),
         *(pytest.param("hrm_text", basis, marks=pytest.mark.faults) for basis in ("hidden", "gate"))]  # fmt: skip
# The end of a module's name, and whether its input or its output is the neurons.
_NEURONS = {
    ("albert", "paper"): ("ffn_output", "input"),
    ("albert", "hidden"): ("ffn_output", "input"),
    ("hrm_text", "paper"): ("mlp.up_proj", "output"),
    ("hrm_text", "hidden"): ("mlp.down_proj", "input"),
    ("hrm_text", "gate"): ("mlp.act_fn", "output"),
}
TEXTS = {"albert": "w3 w14 w96 w9 w41", "hrm_text": "w3 w14 w15 w9 w41"}
SHIFTS = [-2.0, 0.1]


def loaded(kind: str, **options: Any) -> Any:
    """A tiny model as transformers makes it, always of the same weights."""
    torch.manual_seed(0)
    if kind == "albert":
        model = hf.AlbertForMaskedLM(hf.AlbertConfig(**_TINY, **_TOKENS, **{**_ALBERT, **options}))
    else:
        model = hf.HrmTextForCausalLM(hf.HrmTextConfig(**_TINY, **_TOKENS, **{**_HRM, **options}))
    fill(model)
    return model.eval()


def measured(kind: str) -> LanguageModel:
    return LanguageModel(loaded(kind), tiny_tokenizer())


def runs_by_hand(model: Any, kind: str, basis: str, touch: Callable[[int, Tensor], Tensor]) -> Tensor:
    """p of the vocabulary, with `touch` given the number of a run and its neurons [1, T, N], as they come."""
    name, side = _NEURONS[kind, basis]
    ids = ids_of(kind)
    n_ran = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal n_ran
        n_ran += 1
        return touch(n_ran - 1, x)

    with ExitStack() as stack:
        for own_name, part in model.named_modules():
            if own_name.endswith(name):
                hook = (
                    part.register_forward_pre_hook(lambda _m, inputs: (counted(inputs[0]),))
                    if side == "input"
                    else part.register_forward_hook(lambda _m, _i, output: counted(output))
                )
                stack.callback(hook.remove)
        p: Tensor = model(torch.tensor([ids])).logits[0, place_of(ids)].softmax(-1)
    assert n_ran == len(ORDERS[kind])
    return p


def ids_of(kind: str) -> list[int]:
    return [int(word[1:]) for word in TEXTS[kind].split()]


def place_of(ids: Sequence[int]) -> int:
    return ids.index(MASK) if MASK in ids else len(ids) - 1


@pytest.mark.parametrize(("kind", "basis"), BASES)
def test_gradients_are_those_of_each_run(kind: str, basis: str) -> None:
    # All cycles of HRM keep their gradients here, by its own setting.
    plain = loaded(kind, **({"L_bp_cycles": [2, 2]} if kind == "hrm_text" else {})).double()
    leaves: dict[int, Tensor] = {}
    activations: dict[int, Tensor] = {}

    def capture(run: int, x: Tensor) -> Tensor:
        leaves[run], activations[run] = torch.zeros_like(x, requires_grad=True), x.detach()
        return x + leaves[run]

    place = place_of(ids_of(kind))
    p = runs_by_hand(plain, kind, basis, capture)
    slopes = torch.autograd.grad(p[7], list(leaves.values()))
    slope_ln = np.stack([own[0, place].numpy() for own in slopes])
    activation_ln = np.stack([own[0, place].numpy() for own in activations.values()])
    found = neg_service.neurgrad(measured(kind), [TEXTS[kind]], [["w7" if kind == "albert" else " w7"]], basis=basis)
    assert found.neurgrad.shape == (1, 1, len(ORDERS[kind]), 40)
    assert relative(found.activation[0], activation_ln) <= NEURGRAD_TOLERANCE
    for own_n, expected_n in zip(found.neurgrad[0, 0], slope_ln * np.where(activation_ln < 0, -1, 1), strict=True):
        assert relative(own_n, expected_n) <= NEURGRAD_TOLERANCE
        assert abs(expected_n).max() > 0


@pytest.mark.parametrize(("kind", "basis"), BASES)
def test_a_shift_is_of_one_run(kind: str, basis: str) -> None:
    model, plain, place = measured(kind), loaded(kind), place_of(ids_of(kind))
    model.ensure_checked()
    neurons = [(layer, 3 + 2 * layer) for layer in range(len(ORDERS[kind]))]
    kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def with_shift(layer: int, neuron: int, by: float) -> float:
        def move(run: int, x: Tensor) -> Tensor:
            kept.setdefault(run, x)
            if run != layer:
                return x
            moved = x.clone()
            moved[0, place, neuron] += by
            return moved

        return float(runs_by_hand(plain, kind, basis, move)[7])

    layers = model.feed_forward.layers
    with in_precision(model.model, layers, torch.float64), in_precision(plain, [], torch.float64):
        target = "w7" if kind == "albert" else " w7"
        found = neg_service.neg(model, TEXTS[kind], target, neurons, SHIFTS, basis)
        before = with_shift(0, 0, 0.0)
        for i, (layer, neuron) in enumerate(neurons):
            sign = -1 if kept[layer][0, place, neuron] < 0 else 1
            after = np.array([with_shift(layer, neuron, sign * by) for by in SHIFTS])
            assert relative(found.delta_p[i], after - before) <= SWEEP_TOLERANCE


@pytest.mark.parametrize("kind", ORDERS)
def test_an_unrolled_model_is_the_one_that_was_loaded(kind: str) -> None:
    model = loaded(kind)
    ids, names = torch.tensor([ids_of(kind)]), [name for name, _ in model.named_modules()]
    before, weights = model(ids).logits, {id(own) for own in model.parameters()}
    attributes = model.config.to_dict()
    LanguageModel(model, tiny_tokenizer())
    layers = find_feed_forward(model).layers
    assert [name for name, _ in model.named_modules()] != names
    assert torch.equal(model(ids).logits, before)
    assert {id(own) for own in model.parameters()} == weights
    assert model.config.to_dict() == attributes
    with as_loaded(model) as is_unrolled:
        assert is_unrolled
        assert [name for name, _ in model.named_modules()] == names
        assert torch.equal(model(ids).logits, before)
    unroll(model)
    assert find_feed_forward(model).layers is layers
    # Also in another precision, and of a copy.
    other = copy.deepcopy(model).double()
    assert {own.dtype for own in other.parameters()} == {torch.float64}
    assert sum(own.numel() for own in other.parameters()) == sum(own.numel() for own in model.parameters())
    torch.testing.assert_close(other(ids).logits.float(), before, rtol=1e-4, atol=1e-4)
    assert find_feed_forward(other).layers is not layers


def test_an_unrolled_model_generates_over_its_cache_as_it_did() -> None:
    model, ids = loaded("hrm_text"), torch.tensor([ids_of("hrm_text")])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = model.generate(ids, **options)
    LanguageModel(model, tiny_tokenizer())
    # Each run has keys and values of its own.
    assert torch.equal(model.generate(ids, **options), before)
    assert torch.equal(model.generate(ids, use_cache=False, **options), before)


@pytest.mark.parametrize("kind", ORDERS)
def test_runs_of_the_same_layer_share_its_weights_and_no_others(kind: str) -> None:
    layers = find_feed_forward(loaded(kind)).layers
    weights = [id(next(iter(layer.parameters()))) for layer in layers]
    order = ORDERS[kind]
    assert len(weights) == len(order)
    for i, one in enumerate(order):
        assert [weights[i] == other for other in weights] == [one == other for other in order]
    assert len({id(part) for layer in layers for part in layer.modules()}) == sum(
        len(list(layer.modules())) for layer in layers
    )


def test_hrm_as_it_was_loaded_drops_gradients() -> None:
    plain = loaded("hrm_text")
    requires: dict[int, bool] = {}

    def capture(run: int, x: Tensor) -> Tensor:
        requires[run] = x.requires_grad
        return x

    runs_by_hand(plain, "hrm_text", "paper", capture)
    # By default one of the first low cycles is left, and both of the last ones.
    assert [run for run in requires if not requires[run]] == [0, 1]


@pytest.mark.parametrize("kind", ORDERS)
def test_a_folder_is_loaded_and_planned_by_its_runs(kind: str, tmp_path: Path) -> None:
    model = loaded(kind)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    target = "w7" if kind == "albert" else " w7"
    found = neg_service.neurgrad(neg_service.load_model(tmp_path), [TEXTS[kind]], [[target]])
    expected = neg_service.neurgrad(measured(kind), [TEXTS[kind]], [[target]])
    # What multiplies matrices may be chosen otherwise.
    np.testing.assert_allclose(found.neurgrad, expected.neurgrad, rtol=0, atol=1e-5 * abs(expected.neurgrad).max())
    info = inspect_model(fetch(str(tmp_path)))
    n_layers = len(ORDERS[kind])
    assert (info.n_layers, info.n_neurons) == (n_layers, 40)
    # A token meets each of the four layers as often as it runs.
    stored = [own for layer in find_feed_forward(model).layers[-2:] for own in layer.parameters()]
    assert weights_run_again(model) == (n_layers - 4) * sum(own.numel() for own in stored) // 2
    assert info.token_weights > n_layers * sum(own.numel() for own in stored) // 2
    _, found_layers = find_layers(model)
    assert len(found_layers) == 2


@pytest.mark.parametrize("kind", ORDERS)
def test_several_devices_are_refused(kind: str) -> None:
    with refused(ConfigurationError, "model.device", says="use one device"):
        device_map(loaded(kind), [torch.device("cuda:0"), torch.device("cuda:1")])


def test_another_version_of_their_code_is_refused() -> None:
    model = loaded("hrm_text")
    del model.model.L_bp_cycles_padded
    with refused(ModelError, "model.source", says="not as transformers 5 does: .*L_bp_cycles_padded"):
        find_feed_forward(model)


def test_other_models_are_left_alone() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**_TINY, num_hidden_layers=2))
    layers = model.model.layers
    unroll(model)
    assert model.model.layers is layers
    assert layers_as_run(model) is None
    assert weights_run_again(model) == 0
    with as_loaded(model) as is_unrolled:
        assert not is_unrolled
