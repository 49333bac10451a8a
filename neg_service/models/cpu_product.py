"""Chooses what multiplies a float32 model's matrices on a CPU, by a measurement: PyTorch's own way, or oneDNN.

PyTorch gives products in float32 to MKL, which on AMD processors with AVX-512 leaves much of their speed unused;
oneDNN does not ask who made the processor. But it is called in a way that PyTorch does not promise (`onednn.py`), and
how much it gains is another matter on every processor. So it is trusted only as far as it is measured: when a model is
loaded, on the model's own weights, its time, and its error beside float64, forward and backward. Where it is missing,
wrong or not clearly faster, PyTorch's own way is taken, and the log says why. The self-check then compares its numbers
with those of a plain pass.

Axes: R rows, O features out, I features in.
"""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neg_service.errors import ConfigurationError
from neg_service.memory import BUSY_ROWS
from neg_service.models.onednn import raw_linear, use_onednn, weight_of

log = logging.getLogger(__name__)

PRODUCTS = ("auto", "torch", "onednn")
# What oneDNN has to gain before it is taken, of the time of all products.
_LEAST_GAIN = 1.3
# So many times PyTorch's own error are still float32's noise; a wrong product is off by far more.
_MOST_ERROR = 4.0
# How many of the model's shapes are timed, on how much of a weight, in how many rounds of each of two series: a quarter
# of a second for all.
_SHAPES, _VALUES, _ROUNDS = 4, 2**20, 2
# So many features are compared with float64.
_COMPARED = 32


@dataclass(frozen=True)
class CpuProduct:
    """What multiplies, and why.

    name: `torch` or `onednn`. gain: PyTorch's seconds over oneDNN's, on the model's own weights. error, torch_error:
    root mean square of oneDNN's and PyTorch's deviations from float64, relative to the products', the worse of forward
    and backward. None where nothing was measured.
    """

    name: str
    reason: str
    gain: float | None = None
    error: float | None = None
    torch_error: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether oneDNN was measured, and its results are as good as float32's noise."""
        return self.error is not None and self.torch_error is not None and self.error <= _MOST_ERROR * self.torch_error

    def as_dict(self) -> dict[str, Any]:
        """For `run.json`: without what was not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def choose_product(model: nn.Module, asked: str = "auto") -> CpuProduct | None:
    """Choose for a loaded model, and let it multiply so; None where there is no choice: a GPU, another precision.

    asked: `model.cpu_product`. With `auto`, oneDNN is taken on AMD processors where it is clearly faster; with `onednn`
    wherever its results are right.
    """
    weights_oi = [weight.detach() for module in model.modules() if (weight := weight_of(module)) is not None]
    if not weights_oi:
        return None
    found = _chosen(weights_oi, asked)
    is_refused = asked == "onednn" and found.name != asked
    log.log(logging.WARNING if is_refused else logging.INFO, "matrix products on the CPU: %s", described(found))
    use_onednn(model, found.name == "onednn")
    return found


def require_known_product(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        ConfigurationError: naming the setting.
    """
    if name not in PRODUCTS:
        raise ConfigurationError(setting="model.cpu_product", value=name, allowed=f"one of {', '.join(PRODUCTS)}")


def described(found: CpuProduct) -> str:
    """For a person, in one line."""
    text = f"{found.name}, {found.reason}"
    if found.gain is None:
        return text
    return f"{text} (oneDNN {found.gain:.2f} times as fast, error {found.error:.1e}, PyTorch's {found.torch_error:.1e})"


def _chosen(weights_oi: Sequence[Tensor], asked: str) -> CpuProduct:
    if asked == "torch":
        return CpuProduct("torch", "asked for")
    if asked == "auto" and (vendor := processor_vendor()) != "AuthenticAMD":
        return CpuProduct("torch", f"no processor of AMD ({vendor or 'its maker is not known'})")
    if lacking := _lacking():
        return CpuProduct("torch", f"oneDNN cannot be used: {lacking}")
    try:
        gain, error, torch_error = measure(weights_oi)
    except (RuntimeError, TypeError, NotImplementedError) as refusal:
        # The operator is private: another release may have changed it, or take other arguments.
        return CpuProduct("torch", f"oneDNN cannot be used: {str(refusal).splitlines()[0]}")
    found = partial(CpuProduct, gain=gain, error=error, torch_error=torch_error)
    if not found("onednn", "").is_right:
        return found("torch", f"oneDNN's error is more than {_MOST_ERROR:g} times PyTorch's")
    if asked == "onednn":
        return found("onednn", "asked for")
    if gain < _LEAST_GAIN:
        return found("torch", f"oneDNN is less than {_LEAST_GAIN:g} times as fast")
    return found("onednn", "measured to be faster")


