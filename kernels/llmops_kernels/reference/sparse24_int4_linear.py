"""2:4 weights of four bits: how they are packed and unpacked, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import sparse24_linear

__all__ = ["GROUP", "pack", "unpack"]

GROUP = 128  # columns that share a scale where a row has several


def pack(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(two codes a byte (N, K / 4) uint8, places) of codes (N, K) int8, -8 to 7, that are 2:4."""
    if codes.dim() != 2 or codes.dtype != torch.int8 or codes.shape[1] % 4:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}; expected (N, K) int8 with K a multiple of 4")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"codes reach {int(codes.min())} to {int(codes.max())}; four bits hold -8 to 7")
    rows, columns = codes.shape
    if tuple(scale.shape) not in ((rows, 1), (rows, -(-columns // GROUP))):
        raise ValueError(f"scale is {tuple(scale.shape)}; expected ({rows}, 1) or ({rows}, {-(-columns // GROUP)})")
    values, places = sparse24_linear.pack(codes.to(torch.float16))
    pairs = values.view(rows, columns // 4, 2).to(torch.int8).view(torch.uint8) & 15
    return pairs[..., 0] | pairs[..., 1] << 4, places


def unpack(codes: Tensor, places: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weight (N, K) in `dtype`, rounded once."""
    pairs = torch.stack([codes & 15, codes >> 4], -1).to(torch.int8)
    signed = pairs - 16 * (pairs > 7).to(torch.int8)
    dense = sparse24_linear.unpack(signed.view(codes.shape[0], -1).to(torch.float16), places).float()
    columns = dense.shape[1]
    wide = scale.float() if scale.shape[1] == 1 else scale.float().repeat_interleave(GROUP, 1)[:, :columns]
    return (dense * wide).to(dtype)
