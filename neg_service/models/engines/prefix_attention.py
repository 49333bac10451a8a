"""Attention of a frozen prefix, and of many rows of one token behind it: pay for a token once.

In a causal model a change at the last token changes nothing before it. So the tokens before the last run
once, without a graph, and leave their keys and values (`FrozenPrefix`); the last token then runs in many *rows*:
one per target for gradients, one per (neuron, shift) for interventions. A row attends to its prompt's
prefix and to itself. Prompts that begin with the same tokens share that part of the prefix (`SharedPrefix`).

One attention function, registered with transformers' `AttentionInterface`, does this for every architecture that
calls attention through that interface; everything else is the model's own code. Tokens of unequal prompts
travel *packed* in one row with explicit positions, so no linear layer ever sees padding; only the attention
product itself is padded. No transformers cache is involved: its update in place is how frozen prefixes get
corrupted. No mask is registered either, for which transformers then makes none: what a row may see is decided here.

Axes: B prompts, T longest own prefix, C shared tokens, M packed prefix tokens, J rows of a prompt (the most),
R rows in all, H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from neg_service.errors import ModelError
from neg_service.models.precision import at_least_float32
from neg_service.models.transfer import indices, sent

ATTENTION, CHUNKED = "neg_service_shared_prefix", "chunked_attention"


@dataclass(frozen=True)
class SharedPrefix:
    """Tokens with which every prompt of a batch begins, and their keys and values by layer."""

    ids: tuple[int, ...] = ()
    keys_gcd: dict[int, Tensor] = field(default_factory=dict)
    values_gcd: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FrozenPrefix:
    """Frozen keys and values of all tokens but the last, for a batch of prompts.

    `own_lengths[b]` counts the tokens of prompt b between the shared ones and its last; keys and values beyond
    it are padding. Layers may live on different devices; each one's tensors lie where the layer does.
    """

    shared: SharedPrefix
    own_lengths: tuple[int, ...]
    last_ids: tuple[int, ...]
    keys_bgtd: dict[int, Tensor] = field(default_factory=dict)
    values_bgtd: dict[int, Tensor] = field(default_factory=dict)


class AttentionPass(Protocol):
    def attend(self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], view: View) -> Tensor:
        """The attention output [1, tokens, H, D] of one layer."""
        ...


@dataclass(frozen=True)
class View:
    """What a layer's attention does beyond a plain product."""

    scaling: float
    window: int | None
    softcap: float | None
    # Tokens see no others than those of their own chunk of so many.
    chunk: int | None = None
    # A score for each head that takes part in the softmax and has no value [H].
    sinks: Tensor | None = None


_PASS: ContextVar[AttentionPass] = ContextVar("neg_service_pass")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    beyond = {"attention_mask": attention_mask, **extras}
    for name in ("attention_mask", "position_bias", "indices", "block_indices"):
        if beyond.get(name) is not None:
            raise ModelError(f"{type(module).__name__} has {name}, which rows over a shared prefix cannot express")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    view = View(scaling, sliding_window, softcap, _chunk(module), s_aux)
    layer: int = module.layer_idx  # type: ignore[assignment]
    return _PASS.get().attend(layer, (query, key, value), view), None


AttentionInterface.register(ATTENTION, _attention)


def _chunk(module: Any) -> int | None:
    """The size of a layer's chunks, which only masks are told."""
    kinds = getattr(module.config, "layer_types", None) or ()
    is_chunked = module.layer_idx < len(kinds) and kinds[module.layer_idx] == CHUNKED
    return int(module.config.attention_chunk_size) if is_chunked else None


@contextmanager
def running(model: PreTrainedModel, attention_pass: AttentionPass) -> Iterator[None]:
    """Let `attention_pass` be the model's attention, and put the model back as it was, also after an error."""
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    token = _PASS.set(attention_pass)
    try:
        yield
    finally:
        _PASS.reset(token)
        model.config._attn_implementation = before


