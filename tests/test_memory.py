"""What says that memory ended, and what only speaks of memory."""

from __future__ import annotations

import errno

import numpy as np
import pyarrow as pa
import pytest
import torch

from neg_service.errors import DoesNotFit
from neg_service.memory import is_out_of_memory

_TEXTS = [
    "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 79.15 GiB total capacity)",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k, &alpha, a, lda)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "HIP error: out of memory",
    "MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 1.3 GB, max allowed: 9.07 GB)",
    "XPU out of memory. Tried to allocate 1.00 GiB",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4294967296 bytes. Error code 12 (Cannot allocate memory)",
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes.",
    "unable to mmap 4096 bytes from file </x>: Cannot allocate memory (12)",
    "std::bad_alloc",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "could not create a primitive: out_of_memory",
    "hipErrorMemoryAllocation: out of resources",
    "could not allocate memory for a workspace",
    "Failed to allocate 1048576 bytes",
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1131, please report a bug',
]


@pytest.mark.parametrize("text", _TEXTS)
def test_the_words_of_allocators_are_known(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("f4")),
        pa.ArrowMemoryError("malloc of size 64 failed"),
        torch.OutOfMemoryError("x"),
        torch.cuda.OutOfMemoryError("x"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        DoesNotFit("prompt 'a'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_types_are_known_whatever_they_say(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: misaligned address"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        RuntimeError("expected memory format contiguous"),
        RuntimeError('expandable_segment_ INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":9'),
        RuntimeError("shared memory object is not available"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("prompt 'memory' is empty"),
    ],
    ids=str,
)
def test_not_all_that_speaks_of_memory_says_that_it_ended(error: Exception) -> None:
    assert not is_out_of_memory(error)


def raised(error: Exception, first: Exception, *, of: bool) -> Exception:
    """An error as it comes, raised from another one or while that is handled."""
    if of:
        error.__cause__ = first
    error.__context__ = first
    return error


@pytest.mark.parametrize("of", [True, False])
def test_an_error_that_another_was_raised_from_counts_unless_the_device_failed_after_it(of: bool) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(raised(RuntimeError("the pass failed"), full, of=of))
    assert is_out_of_memory(raised(RuntimeError("again"), raised(ValueError("the pass failed"), full, of=of), of=of))
    assert not is_out_of_memory(raised(RuntimeError("CUDA error: an illegal memory access"), full, of=of))
    assert not is_out_of_memory(raised(RuntimeError("the pass failed"), ValueError("x"), of=of))


def test_an_error_whose_history_was_taken_off_stands_for_itself() -> None:
    error = raised(RuntimeError("the pass failed"), MemoryError(), of=False)
    assert is_out_of_memory(error)
    error.__suppress_context__ = True
    assert not is_out_of_memory(error)


def test_what_allocators_of_this_machine_really_say_is_known() -> None:
    for allocate in (
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: np.empty(2**60, dtype=np.uint8),
        lambda: bytearray(2**60),
        lambda: pa.allocate_buffer(2**60),
    ):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value), caught.value


def test_a_text_without_end_is_looked_at_where_it_begins_and_ends() -> None:
    assert not is_out_of_memory(ValueError("x" * 10**8))
    assert is_out_of_memory(RuntimeError("x" * 10**6 + " CUDA out of memory"))
