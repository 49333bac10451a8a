"""The textbook way, slow and obvious: the whole sequence, one prompt at a time, one backward pass a target.

Nothing of the engine is used. The tensor that is "the neuron" is written out by hand for each MLP that tests use, so
that a wrong row in the engine's table cannot agree with itself here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_GATED = {"paper": ("up_proj", "output"), "hidden": ("down_proj", "input"), "gate": ("act_fn", "output")}
_FUSED = {
    "paper": ("gate_up_proj", "second half of output"),
    "hidden": ("down_proj", "input"),
    "gate": ("activation_fn", "output"),
}
_NEURONS = {
    "Phi3MLP": _FUSED,
    "GlmMLP": _FUSED,
    "Glm4MLP": _FUSED,
    "GraniteMoeSharedMLP": {
        "paper": ("input_linear", "second half of output"),
        "hidden": ("output_linear", "input"),
        "gate": ("activation", "output"),
    },
    "GraniteMoeHybridMLP": {
        "paper": ("input_linear", "second half of output"),
        "hidden": ("output_linear", "input"),
        "gate": ("activation", "output"),
    },
    "Lfm2MLP": {"paper": ("w3", "output"), "hidden": ("w2", "input")},
    "Llama4TextMLP": {**_GATED, "gate": ("activation_fn", "output")},
    "ModernBertMLP": {"paper": ("Wi", "second half of output"), "hidden": ("Wo", "input"), "gate": ("act", "output")},
}
# Plain MLPs: what the second projection reads, or what the first one gives after its activation.
_PLAIN = {
    **dict.fromkeys(("GPT2MLP", "GPTNeoMLP", "GPTBigCodeMLP", "Starcoder2MLP"), ("c_proj", "input")),
    **dict.fromkeys(("GPTNeoXMLP", "FalconMLP", "BloomMLP"), ("dense_4h_to_h", "input")),
    **dict.fromkeys(("GPTJMLP", "CodeGenMLP"), ("fc_out", "input")),
    **dict.fromkeys(("OPTDecoderLayer", "PhiMLP"), ("fc2", "input")),
    **dict.fromkeys(("NemotronMLP", "NemotronHMLP"), ("down_proj", "input")),
    "MptBlock": ("ffn.down_proj", "input"),
    "TransformerBlock": ("ffn.lin2", "input"),
    "AlbertLayer": ("ffn_output", "input"),
    **dict.fromkeys(("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer"), ("intermediate", "output")),
    **dict.fromkeys(("DebertaLayer", "DebertaV2Layer", "MPNetLayer"), ("intermediate", "output")),
}
_LAYERS = {
    **dict.fromkeys(("GPT2LMHeadModel", "GPTNeoForCausalLM", "GPTJForCausalLM", "CodeGenForCausalLM"), "transformer.h"),
    **dict.fromkeys(("FalconForCausalLM", "BloomForCausalLM", "GPTBigCodeForCausalLM"), "transformer.h"),
    "MptForCausalLM": "transformer.blocks",
    "GPTNeoXForCausalLM": "gpt_neox.layers",
    "OPTForCausalLM": "model.decoder.layers",
    "BltForCausalLM": "model.local_encoder.layers, model.local_decoder.layers",
    "Gemma3ForConditionalGeneration": "model.language_model.layers",
    "BertForMaskedLM": "bert.encoder.layer",
    **dict.fromkeys(("RobertaForMaskedLM", "XLMRobertaForMaskedLM"), "roberta.encoder.layer"),
    "ElectraForMaskedLM": "electra.encoder.layer",
    "DistilBertForMaskedLM": "distilbert.transformer.layer",
    **dict.fromkeys(("DebertaForMaskedLM", "DebertaV2ForMaskedLM"), "deberta.encoder.layer"),
    "MPNetForMaskedLM": "mpnet.encoder.layer",
    # Unrolled: `test_repeated_layers.py` compares with runs that are counted.
    "AlbertForMaskedLM": "albert.encoder.albert_layer_groups",
    "HrmTextForCausalLM": "model.L_module.layers",
}


def neuron_module(mlp: nn.Module, basis: str) -> tuple[nn.Module, str]:
    """The module of an MLP, and whether its input or its output is the neurons."""
    kind = type(mlp).__name__
    name, side = _PLAIN[kind] if kind in _PLAIN else _NEURONS.get(kind, _GATED)[basis]
    return mlp.get_submodule(name), side


# What stands in its place in layers without one.
_NO_MLPS = ("NemotronHMamba2Mixer", "NemotronHAttention")
# What the MLP is called in a layer, where that is not `mlp`.
_MLPS = {
    **dict.fromkeys(("BambaForCausalLM", "FalconH1ForCausalLM", "JambaForCausalLM", "Lfm2ForCausalLM"), "feed_forward"),
    "NemotronHForCausalLM": "mixer",
    "GraniteMoeHybridForCausalLM": "shared_mlp",
    "RecurrentGemmaForCausalLM": "mlp_block",
}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The MLP of each layer that has one, or the layer where that is not a module of its own."""
    name = type(model).__name__
    paths = _LAYERS.get(name, "model.layers").split(", ")
    layers = [layer for path in paths for layer in model.get_submodule(path).children()]
    mlps = [getattr(layer, _MLPS.get(name, "mlp"), layer) for layer in layers]
    return [mlp for mlp in mlps if type(mlp).__name__ not in _NO_MLPS]


