"""y = x @ ((codes - zero) * scale).T from packed integers, in PyTorch; and the layout that the kernel reads.

Shapes: x (M, K); codes (N, K) int8 or (N, ceil(K / 128) * 64) uint8; scale (N, G); zero (N, G) int8; y (M, N).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CHUNK", "dequantize", "int_matmul", "pack_codes", "unpack_codes"]

CHUNK = 128  # columns that are packed together, and that one step of the kernel's loop covers


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (out, in) int8 -> the kernel's layout: uint8 (out, ceil(in / 128) * 64) up to 4 bits, int8 above."""
    if bits > 4:
        return codes.contiguous()
    rows, columns = codes.shape
    chunks = -(-columns // CHUNK)
    slots = torch.full((rows, chunks * CHUNK), 8, dtype=torch.uint8, device=codes.device)
    slots[:, :columns] = (codes + 8).to(torch.uint8)
    halves = slots.view(rows, chunks, 2, CHUNK // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).view(rows, chunks * CHUNK // 2)


def unpack_codes(stored: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`: (out, in) int8."""
    if bits > 4:
        return stored
    halves = stored.view(stored.shape[0], -1, CHUNK // 2)
    slots = torch.stack([halves & 15, halves >> 4], dim=2).view(stored.shape[0], -1)
    return slots[:, :columns].to(torch.int8) - 8


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, dtype: torch.dtype
               ) -> Tensor:
    """(N, K) in dtype: (codes - zero) * scale."""
    columns = scale.shape[1] * group_size
    grouped = unpack_codes(codes, bits, columns).to(dtype).view(scale.shape[0], scale.shape[1], group_size)
    if zero is not None:
        grouped = grouped - zero.to(dtype).unsqueeze(-1)
    return (grouped * scale.to(dtype).unsqueeze(-1)).view(scale.shape[0], columns)


def int_matmul(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """y (M, N) in x's dtype, computed in float32."""
    return (x.float() @ dequantize(codes, scale, zero, bits, group_size, torch.float32).T).to(x.dtype)
