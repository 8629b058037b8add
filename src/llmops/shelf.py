"""A shelf on the disk for tensors that are done with for now: they take address space, and memory only when read.

A walk through a model changes one decoder block at a time. A changed block that stayed in memory would make the peak
grow with the model; so it is written to a scratch file, and the file is mapped in its place. Reading it later brings
pages in, as reading the checkpoint does, and the system drops them again when it needs room. Writing to such a tensor
changes memory, never the file. The file has no name any more as soon as it is mapped: it goes when the tensor does, or
the process. Scratch files lie where Python's `tempfile` puts them (TMPDIR); on a file system in memory nothing is
gained and nothing lost.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["LEAST", "give_back", "shelved"]

#: Bytes under which a tensor is not worth a file.
LEAST = 1 << 16


def shelved(tensor: Tensor) -> Tensor:
    """The same values, mapped from a scratch file; the tensor itself when it is small or not on the CPU."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < LEAST:
        return tensor
    handle, path = tempfile.mkstemp(prefix="llmops-shelf-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(tensor.detach().contiguous().view(torch.uint8).numpy().data)
        storage = torch.UntypedStorage.from_file(path, False, size)
    finally:
        with suppress(OSError):  # where an open file cannot be unlinked, it stays for the system's cleaning
            os.unlink(path)
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)


def give_back() -> None:
    """Ask the C library to return freed memory to the system: between what lives on, it would keep it (glibc alone)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
