"""Classify errors of the device: memory ran out, the device is lost, or any other error."""

from __future__ import annotations

import torch

# Parts of messages, in lower case, with which a RuntimeError is raised when memory runs out: by torch's CPU allocator,
# oneDNN and C++; by CUDA's calls outside torch's allocator, e.g. for pinned memory; by cuBLAS and cuDNN for their own
# memory. cuBLAS reports "not initialized" if there is no memory for a handle.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "could not create a memory",
    "bad_alloc",
    "out of memory",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    "cudnn_status_internal_error_host_allocation_failed",
)
# The whole message of oneDNN when memory for generated code, or for its execution, runs out. For an unsupported
# operation the message is longer: "... primitive descriptor for the matmul primitive".
_NO_MEMORY_FOR_CODE = ("could not create a primitive", "could not execute a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, so that the work may succeed once more of it is free."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower().strip()
    matches = message in _NO_MEMORY_FOR_CODE or any(words in message for words in _OUT_OF_MEMORY)
    return matches and isinstance(error, RuntimeError)


def raise_if_device_lost(error: Exception, device: torch.device) -> None:
    """Raise `error` if the device no longer computes.

    After a CUDA fault every call of the process fails until it exits (CUDA C++ Programming Guide, "Error Checking":
    sticky errors).
    """
    if not is_usable(device):
        raise error


def is_usable(device: torch.device) -> bool:
    """Return whether the device still computes. Always True for a CPU."""
    if device.type != "cuda":
        return True
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return is_out_of_memory(error)
    return True


def release_unused(device: torch.device) -> None:
    """Return the memory that torch caches for reuse to the device. Does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """Return type and first line of an error, for a log line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
