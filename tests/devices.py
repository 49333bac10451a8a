"""Two pretended devices on a machine that has one: tensors with real values that say they lie elsewhere.

They are called `meta:0` and `meta:1`, the only kind of device that PyTorch knows by number everywhere. Values are
computed on the CPU; what is checked is what a second GPU would check: an operation whose tensors lie on different
devices fails, as it does there. It proves that everything is brought to the right place, not that anything is fast, or
that a GPU computes the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICES = "meta:0,meta:1"


class Elsewhere(Tensor):
    """A tensor that says it lies on a pretended device; `raw` holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, device: torch.device) -> Elsewhere:
        """Wrap a tensor of the CPU."""
        assert type(raw) is Tensor
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device
        )
        made.raw = raw
        return made

    @property
    def data(self) -> Tensor:
        """The same values, without history."""
        return self.detach()

    @data.setter
    def data(self, new: Elsewhere) -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.raw = new.raw

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation where its tensors lie."""
        return _run(func, args, dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """What is made on a pretended device, or moved there from the CPU, has no tensor there to begin with."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _FromData(TorchFunctionMode):
    """`torch.tensor`, and an index that is a list, would lose their data on such a device before anybody saw them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.__getitem__:
            x, index = args
            parts = index if isinstance(index, tuple) else (index,)
            args = (x, tuple(torch.tensor(part) if isinstance(part, list | range) else part for part in parts))
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[None]:
    """Let `meta:0` and `meta:1` hold values."""
    with _FromData(), _Factories():
        yield


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    asked = kwargs.pop("device", None)
    # As on GPUs: numbers on the CPU go anywhere, and so do indices.
    may_mix = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
    place = {x.device for x in tensors if x.ndim and not (may_mix and x.dtype == torch.long and x.device.type == "cpu")}
    place = place or {x.device for x in tensors}
    is_move = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if len(place) > 1 and not is_move:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found {sorted(map(str, place))}"
        )
    target = torch.device(asked) if asked is not None else (tensors[0].device if is_move else next(iter(place), None))
    found = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    known = {id(_raw(x)): x for x in tensors}

    def put(x: Any) -> Any:
        if not isinstance(x, Tensor) or target is None or target.type == "cpu":
            return x
        # What was changed in place stays the same tensor.
        return known[id(x)] if id(x) in known else Elsewhere(x, target)

    return tree_map(put, found)


def _raw(x: Any) -> Any:
    return x.raw if isinstance(x, Elsewhere) else x
