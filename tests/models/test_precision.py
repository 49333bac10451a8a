"""Another precision for a moment: large weights are converted in pieces, and give what whole ones give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neg_service.models import precision
from neg_service.models.precision import in_precision
from tests.families import model_of, random_ids
from tests.tiny_models import FAMILIES


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The shapes of all that is converted to another precision."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(found.shape)
        return found


def logits_of(family: str, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> tuple[torch.Tensor, list[torch.Size]]:
    """Logits in float64 of a few tokens, and what was converted for them."""
    monkeypatch.setattr(precision, "PIECE_BYTES", piece_bytes)
    model = model_of(family)
    ids = torch.tensor(random_ids([5], model.is_masked))
    with _Copies() as copies, torch.no_grad(), in_precision(model.model, model.feed_forward.layers, torch.float64):
        return model.model(ids).logits, copies.shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_large_weights_are_never_converted_whole_and_change_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = model_of(family).model.get_input_embeddings().weight.shape
    whole, converted = logits_of(family, monkeypatch, 2**30)
    assert shape in converted
    # Pieces of seven rows, of which the last is shorter.
    in_pieces, converted = logits_of(family, monkeypatch, 7 * shape[1] * 8)
    assert shape not in converted
    assert in_pieces.dtype == torch.float64
    torch.testing.assert_close(in_pieces, whole, rtol=1e-12, atol=1e-12)
