"""Checks at the door of an op: a wrong dtype, shape, device or group is an error, never a wrong number.

Every check raises ValueError with the name, what was given and what was expected. They read only metadata, so they run
under tracing as well, and cost a few microseconds, none under a replayed CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["HALVES", "activations", "group", "one_of", "tensor"]

HALVES = (torch.float16, torch.bfloat16)


def tensor(name: str, given: Tensor, dtypes: torch.dtype | Iterable[torch.dtype], shape: tuple[int | None, ...],
           like: Tensor | None = None, contiguous: bool = True) -> None:
    """`given` has one of the dtypes, the shape (None: any length), the device of `like`, and dense rows if asked."""
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    fits = given.dim() == len(shape) and all(w is None or s == w for s, w in zip(given.shape, shape, strict=True))
    if given.dtype not in allowed or not fits:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} is {str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}; expected {names} "
                         f"({wanted})")
    if like is not None and given.device != like.device:
        raise ValueError(f"{name} is on {given.device}; expected {like.device}, where the other arguments are")
    if contiguous and not given.is_contiguous():
        raise ValueError(f"{name} has strides {given.stride()} for {tuple(given.shape)}; expected it contiguous")


def activations(x: Tensor, columns: int) -> None:
    """x is (M, columns), float16 or bfloat16, rows of any stride with contiguous elements."""
    tensor("x", x, HALVES, (None, columns), contiguous=False)
    if x.shape[0] > 0 and x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"x has strides {x.stride()}; expected its rows contiguous (a last stride of 1)")


def group(size: int, columns: int, allowed: Iterable[int]) -> None:
    """`size` columns share a scale: one of `allowed` that divides `columns`, or -1 for a whole row."""
    if size == -1:
        return
    if size not in allowed:
        raise ValueError(f"group_size is {size}; expected one of {sorted(allowed)}, or -1 for one scale a row")
    if columns % size:
        raise ValueError(f"group_size is {size} for {columns} columns; expected a size that divides them, or -1")


def one_of(name: str, given: object, allowed: Iterable[object]) -> None:
    choices = list(allowed)
    if given not in choices:
        raise ValueError(f"{name} is {given!r}; expected one of {choices}")
