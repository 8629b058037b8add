"""`kv_append` and `kv_rope_append` in PyTorch: what the kernels have to give, on any device and in any floating type.

The numbers are those of `llmops.methods.quantize.kv`: scales rounded to bfloat16 before the codes are computed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["dequantize", "kv_append", "kv_rope_append", "quantize", "rotation"]


def quantize(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """(codes (..., D) or (..., D/2), scales (..., 1) or (..., 2) bfloat16) of x (..., D)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if format == "int4":
        x = x @ rotation(x.shape[-1], x.device, x.dtype)
        least = x.amin(-1, keepdim=True).to(torch.bfloat16)
        scale = ((x.amax(-1, keepdim=True) - least).clamp_min(0) / 15).to(torch.bfloat16)
        codes = ((x - least) / _divisor(scale)).round().clamp(0, 15).to(torch.uint8)
        low, high = codes.chunk(2, -1)
        return low | (high << 4), torch.cat([scale, least], -1)
    top = 127 if format == "int8" else 448
    scale = (x.abs().amax(-1, keepdim=True) / top).to(torch.bfloat16)
    scaled = x / _divisor(scale)
    if format == "int8":
        return scaled.round().clamp(-127, 127).to(torch.int8), scale
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn), scale


def dequantize(codes: Tensor, scales: Tensor, format: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., D): computed in float32 (float64 for that), then rounded to `dtype`; 4 bits are turned back after that."""
    wide = torch.promote_types(dtype, torch.float32)
    if format != "int4":
        return (codes.to(wide) * scales.to(wide)).to(dtype)
    both = torch.cat([codes & 15, codes >> 4], -1).to(wide)
    dense = (both * scales[..., :1].to(wide) + scales[..., 1:].to(wide)).to(dtype)
    return dense @ rotation(dense.shape[-1], dense.device, dtype).T


@cache
def rotation(width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """R (width, width) of `_kv.py`; width a power of two."""
    with torch.inference_mode(False):
        i = torch.arange(width)
        power = sum((((i[:, None] & i) >> bit) & 1 for bit in range(9)), torch.zeros(width, width))
        signs = sum((((i & (i >> 1)) >> bit) & 1 for bit in range(9)), torch.zeros(width))
        return ((1.0 - 2.0 * ((power + signs[:, None]) % 2)).double() / width ** 0.5).to(device, dtype)


def kv_append(key: Tensor, value: Tensor, k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor,
              start: Tensor, format: str) -> None:
    """See `llmops_kernels/kv_append.py`."""
    B, T = key.shape[0], key.shape[2]
    place = start.view(-1, 1).to(torch.int64) + torch.arange(T, device=start.device)  # (B or 1, T)
    for x, codes, scales in ((key, k_codes, k_scales), (value, v_codes, v_scales)):
        new = quantize(x, format)
        for held, numbers in zip((codes, scales), new, strict=True):
            _scatter(held, numbers, place.expand(B, T))


def _scatter(held: Tensor, new: Tensor, place: Tensor) -> None:
    """held (B, H, N, W) at place (B, T) of each batch row becomes new (B, H, T, W); beyond N nothing does."""
    if held.dtype == torch.float8_e4m3fn:  # index_put knows no E4M3
        held, new = held.view(torch.int8), new.view(torch.int8)
    here = (place >= 0) & (place < held.shape[2])
    rows = torch.arange(len(place), device=place.device)[:, None].expand_as(place)
    held[rows[here], :, place[here]] = new.transpose(1, 2)[here]


def kv_rope_append(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, k_codes: Tensor,
                   k_scales: Tensor, v_codes: Tensor, v_scales: Tensor, start: Tensor, format: str) -> Tensor:
    """See `llmops_kernels/kv_append.py`."""
    wide = torch.promote_types(key.dtype, torch.float32)
    kv_append(_turned(key, cos, sin, wide), value.to(wide), k_codes, k_scales, v_codes, v_scales, start, format)
    return _turned(query, cos, sin, wide).to(query.dtype).contiguous()  # as the kernel gives it, whatever went in


def _turned(x: Tensor, cos: Tensor, sin: Tensor, wide: torch.dtype) -> Tensor:
    x, cos, sin = x.to(wide), cos.to(wide)[:, None], sin.to(wide)[:, None]
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def _divisor(scale: Tensor) -> Tensor:
    wide = scale.float()
    return wide.masked_fill(wide == 0, 1.0)
