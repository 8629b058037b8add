"""int8 codes times int8 codes: the arithmetic of int8_linear.py, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["int8_linear"]

CHUNK = 1024  # inputs whose products sum exactly in float32: 127 * 128 * 1024 < 2^24


def int8_linear(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
                ) -> Tensor:
    total = torch.zeros(a.shape[0], w.shape[0], dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        total += a[:, part].float() @ w[:, part].float().t()
    y = total.float() * a_scale * w_scale.view(1, -1)
    return (y if bias is None else y + bias.float()).to(dtype)
