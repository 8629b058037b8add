"""The rows of a weight a few at a time, where none hangs on another.

What a search makes on its way is then as large as a slab and not as the weight: it stays in a cache, and the C library
hands out the same few pieces of memory again instead of large ones that leave gaps between what lives on.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["MOST", "slabs"]

MOST = 1 << 20  # bytes of a slab in float32
_EVEN = 16  # rows that a slab has a multiple of, so that vector instructions meet the same rows


def slabs(W: Tensor, most: int | None = None) -> Iterator[slice]:
    """Slices of the rows of W (rows, ...) that take up to `most` (MOST) bytes in float32, 16 rows at least."""
    rows = max(_EVEN, (MOST if most is None else most) // (4 * max(1, W[:1].numel())) // _EVEN * _EVEN)
    return (slice(first, first + rows) for first in range(0, len(W), rows))
