"""E4M3 codes times E4M3 codes: the arithmetic of fp8_linear.py, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["fp8_linear"]

SIDE = 128


def fp8_linear(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
               ) -> Tensor:
    rows, columns = w.shape
    wide_a, wide_w = a.float(), w.float()
    if tuple(w_scale.shape) not in ((1,), (rows, 1)):
        wide_a = wide_a * a_scale.repeat_interleave(SIDE, 1)[:, :columns]
        wide_w = wide_w * w_scale.repeat_interleave(SIDE, 0)[:rows].repeat_interleave(SIDE, 1)[:, :columns]
        y = F.linear(wide_a, wide_w)
    else:
        y = F.linear(wide_a, wide_w) * a_scale * w_scale.view(1, -1)
    return (y if bias is None else y + bias.float()).to(dtype)
