"""A transformers cache that hands out what a prefix left, to any number of rows, and keeps nothing.

The tokens before the last run once into a cache of transformers' (`filled`). What they left there is keys and values
of attention, keys of an index that chooses among them, windows of convolutions and states of recurrences, by layer.
A pass of rows would change all of it in place; here (`FrozenCache`) every layer gives what it has, expanded to as
many rows as ask, with the new token behind it where that belongs, and forgets what it is told.

Axes: R rows, G key/value heads, T prefix tokens, D head size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from neg_service.models.engines.base import LoadedModel, MismatchError
from neg_service.models.text_config import text_config

# What a layer with states knows of them, apart from keys and values.
_OF_STATES = (
    "number_of_states",
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)


@torch.no_grad()
def filled(model: LoadedModel, ids: Sequence[int], before: Cache | None = None) -> Cache | None:
    """The cache that `ids` leave behind what `before` holds, which is not changed; None if there are no tokens at all.

    `before` may hold keys and values alone: states are changed in place.
    """
    if not ids:
        return before
    module = model.module
    cache = empty_cache(module) if before is None else _copied(before)
    start = 0 if before is None else before.get_seq_length()
    with model.own_experts():
        tokens = torch.tensor([list(ids)], device=model.device)
        module.base_model(
            tokens, past_key_values=cache, use_cache=True, **positions(module.base_model, start, len(ids))
        )
    return cache


def empty_cache(module: PreTrainedModel) -> Cache:
    """A cache whose attention keeps all tokens: masks decide which are looked at, as in a pass without a cache."""
    config = text_config(module.config)
    layers = DynamicCache(config=config).layers
    if all(map(_is_plain_attention, layers)):
        return DynamicCache()
    return Cache(layers=[_keeping_all(layer) for layer in layers])


def positions(module: nn.Module, start: int, count: int) -> dict[str, Tensor]:
    """Positions of tokens behind `start` others, for a module that can be told: some count from 0 in every pass."""
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return {}
    device = next(module.parameters()).device
    return {"position_ids": torch.arange(start, start + count, device=device)[None]}


def state_values(cache: Cache) -> int:
    """How many values the states of a layer have, the most of all layers."""
    return max((sum(state.numel() for state in _states(layer)) for layer in cache.layers), default=0)


class FrozenCache(Cache):  # type: ignore[misc]
    """What `filled` gave, for rows of any number; see the module's header.

    rows: how many the module that asks next has; `telling_rows` keeps it.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__(layers=[_frozen(layer) for layer in cache.layers])
        self.rows = 1

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A convolution's window, for all rows."""
        return self._expanded(super().get_conv_state(layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A recurrence's state, for all rows."""
        return self._expanded(super().get_recurrent_state(layer_idx, state_idx))

    @contextmanager
    def telling_rows(self, module: PreTrainedModel) -> Iterator[None]:
        """Let the cache know how many rows each part of the model has that asks it: they may grow on the way."""

        def tell(_part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor):
                self.rows = len(hidden)

        with ExitStack() as stack:
            for part in module.base_model.modules():
                if hasattr(part, "layer_idx"):
                    stack.callback(part.register_forward_pre_hook(tell, with_kwargs=True).remove)
            yield

    def _expanded(self, state: Tensor | None) -> Tensor | None:
        return None if state is None else state.expand(self.rows, *state.shape[1:]).as_subclass(_ReadOnly)


class _ReadOnly(Tensor):
    """A state that the code of a single step writes to in place: nothing is written, its results are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def copy_(self, *_args: Any, **_kwargs: Any) -> Tensor:
        """Nothing."""
        return self

    def __getitem__(self, index: Any) -> Tensor:
        """A part, which is not written to either: Zamba does so head by head."""
        return super().__getitem__(index).as_subclass(_ReadOnly)


class _FrozenAttention(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [1, G, T, D]."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self._take_attention(own)

    def _take_attention(self, own: Any) -> None:
        self.keys, self.values = own.keys, own.values
        self.dtype, self.device, self.is_initialized = own.keys.dtype, own.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], -2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], -2),
        )


class _FrozenIndexed(_FrozenAttention, DynamicIndexedLayer):  # type: ignore[misc]
    """Beside keys and values, keys [1, T, D] by which some of them are chosen."""

    def __init__(self, own: Any) -> None:
        DynamicIndexedLayer.__init__(self)
        self._take_attention(own)
        self.indexer_keys, self.is_indexer_initialized = own.indexer_keys, True
        self._of_prefix = own.indexer_position_ids

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Positions of the prefix, where a model keeps them."""
        return getattr(self, "_of_prefix", None)

    @indexer_position_ids.setter
    def indexer_position_ids(self, _positions: Tensor | None) -> None:
        """Nothing: those of a pass are not kept."""

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        rows = len(indexer_key_states)
        return torch.cat([self.indexer_keys.expand(rows, -1, -1), indexer_key_states], 1)


class _FrozenStates(LinearAttentionLayer):  # type: ignore[misc]
    """Windows of convolutions and states of recurrences."""

    def __init__(self, own: Any) -> None:
        LinearAttentionLayer.__init__(self)
        self._take_states(own)

    def _take_states(self, own: Any) -> None:
        for name in _OF_STATES:
            setattr(self, name, getattr(own, name))

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_kwargs: Any) -> Tensor:
        own = self.conv_states[state_idx]
        return torch.cat([own.expand(len(conv_states), *own.shape[1:]), conv_states], -1)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_kwargs: Any) -> Tensor:
        return recurrent_states


class _FrozenBoth(_FrozenStates, _FrozenAttention, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer with attention and a state side by side."""

    def __init__(self, own: Any) -> None:
        LinearAttentionAndFullAttentionLayer.__init__(self)
        self._take_attention(own)
        self._take_states(own)


def _frozen(layer: Any) -> Any:
    has_states = isinstance(layer, LinearAttentionCacheLayerMixin)
    has_keys = isinstance(layer, DynamicLayer) and layer.keys is not None and layer.keys.numel() > 0
    if has_states:
        return _FrozenBoth(layer) if has_keys else _FrozenStates(layer)
    if isinstance(layer, DynamicIndexedLayer) and layer.indexer_keys is not None:
        return _FrozenIndexed(layer)
    # Some layers go by what the index of another chose.
    if has_keys and (_is_plain_attention(layer) or isinstance(layer, DynamicIndexedLayer)):
        return _FrozenAttention(layer)
    if any(isinstance(own, Tensor) for own in vars(layer).values()):
        raise MismatchError(f"what {type(layer).__name__} keeps in a cache is not known")
    # What holds nothing stands for a layer that has nothing to keep.
    return layer


def _is_plain_attention(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and not isinstance(
        layer, DynamicIndexedLayer | LinearAttentionCacheLayerMixin
    )


def _keeping_all(layer: Any) -> Any:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        has_attention = isinstance(layer, DynamicLayer)
        return LinearAttentionAndFullAttentionLayer(layer.number_of_states) if has_attention else layer
    if isinstance(layer, DynamicIndexedLayer):
        return DynamicIndexedLayer()
    return DynamicLayer() if isinstance(layer, DynamicLayer) else layer


def _copied(cache: Cache) -> Cache:
    """A cache that can go on without changing this one: keys and values are put together anew at each update."""
    return Cache(layers=[copy.copy(layer) for layer in cache.layers])


def _states(layer: Any) -> list[Tensor]:
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return []
    return [own for own in (*layer.conv_states.values(), *layer.recurrent_states.values()) if own is not None]
