"""How much memory a batch may take where nobody says it: what keeps the device busy, if there is room for that.

Asked when a model is loaded and checked. Replicas of a node were each planned with the memory that a batch takes
(`cluster/plan.py`), and Ray starts no more than that leaves room for; what is looked at here is what that plan cannot
see: other programs, a container's limit, and the memory of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from neg_service.memory import available_bytes, busy_bytes
from neg_service.models.language_model import LanguageModel

# Of what is free. The rest is for shared prefixes, results, what libraries work with, and for what is not known.
_SHARE = 0.5


def auto_batch_bytes(model: LanguageModel, gpus: float = 1) -> int:
    """`cluster.batch_bytes=auto`, at least 1; `gpus`: below 1 the share of a GPU that is this replica's."""
    row = model.engine.row_sizes(1)
    is_gpu = model.device.type != "cpu"
    busy = busy_bytes(row.graph + row.slopes, is_gpu)
    # The least of several devices: which of them a batch fills depends on what it is.
    free = [room for device in model.devices if (room := free_bytes(device, gpus)) is not None]
    return max(1, min([busy, *(int(_SHARE * room) for room in free)]))


def free_bytes(
    device: torch.device,
    gpus: float = 1,
    memory: Callable[[torch.device], tuple[int, int]] = torch.cuda.mem_get_info,
    reserved: Callable[[torch.device], int] = torch.cuda.memory_reserved,
    allocated: Callable[[torch.device], int] = torch.cuda.memory_allocated,
) -> int | None:
    """What a device has free for this process, in bytes, with what PyTorch keeps of it; None where nothing says it.

    Of a GPU that others share, no more than is left of this one's share: they may not have begun.
    """
    if device.type == "cuda":
        free, whole = memory(device)
        cached = reserved(device) - allocated(device)
        return max(0, min(free + cached, int(min(1, gpus) * whole) - allocated(device)))
    # MPS works in the machine's memory.
    return available_bytes() if device.type in ("cpu", "mps") else None
