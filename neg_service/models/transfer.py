"""Between the CPU and an accelerator with as few waits as can be.

An accelerator works through a queue that the CPU fills. Whenever the CPU waits for a number the queue runs empty, and
the accelerator is idle until it is filled again. So results of a batch are fetched together, and what is sent is sent
without waiting. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, behind whatever the device has to do.

    The original may be written to at once, unless it is pinned, as what `fetched` gives.
    """
    # From memory that is not pinned drivers make a copy before they return.
    return x.to(device, non_blocking=True)


def indices(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers on a device: an index of one there, where a list or a tensor of the CPU would have it wait."""
    return sent(torch.tensor(values, dtype=torch.long), device)


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the CPU, with one wait for all of them; those that lie there already as they are."""
    found = []
    for x in tensors:
        if x.device.type == "cpu":
            found.append(x)
            continue
        # Only into pinned memory a GPU copies on its own; PyTorch keeps such memory and uses it again.
        on_cpu = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        found.append(on_cpu.copy_(x, non_blocking=True))
    wait_for({x.device for x in tensors})
    return found


def wait_for(devices: Iterable[torch.device]) -> None:
    """Wait until devices have done what they were told so far; a CPU always has."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        elif device.type == "xpu":
            torch.xpu.current_stream(device).synchronize()
        elif device.type == "mps":
            torch.mps.synchronize()
