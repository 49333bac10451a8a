"""Sizes of a model that follow from its configuration and modules, with or without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from neg_service.layer_neurons import LayerNeurons
from neg_service.models.byte_patches import limits_of_bytes
from neg_service.models.feed_forward import FeedForward
from neg_service.models.text_config import text_config


def vocabulary(model: PreTrainedModel) -> tuple[int | None, int | None]:
    """How many ids can be read and predicted: rows of the embedding and of the vocabulary head."""
    config = text_config(model.config)
    # Gemma 3n reads a second, shorter table of embeddings in each layer.
    read = [model.get_input_embeddings().weight.shape[0], getattr(config, "vocab_size_per_layer_input", None)]
    head = model.get_output_embeddings()
    predicted = getattr(head, "weight", None)
    return (
        min(int(rows) for rows in read if rows),
        int(config.vocab_size) if predicted is None else int(predicted.shape[0]),
    )


def token_weights(model: PreTrainedModel, layers: Sequence[LayerNeurons], is_gated: bool) -> tuple[int, int]:
    """About how many weights a token is multiplied with: in all layers, of experts in those that it uses; in the head.

    Tables of embeddings are only looked up.
    """
    looked_up = {id(own.weight): own.weight for own in model.modules() if isinstance(own, nn.Embedding)}
    head = getattr(model.get_output_embeddings(), "weight", None)
    n_head = 0 if head is None else head.numel()
    others = sum(own.numel() for own in model.parameters() if id(own) not in looked_up and own is not head)
    of_neuron = (3 if is_gated else 2) * int(text_config(model.config).hidden_size)
    unused = sum(max(0, own.n_experts - own.n_chosen) * own.n_of_expert for own in layers) * of_neuron
    return max(others - unused, 1), n_head


def attention_heads(config: Any) -> int:
    """How many heads attention has, the most where layers differ; 0 of a model without attention."""
    return _most(text_config(config), "num_attention_heads", "num_heads") or 0


def _most(config: Any, *names: str) -> int | None:
    """A number of a configuration by the first of its names that is there, the largest of all layers."""
    # Where layers differ, a configuration refuses to name the one that all have.
    parts = list(getattr(config, "per_layer_config", None) or [config])
    found = [getattr(part, name, None) for part in parts for name in names]
    return max((int(own) for own in found if own), default=None)


def token_values(config: Any, n_neurons: int) -> int:
    """About how many values a token of a row holds at once: a layer's neurons and hidden states, with copies."""
    return 6 * n_neurons + 12 * int(text_config(config).hidden_size)


def row_values(config: Any, n_neurons: int) -> int:
    """About how many values a row of one token holds at once: logits and differences, and those of the token."""
    return 3 * int(text_config(config).vocab_size) + token_values(config, n_neurons)


def kept_values(config: Any, n_layers: int, n_neurons: int, is_gated: bool) -> tuple[int, int]:
    """How many values, at most, a token of a row leaves in the graph of all layers: of hidden states, and of neurons.

    Counted with `torch.autograd.graph.saved_tensors_hooks` for all families of the tests (torch 2.13, transformers
    5.23). Gated ones keep 3 to 7 times the hidden size and 3 to 5 times the neurons, plain ones up to 3 times these;
    Gemma 2 keeps the most. What attention keeps for each token that is looked at comes on top.
    """
    hidden = 7 * int(text_config(config).hidden_size)
    return n_layers * hidden, n_layers * (5 if is_gated else 3) * n_neurons


def slope_values(config: Any, n_layers: int, n_neurons: int) -> int:
    """About how many values a target's way back takes: through the head and a layer, and what comes out of all layers.

    The head's logits, their softmax and the slopes of both; of each layer gradients and activations, with copies.
    """
    return 4 * int(text_config(config).vocab_size) + 5 * n_layers * n_neurons + token_values(config, n_neurons)


def frozen_values(config: Any, n_layers: int, n_neurons: int) -> int:
    """About how many values a token of a prefix takes while it runs: keys and values of all layers, and one layer's."""
    text = text_config(config)
    heads = attention_heads(config)
    # JetMoE keeps them once for each expert of attention that a token chose.
    groups = heads if text.model_type == "jetmoe" else _most(text, "num_key_value_heads") or heads
    size = _most(text, "head_dim") or int(text.hidden_size) // max(1, heads)
    return 2 * n_layers * groups * size + token_values(config, n_neurons)


class PassValues(NamedTuple):
    """How many values parts of a pass take, at the most; what each is of, say the functions above.

    heads: of attention. experts: what the experts that a token chose give, before it is weighed and added up. hidden,
    neurons: what a token of a row leaves in the graph. slopes: a target's way back, of all layers; slope: of one.
    """

    heads: int
    experts: int
    row: int
    token: int
    hidden: int
    neurons: int
    slopes: int
    slope: int
    frozen: int


def pass_values(config: Any, found: FeedForward) -> PassValues:
    """All of them, of a model with such layers."""
    n_layers, n_neurons = found.n_blocks, found.n_neurons
    hidden, neurons = kept_values(config, n_layers, n_neurons, found.is_gated)
    return PassValues(
        heads=attention_heads(config),
        experts=max(own.n_chosen for own in found.layer_neurons) * int(text_config(config).hidden_size),
        row=row_values(config, n_neurons),
        token=token_values(config, n_neurons),
        hidden=hidden,
        neurons=neurons,
        slopes=slope_values(config, n_layers, n_neurons),
        slope=slope_values(config, 1, n_neurons),
        frozen=frozen_values(config, n_layers, n_neurons),
    )


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens of a prompt: positions that there are, and for which rotary angles are the same in every pass."""
    config = text_config(model.config)
    # xLSTM runs its layers again for each chunk of a longer prompt, so that a neuron acts several times.
    names = ("max_position_embeddings", "max_seq_len", "max_inference_chunksize")
    limits = [*(getattr(config, name, None) for name in names), *limits_of_bytes(model.config)]
    # Beyond its original context `longrope` takes other angles for a whole pass, so that one prompt changes another's.
    # `dynamic` does so beyond max_position_embeddings.
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limits.append(part.get("original_max_position_embeddings"))
    # Up to here the temperature that Llama 4 takes by a token's number in its row is 1; see `steady_temperature`.
    if getattr(config, "attn_temperature_tuning", None):
        limits.append(int(config.floor_scale) - 1)
    # BigBird's blocks are dense up to here, and once it has seen so short a prompt it stays so.
    if getattr(config, "attention_type", None) == "block_sparse" and hasattr(config, "num_random_blocks"):
        limits.append((5 + 2 * config.num_random_blocks) * config.block_size)
    for module_name, module in model.named_modules():
        # RoBERTa numbers positions from behind the one that stands for padding.
        if module_name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((int(limit) for limit in limits if limit), default=None)


def steady_temperature(model: PreTrainedModel) -> None:
    """Switch off what scales attention by a token's number in its row: packed rows would have others' temperatures.

    Within `context_length` it is 1 for every token.
    """
    for module in model.modules():
        if getattr(module, "attn_temperature_tuning", None) and hasattr(module, "floor_scale"):
            module.attn_temperature_tuning = False
