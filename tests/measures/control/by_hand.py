"""Joint shifts by hand: a full forward pass with a hook in each layer, for models whose neurons are `up_proj`'s."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from neg_service import LanguageModel
from tests import oracle


def ids_of(text: str) -> list[int]:
    """Tokens of words of the tiny tokenizer."""
    return [int(word[1:]) for word in text.split()]


def logits_with_shifts(model: LanguageModel, text: str, shift_ln: np.ndarray | None) -> Tensor:
    """Logits [V] behind a text, float64, with what is added to each neuron of its last token [L, N]."""
    return _logits(model, ids_of(text), shift_ln)


def _logits(model: LanguageModel, ids: Sequence[int], shift_ln: np.ndarray | None) -> Tensor:
    with ExitStack() as stack, torch.no_grad():
        for layer, mlp in enumerate(oracle.layers_of(model.model) if shift_ln is not None else []):
            assert shift_ln is not None
            added_n = torch.from_numpy(shift_ln[layer])

            def add(_module: object, _inputs: object, out: Tensor, added_n: Tensor = added_n) -> Tensor:
                changed = out.clone()
                changed[..., -1, :] += added_n
                return changed

            stack.callback(mlp.get_submodule("up_proj").register_forward_hook(add).remove)
        logits: Tensor = model.model(torch.tensor([list(ids)])).logits[0, -1]
        return logits.double()
