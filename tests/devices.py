"""Two pretended devices on a machine that has one: tensors with real values that say they lie elsewhere.

They are called `meta:0` and `meta:1`, the only kind of device that PyTorch knows by number everywhere. Values are
computed on the CPU; what is checked is what a second GPU would check: an operation whose tensors lie on different
devices fails, as it does there. It proves that everything is brought to the right place, not that anything is fast, or
that a GPU computes the same numbers.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from neg_service.models import transfer

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

    def data_ptr(self) -> int:
        """Where the values lie, by which tensors are told apart."""
        return self.raw.data_ptr()

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


# What has a GPU's queue run empty, because the CPU needs a value: numbers, and sizes that follow from values.
_OPS = torch.ops.aten
_READS = {
    _OPS._local_scalar_dense.default, _OPS.nonzero.default, _OPS._unique2.default, _OPS.unique_consecutive.default,
    _OPS.masked_select.default, _OPS.equal.default, _OPS.is_nonzero.default, _OPS.bincount.default,
}  # fmt: skip
_INDEXES = {_OPS.index.Tensor, _OPS.index_put.default, _OPS.index_put_.default}
_WAITS: list[list[str]] = []


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """What the CPU waits for on pretended devices, as it would for a GPU: each time the operation, and where it stood.

    A copy waits unless it is told not to; `models/transfer.py` waits once for all that it fetches.
    """
    waits: list[str] = []
    _WAITS.append(waits)
    real = transfer.wait_for

    def wait_for(devices: Iterable[torch.device]) -> None:
        waits.extend(f"wait_for {_caller()}" for device in devices if device.type != "cpu")
        real(devices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "wait_for", wait_for)
        try:
            yield waits
        finally:
            _WAITS.remove(waits)


def _note_wait(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    if not any(isinstance(x, Elsewhere) for x in tensors) and kwargs.get("device") in (None, torch.device("cpu")):
        return
    is_copy = func in (_OPS._to_copy.default, _OPS.copy_.default)
    if is_copy:
        places = {x.device for x in tensors} | ({torch.device(kwargs["device"])} if kwargs.get("device") else set())
        does_wait = len({place.type for place in places}) > 1 and not kwargs.get("non_blocking")
        does_wait = does_wait and not (func is _OPS.copy_.default and len(args) > 2 and args[2])
    else:
        # An index of the CPU is copied first; a mask says how many there are.
        does_wait = func in _READS or (
            func in _INDEXES and any(x.dtype == torch.bool or (x.device.type == "cpu" and x.ndim) for x in tensors[1:])
        )
    if does_wait:
        for waits in _WAITS:
            waits.append(f"{func} {_caller()}")


def _caller() -> str:
    own = [
        frame
        for frame in traceback.extract_stack()
        if "/neg_service/" in frame.filename and "/tests/" not in frame.filename
    ]
    return f"{own[-1].filename.rpartition('/neg_service/')[2]}:{own[-1].lineno}" if own else "-"


@contextmanager
def pretended() -> Iterator[None]:
    """Let `meta:0` and `meta:1` hold values."""
    with _FromData(), _Factories():
        yield


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if _WAITS:
        _note_wait(func, args, kwargs)
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