def gradients(
    model: nn.Module, ids: Sequence[int], target_ids: Sequence[int], basis: str, position: int = -1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [K], gradients d p / d a [K, L, N] and activations [L, N] at a position of one prompt."""
    seen: dict[int, Tensor] = {}
    handles = [capture(mlp, basis, layer, seen) for layer, mlp in enumerate(layers_of(model))]
    try:
        with torch.enable_grad():
            p_v = _logits(model, ids)[position].softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    neurons = [seen[layer] for layer in range(len(seen))]
    rows = []
    for target in target_ids:
        slopes = torch.autograd.grad(p_v[target], neurons, retain_graph=True)
        rows.append(np.stack([at(slope, position, basis, model) for slope in slopes]))
    activations = np.stack([at(own, position, basis, model) for own in neurons])
    return p_v.detach()[list(target_ids)].double().numpy(), np.stack(rows), activations


def gradients_over_cache(model: nn.Module, ids: Sequence[int], target_ids: Sequence[int], basis: str) -> np.ndarray:
    """Gradients [K, L, N] as `gradients` has them at the last token, which runs alone over the library's own cache."""
    with torch.no_grad():
        cache = model(torch.tensor([list(ids)[:-1]]), use_cache=True, logits_to_keep=1).past_key_values
    rows = []
    for target in target_ids:
        seen: dict[int, Tensor] = {}
        handles = [capture(mlp, basis, layer, seen) for layer, mlp in enumerate(layers_of(model))]
        try:
            with torch.enable_grad():
                last = torch.tensor([list(ids)[-1:]])
                logits = model(last, past_key_values=copy.deepcopy(cache)).logits[0, -1]
                slopes = torch.autograd.grad(logits.softmax(-1)[target], [seen[layer] for layer in range(len(seen))])
        finally:
            for handle in handles:
                handle.remove()
        rows.append(np.stack([at(slope, -1, basis, model) for slope in slopes]))
    return np.stack(rows)


def neurgrad(
    model: nn.Module, ids: Sequence[int], target_ids: Sequence[int], basis: str, position: int = -1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, gradients times the sign of the activation (+1 at zero), and activations."""
    probabilities, slopes, activations = gradients(model, ids, target_ids, basis, position)
    return probabilities, slopes * np.where(activations < 0, -1.0, 1.0), activations


def probability_with_shift(
    model: nn.Module,
    ids: Sequence[int],
    target: int,
    basis: str,
    layer: int,
    neuron: int,
    shift: float,
    position: int = -1,
    read: int | None = None,
) -> float:
    """The target's probability when one neuron is moved by `shift` at a position: a full forward pass.

    read: where the answer is read; there, too, where it is not given.
    """
    return float(logits_with_shift(model, ids, basis, layer, neuron, shift, position, read).softmax(-1)[target])


def logits_with_shift(
    model: nn.Module,
    ids: Sequence[int],
    basis: str,
    layer: int,
    neuron: int,
    shift: float,
    position: int = -1,
    read: int | None = None,
) -> Tensor:
    """Logits [V] at `read` when one neuron is moved by `shift` at a position: a full forward pass."""
    module, side = neuron_module(layers_of(model)[layer], basis)

    def finite_difference(x: Tensor) -> Tensor:
        x = x.clone()
        offset = x.shape[-1] // 2 if side.startswith("second") else 0
        x.view(-1, x.shape[-1])[position, offset + neuron] += shift
        return x

    if side == "input":
        handle = module.register_forward_pre_hook(lambda _m, inputs: (finite_difference(inputs[0]), *inputs[1:]))
    else:
        handle = module.register_forward_hook(lambda _m, _i, output: finite_difference(output))
    try:
        with torch.no_grad():
            return _logits(model, ids)[position if read is None else read]
    finally:
        handle.remove()


def probabilities_with_scaled_layer(
    model: nn.Module, ids: Sequence[int], basis: str, layer: int, factor: float, position: int = -1
) -> tuple[Tensor, Tensor]:
    """Probabilities [V] when all neurons of a layer are multiplied at a position, and these neurons [N]: a graph."""
    with scaled_layer(model, basis, layer, factor, position) as scaled, torch.enable_grad():
        return _logits(model, ids)[position].softmax(-1), scaled[0]


@contextmanager
def scaled_layer(model: nn.Module, basis: str, layer: int, factor: float, position: int) -> Iterator[list[Tensor]]:
    """Let all neurons of a layer be multiplied at a position; what they are then [N] is a leaf, and is in the list."""
    module, side = neuron_module(layers_of(model)[layer], basis)
    scaled: list[Tensor] = []

    def scale(x: Tensor) -> Tensor:
        x = x.clone()
        row = x.view(-1, x.shape[-1])[position]
        offset = len(row) // 2 if side.startswith("second") else 0
        scaled.append((row[offset:] * factor).detach().requires_grad_())
        row[offset:] = scaled[0]
        return x

    if side == "input":
        handle = module.register_forward_pre_hook(lambda _m, inputs: (scale(inputs[0]), *inputs[1:]))
    else:
        handle = module.register_forward_hook(lambda _m, _i, output: scale(output))
    try:
        yield scaled
    finally:
        handle.remove()


def integrated_gradients(
    model: nn.Module,
    ids: Sequence[int],
    target_ids: Sequence[int],
    basis: str,
    layer: int,
    m: int,
    position: int = -1,
) -> np.ndarray:
    """Integrated gradients [K, N] of one layer: a full forward pass for each point, a backward pass for each target."""
    total: Any = 0
    for j in range(1, m + 1):
        p, neurons = probabilities_with_scaled_layer(model, ids, basis, layer, j / m, position)
        total += np.stack([torch.autograd.grad(p[k], neurons, retain_graph=True)[0].numpy() for k in target_ids])
    # The last point is the activations themselves.
    return neurons.detach().numpy() * total / m


def changes_with_shifts(
    model: nn.Module, ids: Sequence[int], target: int, basis: str, layer: int, shifted: Sequence[tuple[int, float]]
) -> np.ndarray:
    """Δp of the target when (neuron, shift) of a layer are moved at the last token: full forward passes, in a batch."""
    module, side = neuron_module(layers_of(model)[layer], basis)
    assert side == "output"
    neurons = torch.tensor([neuron for neuron, _ in shifted])
    shifts = torch.tensor([shift for _, shift in shifted])

    def finite_difference(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output[torch.arange(1, len(shifted) + 1), -1, neurons] += shifts
        return output

    handle = module.register_forward_hook(finite_difference)
    try:
        with torch.no_grad():
            rows = torch.tensor([list(ids)] * (len(shifted) + 1))
            p = model(rows, use_cache=False, logits_to_keep=1).logits[:, -1].softmax(-1)[:, target]
    finally:
        handle.remove()
    return (p[1:] - p[0]).numpy()


def capture(mlp: nn.Module, basis: str, layer: int, seen: dict[int, Tensor]) -> object:
    module, side = neuron_module(mlp, basis)

    def keep(x: Tensor) -> Tensor:
        seen[layer] = x if x.requires_grad else x.detach().requires_grad_()
        return seen[layer]

    if side == "input":
        return module.register_forward_pre_hook(lambda _m, inputs: (keep(inputs[0]), *inputs[1:]))
    return module.register_forward_hook(lambda _m, _i, output: keep(output))


def _logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    options = {"use_cache": False} if hasattr(model, "generate") else {}
    return model(torch.tensor([list(ids)]), **options).logits[0]


def at(x: Tensor, position: int, basis: str, model: nn.Module) -> np.ndarray:
    row = x.detach().reshape(-1, x.shape[-1])[position].double().numpy()
    _, side = neuron_module(layers_of(model)[0], basis)
    return row[len(row) // 2 :] if side.startswith("second") else row


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """How far numbers are off, as a share of what they should be, over all of them together."""
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
