"""Activations to int8 or fp8 by token: the arithmetic of quantize_tokens.py, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["quantize_tokens"]

LEAST = 2.0**-80


def quantize_tokens(x: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    """(codes (M, K), scales (M, 1) or (M, ceil(K / 128)) float32). The last group of a token may be short."""
    tokens, columns = x.shape
    size = columns if group_size == -1 else group_size
    groups = max(1, -(-columns // size)) if columns else (1 if group_size == -1 else 0)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=dtype, device=x.device), x.new_ones(tokens, groups, dtype=torch.float32)
    rest = groups * size - columns
    parts = torch.nn.functional.pad(x.float(), (0, rest)).view(tokens, groups, size)
    top = parts.abs().amax(-1, keepdim=True)
    if dtype == torch.int8:
        scale = top.clamp(min=LEAST) / 127.0
        codes = (parts / scale).round_().to(torch.int8)
    else:
        scale = torch.where(top == 0, 1.0, top.clamp(min=LEAST) / 448.0)
        codes = (parts / scale).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes.view(tokens, -1)[:, :columns].contiguous(), scale.squeeze(-1)
