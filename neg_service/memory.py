"""Whether an error says that memory ended, whoever raised it: Python, NumPy, Arrow, PyTorch, or a library below it.

By type where there is one, and by the words of the libraries where there is none: only the accelerator's own allocator
raises PyTorch's class. cuBLAS, cuDNN and the driver raise plain errors when their handles and workspaces find no room,
and so does PyTorch's allocator on a CPU. What is meant are words of allocators, not all that speaks of memory: an
illegal access is none of these. PyTorch is not imported, so that the driver can ask as well.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

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
    r"|std::bad_alloc|bad allocation",
    re.IGNORECASE,
)
_ENOUGH = 4000
_OTHER_DEVICE_ERROR = re.compile(r"(CUDA|HIP) error: (?!out of memory)", re.IGNORECASE)


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
    # Its own `__str__` may fail in any way.
    except Exception:  # noqa: BLE001
        return ""
    # An exception may hold a whole tensor as text; what allocators say stands at one of its ends.
    return text if len(text) <= 2 * _ENOUGH else f"{text[:_ENOUGH]} {text[-_ENOUGH:]}"
