"""Owns telling one error of the device from another: memory that ran out, a device that is lost, all the rest.

Must not know sessions, turns or processes.
"""

from __future__ import annotations

import torch

# How torch's CPU allocator, oneDNN and C++ say it; none of them has an exception of its own.
_OUT_OF_MEMORY = ("can't allocate memory", "could not create a memory", "bad_alloc", "out of memory")
# All that oneDNN says where there was none for the code that it generates, or for what that needs while it runs. (Where
# an operation is not supported it says more: "... primitive descriptor for the matmul primitive".)
_NO_MEMORY_FOR_CODE = ("could not create a primitive", "could not execute a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out: the work may be tried again with more of it free."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower().strip()
    found = said in _NO_MEMORY_FOR_CODE or any(words in said for words in _OUT_OF_MEMORY)
    return found and isinstance(error, RuntimeError)


def is_usable(device: torch.device) -> bool:
    """Whether the device still computes. After a CUDA fault every call of the process fails, until it ends (CUDA C++
    Programming Guide, "Error Checking": sticky errors).
    """
    if device.type != "cuda":
        return True
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return is_out_of_memory(error)
    return True


def release_unused(device: torch.device) -> None:
    """Give memory that torch keeps for reuse back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