def _lacking() -> str | None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this PyTorch is built without it"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"PyTorch {torch.__version__} does not offer it"
    return None


def processor_vendor() -> str:
    """`AuthenticAMD`, `GenuineIntel` or another maker's name for itself; empty where nothing says it."""
    if sys.platform == "linux":
        with suppress(OSError, IndexError):
            line = Path("/proc/cpuinfo").read_text().split("vendor_id", 1)[1].split("\n", 1)[0]
            return line.strip(" \t:")
        return ""
    # Elsewhere this text ends with it, if it says it at all.
    return next((name for name in ("AuthenticAMD", "GenuineIntel") if name in platform.processor()), "")


def measure(weights_oi: Sequence[Tensor]) -> tuple[float, float, float]:
    """oneDNN beside PyTorch on these weights [O, I], forward and backward.

    Returns:
        How many times as fast it is; its error and PyTorch's own, as `CpuProduct` has them.

    Other work on the machine must not decide: what is compared are the seconds that one thread computed, the least of
    interleaved runs, in two series of which the lower gain counts. With several threads, which wait for each other, a
    busy machine made oneDNN 0.9 to 1.9 times as fast, where it was 0.7 each time with one.
    """
    with _one_thread():
        return _measured(weights_oi)


def _measured(weights_oi: Sequence[Tensor]) -> tuple[float, float, float]:
    # Where a clock is too coarse for a small model, its two times are equal.
    tick = time.get_clock_info("thread_time").resolution
    times = [[tick, tick], [tick, tick]]
    error = torch_error = 0.0
    for weight_oi, count in _shapes(weights_oi):
        draw = torch.Generator().manual_seed(0)
        for own in (weight_oi, weight_oi.T):
            x_ri = torch.randn(BUSY_ROWS, own.shape[1], generator=draw)
            ways = (partial(nn.functional.linear, x_ri, own), partial(raw_linear, x_ri, own))
            exact = x_ri.double() @ own[:_COMPARED].double().T
            plain_error, own_error = (_relative_error(way()[:, :_COMPARED], exact) for way in ways)
            error, torch_error = max(error, own_error), max(torch_error, plain_error)
            for series in times:
                fastest = _fastest(ways)
                for place, seconds in enumerate(fastest):
                    series[place] += count * seconds
    return min(plain / own for plain, own in times), error, torch_error


def _shapes(weights_oi: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """One weight of each shape and layout, cut where it is large, with the work that it stands for; the most first."""
    work: Counter[tuple[Any, ...]] = Counter()
    first: dict[tuple[Any, ...], Tensor] = {}
    for own in weights_oi:
        key = (own.shape, own.stride())
        work[key] += own.numel()
        first.setdefault(key, own)
    cut = {key: own[: max(_COMPARED, _VALUES // own.shape[1])] for key, own in first.items()}
    return [(cut[key], max(1, work[key] // cut[key].numel())) for key, _ in work.most_common(_SHAPES)]


def _relative_error(found: Tensor, exact: Tensor) -> float:
    error = float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    # Not a number is no small error.
    return error if error == error else float("inf")


def _fastest(ways: tuple[Callable[[], Tensor], ...]) -> list[float]:
    """Seconds that this thread computed, of each way, the least of a few rounds in which they take turns."""
    seconds = [float("inf")] * len(ways)
    for _ in range(_ROUNDS):
        for place, way in enumerate(ways):
            began = time.thread_time()
            way()
            seconds[place] = min(seconds[place], time.thread_time() - began)
    return seconds


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
