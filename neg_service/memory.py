"""Memory: how much of it a batch takes, and whether an error says that it ended, from any library.

A batch takes what keeps a processor busy; more would not make it faster. What a row takes says its engine, by an
estimate that no measurement was above (`models/engines/base.py`): errors are rare, and smaller batches follow.

Errors come from Python, NumPy, Arrow, PyTorch, or a library below it. They are known by type where there is one, and by
the words of the libraries where there is none: only the accelerator's own allocator raises PyTorch's class. cuBLAS,
cuDNN and the driver raise plain errors when their handles and workspaces find no room, and so does PyTorch's allocator
on a CPU. What is meant are words of allocators, not all that speaks of memory: an illegal access is none of these.
PyTorch is not imported, so that the driver can ask as well.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# So many rows with a graph keep a CPU busy, and rows without one that take so many bytes: a few hundred of a small
# model. A GPU is busy only with far more.
BUSY_ROWS, BUSY_BYTES, GPU_FACTOR = 128, 512 * 2**20, 8
# What `cluster.batch_tokens`, an old setting, counted a token of a row with a graph as.
OLD_TOKENS = 16

_MEMORY, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_TYPES = {"OutOfMemoryError", "OutOfMemory"}
_WORDS = re.compile(
    r"out[ _]of[ _]memory"  # CUDA, HIP, MPS, XPU, oneDNN; "CUDA error: out of memory" of the driver
    # A handle that cannot be made, for want of memory; elsewhere the same word has other causes.
    r"|CUBLAS_STATUS_NOT_INITIALIZED.*cublas\w*Create"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|ROCBLAS|MIOPEN)\w*_ALLOC_FAILED|CUFFT_ALLOC_FAILED"
    r"|CUDNN_\w*ALLOCATION_FAILED"
    r"|rocblas_status_memory_error|miopenStatusAllocFailed"
    r"|(cuda|hip)ErrorMemoryAllocation|hipErrorOutOfMemory"
    r"|(can(no|')t|could not) allocate memory|not enough memory: you tried to allocate|unable to allocate"
    r"|failed to allocate \S*\d+\S* (\w*bytes|[KMGT]i?B)"
    r"|enforce fail at alloc_cpu"
    r"|std::bad_alloc|bad allocation"
    # What PyTorch says in its place, where memory ended and NVML does not tell how much there is (MIG, containers).
    r"|NVML_SUCCESS == .*CUDACachingAllocator",
    re.IGNORECASE,
)
_ENOUGH = 4000
_OTHER_DEVICE_ERROR = re.compile(r"(CUDA|HIP) error: (?!out of memory)", re.IGNORECASE)


def busy_bytes(row_bytes: int, is_gpu: bool = False) -> int:
    """The memory of a batch that keeps a processor busy; `row_bytes`: of a row of one token with a graph."""
    return (GPU_FACTOR if is_gpu else 1) * max(BUSY_BYTES, BUSY_ROWS * row_bytes)


def available_bytes() -> int | None:
    """What this machine, or the container that this is, can still give without swapping; None where nothing says it."""
    found: list[int] = []
    # Systems that are not Linux have none of these files, a container without a limit no number.
    with suppress(OSError, ValueError, IndexError):
        found.append(1024 * int(_MEMORY.read_text().split("MemAvailable:")[1].split()[0]))
    with suppress(OSError, ValueError, KeyError):
        limit, used = (int((_CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        parts = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
        # Files that were read, such as weights, count as used, and make room when it is wanted.
        found.append(limit - used + int(parts["active_file"]) + int(parts["inactive_file"]))
    return max(0, min(found)) if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory ended."""
    for link in _chain(error):
        if _says_so(link):
            return True
        if _OTHER_DEVICE_ERROR.search(_words_of(link)):
            # The device has failed in another way, and whatever came before is no longer what is wrong.
            return False
    return False


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if _TYPES & {kind.__name__ for kind in type(error).__mro__}:
        return True
    return isinstance(error, Exception) and _WORDS.search(_words_of(error)) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _words_of(error: BaseException) -> str:
    try:
        text = str(error)
    # Its own `__str__` may fail in any way, and end processes with that.
    except BaseException:  # noqa: BLE001
        return ""
    # An exception may hold a whole tensor as text; what allocators say stands at one of its ends.
    return text if len(text) <= 2 * _ENOUGH else f"{text[:_ENOUGH]} {text[-_ENOUGH:]}"
