"""What the tests of the KV cache's ops have in common: a poisoned cache, and vectors with something in them."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}


def empty_cache(B: int, H: int, N: int, D: int, format: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of keys and values, full of the worst there is: NaN where the type has it."""
    width, numbers = (D // 2, 2) if format == "int4" else (D, 1)
    codes = [torch.full((B, H, N, width), 127, dtype=torch.uint8).view(TYPES[format]) for _ in range(2)]
    scales = [torch.full((B, H, N, numbers), float("nan"), dtype=torch.bfloat16) for _ in range(2)]
    return codes[0], scales[0], codes[1], scales[1]


def vectors(seed: int, B: int, H: int, T: int, D: int, dtype: torch.dtype) -> Tensor:
    """(B, H, T, D) with scales over three decades, a loud channel, and a vector of zeros; strided as a model has it."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, H, D, generator=made) * torch.exp(torch.empty(B, T, H, 1).uniform_(-4, 3, generator=made))
    x[..., 3] *= 20
    x[0, 0, 0] = 0
    return x.to(dtype).transpose(1, 2)
