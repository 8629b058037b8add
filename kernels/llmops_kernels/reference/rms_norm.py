"""RMSNorm with residual addition and quantization: the arithmetic of rms_norm.py, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize_tokens import quantize_tokens

__all__ = ["add_rms_norm", "add_rms_norm_quantize", "rms_norm_quantize"]


def _normed(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32 (M, K)."""
    v = h.float()
    return v * (1.0 / torch.sqrt(v.square().mean(-1, keepdim=True) + eps)) * weight.float()


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, group_size: int
                      ) -> tuple[Tensor, Tensor]:
    return quantize_tokens(_normed(x, weight, eps), dtype, group_size)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = (x.float() + residual.float()).to(x.dtype).contiguous()
    return _normed(h, weight, eps).to(x.dtype), h


def add_rms_norm_quantize(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, group_size: int
                          ) -> tuple[Tensor, Tensor, Tensor]:
    h = (x.float() + residual.float()).to(x.dtype).contiguous()
    return (*rms_norm_quantize(h, weight, eps, dtype, group_size), h)
