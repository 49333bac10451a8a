"""Models whose tokens are bytes (BLT): layers on bytes, around a transformer that runs on patches of several bytes.

The layers that run on bytes are those of the local encoder and then those of the local decoder: they have neurons on a
token. Those of the global transformer between them have none, nor has the patcher, which says where patches begin. It
sees nothing but ids, so that no intervention moves a patch.

A byte sees the patches that ended before it or with it; so what is behind it changes nothing, but where
`max_patch_length` cuts patches (`lacks_steady_bytes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_BYTES = "blt"
_LISTS = ("local_encoder.layers", "local_decoder.layers")


class JoinedLayers(nn.ModuleList):
    """Layers of several lists, one list behind the other; what is put in a layer's place is put into its own list."""

    def __init__(self, layers: Iterable[nn.Module], places: Sequence[tuple[nn.ModuleList, int]] = ()) -> None:
        super().__init__(layers)
        self._places = tuple(places)

    @classmethod
    def of(cls, lists: Sequence[nn.ModuleList]) -> JoinedLayers:
        """All that is in some lists."""
        places = [(own, place) for own in lists for place in range(len(own))]
        return cls([own[place] for own, place in places], places)

    def __setitem__(self, index: int, layer: nn.Module) -> None:
        own, place = self._places[index]
        own[place] = layer
        super().__setitem__(index, layer)


def layers_on_bytes(model: PreTrainedModel) -> tuple[str, JoinedLayers] | None:
    """Where the last ones of the layers that run on bytes are, and all of them; None of any other model."""
    if not runs_on_bytes(model):
        return None
    path = next(name for name, part in model.named_modules() if part is model.base_model)
    lists = [model.base_model.get_submodule(own) for own in _LISTS]
    return f"{path}.{_LISTS[-1]}".lstrip("."), JoinedLayers.of([own for own in lists if isinstance(own, nn.ModuleList)])


def runs_on_bytes(model: PreTrainedModel) -> bool:
    """Whether a model's tokens are bytes, of which it makes patches."""
    return bool(model.config.model_type == _BYTES)


def limits_of_bytes(config: Any) -> list[int]:
    """The most bytes that the parts of such a model take, if it is one; patches are fewer, or as many and one more."""
    if config.model_type != _BYTES:
        return []
    limits = [config.encoder_config.max_position_embeddings, config.decoder_config.max_position_embeddings]
    if _is_by_entropy(config):
        return [*limits, config.patcher_config.max_position_embeddings]
    return [*limits, config.global_config.max_position_embeddings - 1]


def lacks_steady_bytes(model: PreTrainedModel) -> str | None:
    """Patches of a length at most: then a byte that ends one sees it if another byte follows, and not if none does."""
    config = model.config
    if not runs_on_bytes(model) or not _is_by_entropy(config) or not config.max_patch_length:
        return None
    return f"what a byte sees depends on the bytes behind it (max_patch_length={config.max_patch_length})"


def steady_patches(model: PreTrainedModel) -> None:
    """Let the patcher run each text of a batch alone, and once.

    Beside other texts, or in more rows, it would be rounded otherwise, and a byte whose entropy is near the threshold
    would begin a patch in one pass and not in another.
    """
    if runs_on_bytes(model) and model.base_model.patcher is not None:
        # The patcher stays a module of the model, whose attribute gives this instead.
        model.base_model.__dict__["patcher"] = _PatcherOfEach(model.base_model._modules["patcher"])


class _PatcherOfEach:
    """In the place of a patcher."""

    def __init__(self, patcher: nn.Module | None) -> None:
        assert patcher is not None
        self._patcher = patcher

    def __call__(self, input_ids: Tensor, **options: Any) -> tuple[None, Tensor, None]:
        texts, text_of_row = torch.unique(input_ids, dim=0, return_inverse=True)
        lengths = [self._patcher(text[None], **options)[1][0] for text in texts]
        n_patches = max(map(len, lengths))
        return None, torch.stack([_filled_up(own, n_patches) for own in lengths])[text_of_row], None


def _filled_up(lengths: Tensor, n_patches: int) -> Tensor:
    """Lengths of so many patches: those that are added begin behind the last byte, so that none sees them."""
    if len(lengths) == n_patches:
        return lengths
    filled = nn.functional.pad(lengths, (0, n_patches - len(lengths)))
    filled[len(lengths) - 1] += 1
    return filled


def _is_by_entropy(config: Any) -> bool:
    """Whether patches are of several bytes: without a patcher each byte is one."""
    return bool(config.patching_mode == "entropy" and config.patch_in_forward)
