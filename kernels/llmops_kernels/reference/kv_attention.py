"""`kv_attention` in PyTorch: attention over the cache made dense, in float32 (float64 for float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from .kv_append import dequantize

__all__ = ["allowed", "kv_attention"]


def kv_attention(query: Tensor, k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor, length: Tensor,
                 first: Tensor | None, mask: Tensor | None, scale: float, window: int, softcap: float, format: str,
                 exact: torch.dtype | None = None) -> Tensor:
    """See `llmops_kernels/kv_attention.py`; exact: the type to compute in, and to give."""
    B, heads, T, D = query.shape
    H = k_codes.shape[1]
    wide = exact or torch.promote_types(query.dtype, torch.float32)
    # what lies beyond the longest row is not looked at, as little as the kernel does: it may be anything
    longest = min(int(length.max()), k_codes.shape[2]) if length.numel() else 0
    keys, values = (dequantize(codes[:, :, :longest], scales[:, :, :longest], format, wide)
                    for codes, scales in ((k_codes, k_scales), (v_codes, v_scales)))
    q = query.to(wide).view(B, H, heads // H, T, D) if query.is_contiguous() else (
        query.to(wide).reshape(B, H, heads // H, T, D))
    scores = torch.einsum("bhgtd,bhnd->bhgtn", q, keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    seen = allowed(T, longest, length, first, mask, window)[:, None, None]  # (B or 1, 1, 1, T, n)
    weights = torch.where(seen, scores, float("-inf")).softmax(-1)
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0.0)
    # 0 * NaN: what no row may see must not be multiplied
    values = torch.where(seen.any(-2).squeeze(2).unsqueeze(-1), values, 0.0)
    out = torch.einsum("bhgtn,bhnd->bthgd", torch.where(seen, weights, 0.0), values)
    return out.reshape(B, T, heads, D).to(exact or query.dtype).contiguous()


def allowed(tokens: int, keys: int, length: Tensor, first: Tensor | None, mask: Tensor | None, window: int) -> Tensor:
    """(B or 1, T, n) bool: which of the first n keys each of the T queries may attend to."""
    limit = length.view(-1, 1, 1) - (tokens - 1 - torch.arange(tokens, device=length.device))[:, None]
    key = torch.arange(keys, device=length.device)
    seen = key < limit
    if window > 0:
        seen = seen & (key >= limit - window)
    if first is not None:
        seen = seen & (key >= first.view(-1, 1, 1))
    if mask is not None:
        given = mask[:, 0, :, :keys]
        if given.shape[-1] < keys:
            given = torch.nn.functional.pad(given, (0, keys - given.shape[-1]))
        seen = seen & given
    return seen
