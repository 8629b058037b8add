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
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

__all__ = ["APART", "LEAST", "give_back", "keeping", "shelved", "sparing"]

#: Bytes under which a tensor is not worth a file.
LEAST = 1 << 18
#: Bytes from which on a tensor of a large block has pages of its own.
APART = 1 << 22
_TRIM, _MAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_MOST_MAPPED = 32 << 20  # the most that the second may be


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


@contextmanager
def keeping(most: int = 1 << 30) -> Iterator[None]:
    """Within, the C library keeps up to `most` bytes of freed memory; after, they are given back (glibc alone).

    Activations are made and freed layer after layer. By default what is freed at the heap's end goes to the system and
    comes back page by page, zeroed: a fifth of a calibration walk's time on a CPU. The limits are left where glibc's
    own growing ones end (32 and 64 MiB).
    """
    _limit(_MAP, _MOST_MAPPED)
    _limit(_TRIM, most)
    try:
        yield
    finally:
        _limit(_TRIM, 2 * _MOST_MAPPED)
        give_back()


@contextmanager
def sparing() -> Iterator[None]:
    """Within, tensors of `APART` bytes and more get pages of their own, which go back when they do (glibc alone).

    For the time that a large block is worked on: out of the heap, layers and Hessians of a few MiB would leave gaps
    between what lives on, several blocks of them. Smaller tensors still come from the heap: of those there are
    thousands, and zeroing their pages every time takes up to as long as the work. Leaves the limit as `keeping` does.
    """
    _limit(_MAP, APART)
    try:
        yield
    finally:
        _limit(_MAP, _MOST_MAPPED)


def _limit(which: int, value: int) -> None:
    """One of malloc's limits, where the C library has them (glibc alone)."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).mallopt(which, value)
