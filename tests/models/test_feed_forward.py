"""Where neurons are: the table of MLPs, layers that have none or share theirs, and what is refused.

What is expected is written out by hand, from hooks on modules of the plain model and their own order of running.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from neg_service.errors import ConfigurationError, ModelError
from neg_service.models.experts import own_experts
from neg_service.models.feed_forward import FeedForward, Site, check_basis, find_feed_forward, hooks
from neg_service.models.mlp import Mlp
from neg_service.models.start_at_layer import keep_inputs, start_at_layer
from tests.configurations import tiny
from tests.refusals import refused
from tests.tiny_models import tiny_model

IDS = torch.arange(5, 18)[None]


def test_unknown_mlps_are_refused_by_their_class() -> None:
    model = tiny_model("Llama 2").model
    for layer in model.model.layers:
        layer.mlp.act_fn = None
    with refused(ModelError, says=r"the neurons of LlamaMLP \(layer 0 of LlamaForCausalLM\) are not known"):
        find_feed_forward(model)


def test_a_basis_that_is_none_is_refused_with_those_that_there_are() -> None:
    with refused(ConfigurationError, "measure.basis", "bias", allowed="one of paper, hidden, gate"):
        check_basis("bias", True, "LlamaMLP")
    with refused(ConfigurationError, "measure.basis", "gate", says="GPT2MLP has no gate; use paper or hidden"):
        check_basis("gate", False, "GPT2MLP")
    check_basis("gate", True, "LlamaMLP")


def test_a_model_of_images_and_text_is_measured_in_its_text_layers() -> None:
    # As many layers as the part that reads images has, of which the list comes first.
    model = tiny_model("Gemma 3, images and text")
    assert model.feed_forward.layers is model.model.model.language_model.layers
    # This one does not say which part reads text.
    other = tiny("git", is_masked=False)
    assert find_feed_forward(other).layers is other.git.encoder.layer


def test_a_decoder_of_an_encoder_decoder_has_its_own_number_of_layers() -> None:
    model = tiny("blenderbot", is_masked=False)
    assert (model.config.num_hidden_layers, model.config.decoder_layers) == (2, 4)
    assert find_feed_forward(model).layers is model.model.decoder.layers


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "rwkv"])
def test_a_model_without_feed_forward_layers_is_refused_for_that(model_type: str) -> None:
    with refused(ModelError, "model.source", says="has no feed-forward layers"):
        find_feed_forward(tiny(model_type, is_masked=False))


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("cpmant", "puts tokens of its own before a prompt"),
        ("xlnet", "looks at later tokens too"),
    ],
)
def test_what_would_mislead_is_refused_by_name(model_type: str, says: str) -> None:
    with refused(ModelError, "model.source", says=says):
        find_feed_forward(tiny(model_type, is_masked=False))


def test_a_layer_that_stands_in_the_list_twice_is_refused() -> None:
    model = tiny("llama", is_masked=False)
    model.model.layers[2] = model.model.layers[0]
    with refused(ModelError, "model.source", says="runs one layer's weights as several layers"):
        find_feed_forward(model)


def test_layers_of_a_hybrid_may_have_no_mlp() -> None:
    model = tiny("nemotron_h", is_masked=False)
    found = find_feed_forward(model)
    kinds = [type(layer.mixer).__name__ for layer in found.layers]
    assert {"NemotronHMamba2Mixer", "NemotronHAttention", "NemotronHMoE"} <= set(kinds)
    for kind, layer, mlps, experts in zip(kinds, found.layers, found.mlps, found.experts, strict=True):
        assert (experts is not None) == (kind == "NemotronHMoE")
        # Beside experts one is always on.
        expected = {"NemotronHMLP": layer.mixer, "NemotronHMoE": getattr(layer.mixer, "shared_experts", None)}.get(kind)
        assert [mlp.module for mlp in mlps] == ([] if expected is None else [expected])


def test_layers_that_text_alone_does_not_run_have_no_neurons() -> None:
    model = tiny("mllama", is_masked=False)
    found = find_feed_forward(model)
    ran = _runs(model, list(found.layers))
    assert [len(mlps) for mlps in found.mlps] == [int(layer in ran) for layer in found.layers]
    assert not all(found.mlps)


def test_sizes_tell_a_fused_projection_from_a_plain_one_of_the_same_name() -> None:
    model = tiny("moshi", is_masked=False)
    (mlp,) = find_feed_forward(model).mlps[0]
    ran = _runs(model, [mlp.module.fc1, mlp.module.fc2])
    gate, up = ran[mlp.module.fc1][0].output.chunk(2, -1)
    assert torch.equal(_shown(model, "paper")[0], up)
    assert torch.equal(_shown(model, "hidden")[0], ran[mlp.module.fc2][0].input)
    torch.testing.assert_close(silu(gate) * up, ran[mlp.module.fc2][0].input)


def test_an_activation_that_is_no_module_leaves_two_bases() -> None:
    model = tiny("lfm2", is_masked=False)
    found = find_feed_forward(model)
    hand = [layer.feed_forward for layer in model.model.layers]
    ran = _runs(model, [part for own in hand for part in (own.w1, own.w2, own.w3)])
    for layer, own in enumerate(hand):
        assert torch.equal(_shown(model, "paper")[layer], ran[own.w3][0].output)
        assert torch.equal(_shown(model, "hidden")[layer], ran[own.w2][0].input)
        gate, make = _mlp(found, layer).activated()
        assert gate.module is own.w1
        torch.testing.assert_close(make(ran[own.w1][0].output) * ran[own.w3][0].output, ran[own.w2][0].input)
    with refused(ConfigurationError, "measure.basis", "gate", says="Lfm2MLP is no module"):
        found.sites("gate")
    assert found.is_gated
    assert not found.offers_gate


def test_hidden_is_before_a_norm_inside_an_mlp() -> None:
    model = tiny("bitnet", is_masked=False)
    own = model.model.layers[1].mlp
    ran = _runs(model, [own.act_fn, own.up_proj])
    expected = ran[own.act_fn][0].output * ran[own.up_proj][0].output
    assert torch.equal(_shown(model, "hidden")[1], expected)


def test_what_a_layer_adds_to_a_shared_projection_is_in_its_neurons() -> None:
    model = tiny("zamba2", is_masked=False)
    found = find_feed_forward(model)
    mixed = [layer for layer, mlp in enumerate(found.mlps) if mlp]
    assert mixed == [1, 3]
    assert found.mlps[0] == found.mlps[2] == ()
    mlps = [model.model.layers[layer].shared_transformer.feed_forward for layer in mixed]
    # Weights are shared, what is added to their product is not.
    assert mlps[0].gate_up_proj.weight is mlps[1].gate_up_proj.weight
    before = _logits(model)
    for place, (layer, mlp) in enumerate(zip(mixed, mlps, strict=True)):
        adapter = mlp.gate_up_proj_adapter_list[place]
        ran = _runs(model, [mlp.gate_up_proj, adapter, mlp.down_proj])
        up = (ran[mlp.gate_up_proj][0].output + ran[adapter][0].output).chunk(2, -1)[1]
        assert torch.equal(_shown(model, "paper")[layer], up)
        # Put in its place, it goes on: down reads act(gate) times what was put there.
        point = _mlp(found, layer).point("paper")
        gate = ran[mlp.down_proj][0].input / up
        with hooks({0: point}, lambda _, x, point=point: _with(x, point, torch.zeros_like(point.neurons(x)) + 2)):
            moved = _runs(model, [mlp.down_proj])[mlp.down_proj][0].input
        torch.testing.assert_close(moved, 2 * gate, rtol=1e-3, atol=1e-5)
    with hooks(dict(enumerate(point for point in found.sites("paper").values())), lambda _, x: None):
        assert torch.equal(_logits(model), before)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("basis", ["paper", "hidden", "gate"])
def test_an_mlp_that_layers_share_has_neurons_of_each_layer(basis: str) -> None:
    model = _sharing()
    found = find_feed_forward(model)
    module, side = {"paper": ("up_proj", "output"), "hidden": ("down_proj", "input"), "gate": ("act_fn", "output")}[
        basis
    ]
    part = model.model.layers[0].mlp.get_submodule(module)
    # It runs as layers 0, 2 and 3, in that order.
    runs = [getattr(own, side) for own in _runs(model, [part])[part]]
    shown = _shown(model, basis)
    for layer, expected in zip((0, 2, 3), runs, strict=True):
        assert torch.equal(shown[layer], expected)
    # What is put in the place of layer 2's goes on from there, and no other layer's is touched.
    point = list(found.sites(basis).values())[2]
    with hooks({0: point}, lambda _, x: x + 1):
        moved = [getattr(own, side) for own in _runs(model, [part])[part]]
    assert torch.equal(moved[0], runs[0])
    assert not torch.equal(moved[2], runs[2])


def test_a_pass_that_begins_at_a_layer_shows_a_shared_mlp_of_that_layer_and_no_lower_one() -> None:
    model = _sharing()
    found = find_feed_forward(model)
    points = dict(enumerate(found.sites("hidden").values()))
    whole = _shown(model, "hidden")
    with keep_inputs(found.layers) as (inputs, structures):
        _logits(model)
    seen: dict[int, Tensor] = {}
    with start_at_layer(found.layers, 2, inputs[2], structures), hooks(points, lambda i, x: seen.update({i: x})):
        _logits(model)
    assert sorted(seen) == [2, 3]
    torch.testing.assert_close(seen[2], whole[2])


def test_a_hook_on_a_shared_mlp_knows_its_layer_also_after_an_error() -> None:
    model = _sharing()
    point = list(find_feed_forward(model).sites("hidden").values())[2]

    def fail(_: int, x: Tensor) -> None:
        raise RuntimeError("by intent")

    with pytest.raises(RuntimeError, match="by intent"), hooks({0: point}, fail):
        _logits(model)
    seen: list[Tensor] = []
    with hooks({0: point}, lambda _, x: seen.append(x)):
        _logits(model)
    assert len(seen) == 1


def test_layers_that_share_an_activation_module_are_told_apart() -> None:
    model = tiny("openai-gpt", is_masked=False)
    blocks = model.transformer.h
    assert blocks[0].mlp.act is blocks[1].mlp.act
    runs = [own.output for own in _runs(model, [blocks[0].mlp.act])[blocks[0].mlp.act]]
    found, seen = find_feed_forward(model), {}
    points = {layer: _mlp(found, layer).activated()[0] for layer in range(found.n_layers)}
    with hooks(points, lambda layer, x: seen.update({layer: x})):
        _logits(model)
    assert len(runs) == len(seen) == 4
    assert all(torch.equal(seen[layer], own) for layer, own in enumerate(runs))


def test_a_gate_inside_a_norm_is_no_mlp() -> None:
    model = tiny("axk2", is_masked=False)
    found = find_feed_forward(model)
    assert [_mlp(found, layer).module for layer in range(found.n_layers)] == [
        layer.mlp if index == 0 else layer.mlp.shared_experts for index, layer in enumerate(model.model.layers)
    ]


@pytest.mark.parametrize("basis", ["paper", "hidden", "gate"])
def test_neurons_of_several_mlps_of_a_layer_are_numbered_through(basis: str) -> None:
    model = tiny("longcat_flash", is_masked=False)
    found = find_feed_forward(model)
    # As many as there are modules, and not as the configuration says, which counts attentions.
    assert (found.n_layers, model.config.num_hidden_layers) == (4, 8)
    assert found.layers is model.model.layers
    for layer, own in enumerate(model.model.layers):
        assert [mlp.module for mlp in found.mlps[layer]] == list(own.mlps)
    assert {(own.n_mlp, own.n_experts, own.n_of_expert, own.n_chosen) for own in found.layer_neurons} == {
        (96, 4, 24, 4)
    }
    first, second, experts = Site(2), Site(2, part=1), Site(2, True)
    assert [found.numbers(site) for site in (first, second, experts)] == [range(48), range(48, 96), range(24)]
    assert [site for site in found.sites(basis) if site.layer == 2] == [experts, first, second]
    neurons = np.array([(2, -1, 0), (2, -1, 47), (2, -1, 48), (2, -1, 95), (2, 3, 0), (1, -1, 0)]).T
    assert found.are_at(first, *neurons).tolist() == [True, True, False, False, False, False]
    assert found.are_at(second, *neurons).tolist() == [False, False, True, True, False, False]
    assert found.are_at(experts, *neurons).tolist() == [False, False, False, False, True, False]
    # The second one reads what the first one gave.
    part, side = {"paper": ("up_proj", "output"), "hidden": ("down_proj", "input"), "gate": ("act_fn", "output")}[basis]
    modules = [own.get_submodule(part) for own in model.model.layers[2].mlps]
    points = {site: found.sites(basis)[site] for site in (first, second)}
    before = _runs(model, modules)
    seen: dict[Site, Tensor] = {}
    with hooks(points, lambda site, x: seen.update({site: x})):
        _logits(model)
    for site, module in zip(points, modules, strict=True):
        assert torch.equal(seen[site], getattr(before[module][0], side))
    with hooks({0: points[first]}, lambda _, x: x + 1):
        moved = _runs(model, modules)
    assert not torch.equal(getattr(moved[modules[1]][0], side), getattr(before[modules[1]][0], side))


def test_one_mlp_in_two_places_of_a_layer_and_experts_that_are_all_identities_are_refused() -> None:
    model = tiny("longcat_flash", is_masked=False)
    model.model.layers[1].mlps[1] = model.model.layers[1].mlps[0]
    with refused(ModelError, "model.source", says="layer 1 of LongcatFlashForCausalLM runs one MLP several times"):
        find_feed_forward(model)
    config = tiny("longcat_flash", is_masked=False).config
    config.n_routed_experts = 0
    with refused(ModelError, "model.source", says=r"experts of layer 0 .* \(LongcatFlashExperts\) are not known"):
        find_feed_forward(type(model)(config))


def test_experts_that_are_always_on_are_an_mlp_made_of_one_after_the_other() -> None:
    model = tiny("inkling_text", is_masked=False)
    found = find_feed_forward(model)
    layer = next(index for index, own in enumerate(found.experts) if own)
    own = model.model.layers[layer].mlp
    assert [mlp.module for mlp in found.mlps[layer]] == [own.shared_experts]
    assert found.experts[layer].module is own.experts  # type: ignore[union-attr]
    assert found.layer_neurons[layer].n_mlp == 2 * 24
    given = _runs(model, [own.shared_experts])[own.shared_experts][0]
    gate, up = (
        torch.cat([given.input[0] @ weight.T for weight in every], -1)
        for every in (own.shared_experts.gate_proj, own.shared_experts.up_proj)
    )
    expected = {"paper": up, "gate": silu(gate), "hidden": silu(gate) * up}
    with own_experts(found.experts_modules):
        for basis, neurons in expected.items():
            torch.testing.assert_close(_shown(model, basis)[layer], neurons)
        again = _runs(model, [own.shared_experts])[own.shared_experts][0]
    torch.testing.assert_close(again.output, given.output)
    # Two more layers of such a kind in one are no MLP that is known.
    model.model.layers[layer].mlp.more = own.shared_experts.__class__(model.config)
    with refused(ModelError, "model.source", says=r"several MLPs \(InklingSharedExperts, InklingSharedExperts\)"):
        find_feed_forward(model)


# --- by hand


class _Run:
    """One call of a module: the first tensor that it was given, and what it gave."""

    def __init__(self, inputs: Sequence[Any], output: Any) -> None:
        self.input, self.output = inputs[0] if inputs else None, output


def _runs(model: Any, modules: Sequence[nn.Module]) -> dict[nn.Module, list[_Run]]:
    """The calls of some modules in a plain pass, in their order."""
    found: dict[nn.Module, list[_Run]] = defaultdict(list)
    with _hooked(modules, lambda module, inputs, output: found[module].append(_Run(inputs, output))):
        _logits(model)
    return found


@contextmanager
def _hooked(modules: Sequence[nn.Module], visit: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    handles = [module.register_forward_hook(visit) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mlp(found: FeedForward, layer: int) -> Mlp:
    """The only MLP of a layer."""
    (mlp,) = found.mlps[layer]
    assert isinstance(mlp, Mlp)
    return mlp


def _shown(model: Any, basis: str) -> dict[int, Tensor]:
    """The neurons of each MLP in a plain pass, as the package finds them, by layer."""
    found: FeedForward = find_feed_forward(model)
    points = {site.layer: point for site, point in found.sites(basis).items() if not site.is_experts}
    seen: dict[int, Tensor] = {}
    with hooks(points, lambda layer, x: seen.update({layer: points[layer].neurons(x)})):
        _logits(model)
    return seen


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model.eval()(IDS, use_cache=False).logits
    return logits


def _with(x: Tensor, point: Any, values: Tensor) -> Tensor:
    changed = x.clone()
    point.neurons(changed)[:] = values
    return changed


def _sharing() -> Any:
    """A model whose layers 0, 2 and 3 have one MLP."""
    model = tiny("llama", is_masked=False)
    for layer in (2, 3):
        model.model.layers[layer].mlp = model.model.layers[0].mlp
    return model
