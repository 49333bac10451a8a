"""Another precision for a moment: exact, in pieces where weights are large, and undone without a trace."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neg_service.models import precision
from neg_service.models.precision import in_precision
from tests.families import model_of, random_ids
from tests.rare import one_of
from tests.tiny_models import FAMILIES, tiny_model


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


@pytest.mark.parametrize("family", one_of(4, FAMILIES))
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


def test_another_precision_leaves_no_trace() -> None:
    model = tiny_model("Gemma 2").model
    before = {name: (t, t.data_ptr(), t.dtype) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    ids = torch.tensor([[3, 1, 4]])
    plain = model(ids).logits
    with in_precision(model, model.model.layers, torch.float64):
        exact = model(ids).logits
        assert exact.dtype == torch.float64
        assert {p.dtype for p in model.model.layers[0].parameters()} == {torch.float32}
    assert not torch.equal(exact.float(), plain)
    torch.testing.assert_close(exact.float(), plain)

    def stop(*_: Any) -> None:
        raise ValueError("stop")

    handle = model.model.layers[1].mlp.register_forward_hook(stop)
    with pytest.raises(ValueError, match="stop"), in_precision(model, model.model.layers, torch.float64):
        model(ids)
    handle.remove()
    gc.collect()
    assert {
        name: (t, t.data_ptr(), t.dtype) for name, t in [*model.named_parameters(), *model.named_buffers()]
    } == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert torch.equal(model(ids).logits, plain)


def test_float64_in_a_moment_is_truly_float64() -> None:
    # A norm that casts to float32 on its own would leave 1e-8 here.
    model = tiny_model("Llama 2").model
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    seen: list[torch.Tensor] = []
    with in_precision(model, model.model.layers, torch.float64):
        handle = model.model.norm.register_forward_hook(lambda _m, i, out: seen.extend((i[0], out)))
        model(ids)
        handle.remove()
        x, found = seen
        expected = x / (x.square().mean(-1, keepdim=True) + model.model.norm.variance_epsilon).sqrt()
        torch.testing.assert_close(found, expected * model.model.norm.weight, rtol=1e-13, atol=0)