class _Packing:
    """Between packed rows [1, h, M, D] and a padded batch [B, h, T, D], when rows belong to B prompts."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.b, self.t = len(counts), max(counts)
        self.is_full = all(count == self.t for count in counts)
        self._slots_m = torch.cat([torch.arange(n) + b * self.t for b, n in enumerate(counts)])

    def slots(self, device: torch.device) -> Tensor:
        if self._slots_m.device != device:
            self._slots_m = sent(self._slots_m, device)
        return self._slots_m

    def pad(self, x_hmd: Tensor) -> Tensor:
        if self.b == 1:
            # Nothing to sort; and rows of one prompt may become more on their way through the layers.
            return x_hmd
        x_mhd = x_hmd[0].transpose(0, 1)
        if not self.is_full:
            empty = x_mhd.new_zeros(self.b * self.t, *x_mhd.shape[1:])
            x_mhd = empty.index_copy(0, self.slots(x_mhd.device), x_mhd)
        return x_mhd.reshape(self.b, self.t, *x_mhd.shape[1:]).transpose(1, 2)

    def unpad(self, x_bhtd: Tensor) -> Tensor:
        if self.b == 1:
            return x_bhtd.transpose(1, 2).contiguous()
        x_mhd = x_bhtd.transpose(1, 2).reshape(self.b * self.t, x_bhtd.shape[1], -1)
        return (x_mhd if self.is_full else x_mhd[self.slots(x_mhd.device)])[None]


class PrefixPass:
    """Attention of the tokens before the last: to the shared prefix, and causally to their own prompt."""

    def __init__(self, prefix: FrozenPrefix) -> None:
        self.prefix = prefix
        self.packing = _Packing(prefix.own_lengths)
        self._masks: dict[tuple[int | None, int | None, torch.device], Tensor] = {}

    def attend(self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], view: View) -> Tensor:
        q_bhtd, k_bgtd, v_bgtd = (self.packing.pad(x) for x in qkv)
        self.prefix.keys_bgtd[layer], self.prefix.values_bgtd[layer] = _alone(k_bgtd), _alone(v_bgtd)
        shared = self.prefix.shared
        if shared.ids:
            b = self.packing.b
            k_bgtd = torch.cat([shared.keys_gcd[layer].expand(b, -1, -1, -1), k_bgtd], 2)
            v_bgtd = torch.cat([shared.values_gcd[layer].expand(b, -1, -1, -1), v_bgtd], 2)
        return self.packing.unpad(self._product(q_bhtd, k_bgtd, v_bgtd, view))

    def _product(self, q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, view: View) -> Tensor:
        mask = self._mask(view, q_bhtd.device)
        heads_a_group = q_bhtd.shape[1] // k_bgsd.shape[1]
        if view.softcap is None and view.sinks is None:
            # With a mask, CUDA's fast kernels want one key/value head a query head.
            if mask is not None and q_bhtd.is_cuda and heads_a_group > 1:
                k_bgsd, v_bgsd = (x.repeat_interleave(heads_a_group, 1) for x in (k_bgsd, v_bgsd))
            return nn.functional.scaled_dot_product_attention(
                q_bhtd,
                k_bgsd,
                v_bgsd,
                attn_mask=mask,
                is_causal=mask is None,
                scale=view.scaling,
                enable_gqa=q_bhtd.shape[1] != k_bgsd.shape[1],
            )
        k_bhsd, v_bhsd = (x.repeat_interleave(heads_a_group, 1) for x in (k_bgsd, v_bgsd))
        scores = at_least_float32(softcapped(q_bhtd @ k_bhsd.transpose(2, 3) * view.scaling, view.softcap))
        visible = mask if mask is not None else torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
        if view.sinks is not None:
            sinks_bht1 = view.sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
            return torch.cat([scores, sinks_bht1], -1).softmax(-1)[..., :-1].to(v_bhsd.dtype) @ v_bhsd
        return scores.softmax(-1).to(v_bhsd.dtype) @ v_bhsd

    def _mask(self, view: View, device: torch.device) -> Tensor | None:
        """Which of the C + T keys each of the T own tokens sees; None where that is plainly causal.

        Padding needs no mask: it lies behind every real token of its prompt.
        """
        c, t = len(self.prefix.shared.ids), self.packing.t
        window, chunk = (own if own is not None and own < c + t else None for own in (view.window, view.chunk))
        if c == 0 and window is None and chunk is None:
            return None
        if (window, chunk, device) not in self._masks:
            query = torch.arange(c, c + t, device=device)[:, None]
            key = torch.arange(c + t, device=device)[None]
            visible = key <= query
            if window is not None:
                visible &= query - key < window
            if chunk is not None:
                visible &= query // chunk == key // chunk
            self._masks[window, chunk, device] = visible
        return self._masks[window, chunk, device]


class RowPass:
    """Attention of rows of the last token: to the shared prefix, to their prompt's own prefix, and to themselves."""

    def __init__(self, prefix: FrozenPrefix, rows: Sequence[int]) -> None:
        self.prefix = prefix
        self.packing = _Packing(rows)
        self._hidden: dict[tuple[int | None, int | None, torch.device], tuple[Tensor | None, Tensor | None]] = {}

    def attend(self, layer: int, qkv: tuple[Tensor, Tensor, Tensor], view: View) -> Tensor:
        q_bhjd, k_bgjd, v_bgjd = (self.packing.pad(x) for x in qkv)
        b, h, j, d = q_bhjd.shape
        g = k_bgjd.shape[1]
        # The query heads that share a key/value head become one axis of rows, X = H/G * J.
        q_bgxd = (q_bhjd * view.scaling).reshape(b, g, h // g * j, d)
        shared_hidden, own_hidden = self.hidden_keys(view, q_bhjd.device)

        scores: list[Tensor] = []
        values: list[Tensor] = []
        if self.prefix.shared.ids:
            # One product for all prompts: the keys that all share are never copied.
            q_gyd = q_bgxd.transpose(0, 1).reshape(g, -1, d)
            score_gyc = q_gyd @ self.prefix.shared.keys_gcd[layer].transpose(1, 2)
            score_bgxc = score_gyc.view(g, b, -1, score_gyc.shape[-1]).transpose(0, 1)
            scores.append(softcapped(score_bgxc, view.softcap))
            if shared_hidden is not None:
                scores[-1] = scores[-1].masked_fill(shared_hidden[:, None, None], float("-inf"))
            values.append(self.prefix.shared.values_gcd[layer])
        if layer in self.prefix.keys_bgtd:
            score_bgxt = q_bgxd @ self.prefix.keys_bgtd[layer].transpose(2, 3)
            scores.append(softcapped(score_bgxt, view.softcap))
            if own_hidden is not None:
                scores[-1] = scores[-1].masked_fill(own_hidden[:, None, None], float("-inf"))
            values.append(self.prefix.values_bgtd[layer])
        self_bgxj = q_bgxd.view(b, g, -1, j, d) * k_bgjd[:, :, None]
        scores.append(softcapped(self_bgxj.sum(-1).reshape(b, g, -1, 1), view.softcap))
        if view.sinks is not None:
            sinks_g1 = view.sinks.view(1, g, -1, 1).expand(b, -1, -1, j)
            scores.append(sinks_g1.reshape(b, g, -1, 1).to(q_bgxd.dtype))

        weights = at_least_float32(torch.cat(scores, -1)).softmax(-1).to(q_bgxd.dtype)
        parts = torch.split(weights, [score.shape[-1] for score in scores], -1)
        *prefix_weights, self_weight = parts if view.sinks is None else parts[:-1]
        out_bgxd = (self_weight.view(b, g, -1, j, 1) * v_bgjd[:, :, None]).reshape(b, g, -1, v_bgjd.shape[-1])
        for weight_bgxs, value in zip(prefix_weights, values, strict=True):
            if value.ndim == 3:
                weight_gys = weight_bgxs.transpose(0, 1).reshape(g, -1, value.shape[1])
                out_bgxd = out_bgxd + (weight_gys @ value).view(g, b, -1, value.shape[2]).transpose(0, 1)
            else:
                out_bgxd = out_bgxd + weight_bgxs @ value
        return self.packing.unpad(out_bgxd.reshape(b, h, j, -1))

    def hidden_keys(self, view: View, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Shared keys [B, C] and own keys [B, T] that a prompt's last token may not see; None: it sees all."""
        window, chunk = view.window, view.chunk
        if (window, chunk, device) not in self._hidden:
            c, lengths = len(self.prefix.shared.ids), self.prefix.own_lengths
            length_b1 = indices(lengths, device)[:, None]
            t = torch.arange(max(lengths), device=device)[None]
            own = t >= length_b1 if min(lengths) < max(lengths) else None
            shared = None
            if window is not None and c + max(lengths) >= window:
                far = length_b1 - t >= window
                own = far if own is None else own | far
                shared = c + length_b1 - torch.arange(c, device=device)[None] >= window
            if chunk is not None and c + max(lengths) >= chunk:
                chunk_b1 = (c + length_b1) // chunk
                far = (c + t) // chunk != chunk_b1
                own = far if own is None else own | far
                far = torch.arange(c, device=device)[None] // chunk != chunk_b1
                shared = far if shared is None else shared | far
            self._hidden[window, chunk, device] = (shared, own)
        return self._hidden[window, chunk, device]


def _alone(x: Tensor) -> Tensor:
    """A tensor that keeps nothing else alive: of a fused projection (GPT-2, Phi-3) keys and values are views."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def softcapped(scores: Tensor, softcap: float | None) -> Tensor:
    """Attention scores, bent as some models do."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def packed(model: PreTrainedModel, ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A model's inputs: all rows' tokens one behind the other."""
    return {
        "input_ids": indices([[i for row in ids for i in row]], model.device),
        "position_ids": indices([[i for row in positions for i in row]], model.device),
        "use_cache": False,
    }
