"""ggml's K-quants: super-blocks of 256 weights of a row, whose small scales are themselves quantized.

    Q4_K   8 blocks of 32:   W = (d sc_i) q - (dmin m_i)   q in 0..15, sc and m in 0..63, d and dmin float16   4.5 bits
    Q6_K   16 blocks of 16:  W = (d sc_i) q                q in -32..31, sc in -128..127, d float16         6.5625 bits

The layouts are those that `gguf.quants.dequantize` reads (bytes listed at `_packed_q4` and `_packed_q6`); how good the
numbers in them are is the writer's business. Here a block's range is searched (its bounds drawn in by up to a third,
scale and offset fitted to the codes by least squares) for the least squared error; then, with the scales rounded
to their own grid, each block tries the neighbours of its scale and offset. No data is used: no importance matrix.

`mixture` is the choice of types that llama.cpp calls Q4_K_M: the head in Q6_K, values and down projections in Q6_K in
the first and last eighth of the layers and in every third between. A row that is no multiple of 256 takes the type that
llama.cpp falls back to (`FALLBACK`).

Cost: about 60 passes over W for Q4_K, 20 for Q6_K.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["FALLBACK", "KQUANTS", "SUPER", "mixture", "q4_k", "q6_k"]

SUPER = 256
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # for rows that are no multiple of SUPER
_DRAWN_IN = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_AT_ONCE = 1 << 22  # weights
Array = NDArray[Any]


def q4_k(W: Tensor) -> Array:
    """W (out, in), in a multiple of 256 -> (out, in / 256 * 144) bytes."""
    return _in_parts(W, lambda X: _packed_q4(*_fit_q4(X)))


def q6_k(W: Tensor) -> Array:
    """W (out, in), in a multiple of 256 -> (out, in / 256 * 210) bytes."""
    return _in_parts(W, lambda X: _packed_q6(*_fit_q6(X)))


KQUANTS = {"Q4_K": q4_k, "Q6_K": q6_k}


def mixture(name: str, layers: int, tied: bool) -> str:
    """The type that Q4_K_M gives a weight matrix, by its name in a transformers model. tied: the head has none."""
    if name.startswith("lm_head.") or (tied and "embed_tokens." in name):
        return "Q6_K"
    found = re.search(r"\.layers\.(\d+)\..*\b(v_proj|down_proj)\.", name)
    if found is None:
        return "Q4_K"
    layer, eighth = int(found.group(1)), layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return "Q6_K" if more else "Q4_K"


def _in_parts(W: Tensor, pack: Callable[[Tensor], Array]) -> Array:
    rows, columns = W.shape
    if columns % SUPER:
        raise ValueError(f"W is {tuple(W.shape)}; expected columns in a multiple of {SUPER}")
    parts = [pack(part.float().reshape(-1, SUPER)) for part in W.split(max(1, _AT_ONCE // columns))]
    return np.concatenate(parts).reshape(rows, -1)


# ------------------------------------------------------------------------------------------------------------ Q4_K


def _fit_q4(X: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """X (n, 256) -> d, dmin (n, 1) float16; sc, m (n, 8) and codes (n, 8, 32), all of whole numbers."""
    B = X.view(-1, 8, 32)
    low, high = B.amin(-1).clamp(max=0), B.amax(-1).clamp(min=0)
    scale, offset = _searched_q4(B, low, high)
    d = (scale.amax(1, keepdim=True) / 63).to(torch.float16)
    dmin = (offset.amax(1, keepdim=True) / 63).to(torch.float16)
    wide_d, wide_m = d.float(), dmin.float()
    sc, m = _on_grid(scale, wide_d), _on_grid(offset, wide_m)
    best_sc, best_m, least = sc, m, _error_q4(B, wide_d * sc, wide_m * m)
    for up in (-1, 0, 1):
        for over in (-1, 0, 1):
            tried_sc, tried_m = (sc + up).clamp(0, 63), (m + over).clamp(0, 63)
            error = _error_q4(B, wide_d * tried_sc, wide_m * tried_m)
            better = error < least
            least = torch.where(better, error, least)
            best_sc, best_m = torch.where(better, tried_sc, best_sc), torch.where(better, tried_m, best_m)
    return d, dmin, best_sc, best_m, _codes_q4(B, wide_d * best_sc, wide_m * best_m)


def _searched_q4(B: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, offset), each (n, 8) and not negative, of least squared error. B: (n, 8, 32)."""
    best_s, best_o = (high - low) / 15, -low
    least = _error_q4(B, best_s, best_o)
    for bottom in _DRAWN_IN:
        for top in _DRAWN_IN:
            if abs(bottom - top) > 0.16:
                continue
            s, o = (high * top - low * bottom) / 15, -low * bottom
            s, o = _least_squares(B, _codes_q4(B, s, o), s, o)
            error = _error_q4(B, s, o)
            better = error < least
            least = torch.where(better, error, least)
            best_s, best_o = torch.where(better, s, best_s), torch.where(better, o, best_o)
    return best_s, best_o


def _least_squares(B: Tensor, q: Tensor, s: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset that fit the codes best, where both come out as they have to be; else as given."""
    n = B.shape[-1]
    mean_q, mean_x = q.mean(-1), B.mean(-1)
    spread = (q * q).sum(-1) - n * mean_q ** 2
    slope = ((q * B).sum(-1) - n * mean_q * mean_x) / torch.where(spread > 0, spread, torch.ones_like(spread))
    offset = slope * mean_q - mean_x
    fine = (spread > 0) & (slope > 0) & (offset >= 0)
    return torch.where(fine, slope, s), torch.where(fine, offset, o)


def _codes_q4(B: Tensor, s: Tensor, o: Tensor) -> Tensor:
    step = torch.where(s > 0, s, torch.ones_like(s)).unsqueeze(-1)
    codes = torch.round((B + o.unsqueeze(-1)) / step).clamp_(0, 15)
    return torch.where((s > 0).unsqueeze(-1), codes, torch.zeros_like(codes))


def _error_q4(B: Tensor, s: Tensor, o: Tensor) -> Tensor:
    return (_codes_q4(B, s, o) * s.unsqueeze(-1) - o.unsqueeze(-1) - B).square().sum(-1)


def _on_grid(value: Tensor, step: Tensor) -> Tensor:
    safe = torch.where(step > 0, step, torch.ones_like(step))
    return torch.where(step > 0, torch.round(value / safe), torch.zeros_like(value)).clamp_(0, 63)


def _packed_q4(d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor, codes: Tensor) -> Array:
    """144 bytes: d, dmin; 12 of scales (4 bytes sc_0..3, 4 bytes m_0..3, the upper two bits of each those of sc_4..7
    and m_4..7, 4 bytes with the lower four of both); 128 of codes, blocks 2i and 2i+1 in the nibbles of 32 bytes."""
    a, b, q = (part.numpy().astype(np.uint8) for part in (sc, m, codes))
    scales = np.concatenate([a[:, :4] | (a[:, 4:] >> 4) << 6, b[:, :4] | (b[:, 4:] >> 4) << 6,
                             (a[:, 4:] & 15) | (b[:, 4:] & 15) << 4], axis=1)
    pairs = q[:, 0::2] | q[:, 1::2] << 4
    return np.concatenate([d.numpy().view(np.uint8), dmin.numpy().view(np.uint8), scales,
                           pairs.reshape(len(q), 128)], axis=1)


# ------------------------------------------------------------------------------------------------------------ Q6_K


def _fit_q6(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X (n, 256) -> d (n, 1) float16, sc (n, 16) and codes (n, 16, 16), both of whole numbers."""
    B = X.view(-1, 16, 16)
    extreme = B.gather(-1, B.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = least = None
    for steps in (-32.0, -31.5, -31.0, -30.5, -30.0, -29.0, -28.0):  # what the largest weight becomes
        s = extreme / steps
        q = _codes_q6(B, s)
        power = (q * q).sum(-1)
        s = torch.where(power > 0, (q * B).sum(-1) / torch.where(power > 0, power, torch.ones_like(power)), s)
        error = _error_q6(B, s)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        scale = s if scale is None else torch.where(better, s, scale)
        least = error if least is None else torch.where(better, error, least)
    assert scale is not None
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = (largest / -127).to(torch.float16)  # the largest takes a code of its own sign
    wide = d.float()
    safe = torch.where(wide != 0, wide, torch.ones_like(wide))
    sc = torch.where(wide != 0, torch.round(scale / safe), torch.zeros_like(scale)).clamp_(-128, 127)
    best, least = sc, _error_q6(B, wide * sc)
    for change in (-1, 1):
        tried = (sc + change).clamp(-128, 127)
        error = _error_q6(B, wide * tried)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return d, best, _codes_q6(B, wide * best)


def _codes_q6(B: Tensor, s: Tensor) -> Tensor:
    step = torch.where(s != 0, s, torch.ones_like(s)).unsqueeze(-1)
    codes = torch.round(B / step).clamp_(-32, 31)
    return torch.where((s != 0).unsqueeze(-1), codes, torch.zeros_like(codes))


def _error_q6(B: Tensor, s: Tensor) -> Tensor:
    return (_codes_q6(B, s) * s.unsqueeze(-1) - B).square().sum(-1)


def _packed_q6(d: Tensor, sc: Tensor, codes: Tensor) -> Array:
    """210 bytes: 128 with the lower four bits of q + 32 (of each half of the block, weights j and j + 64 in a byte), 64
    with the upper two (weights j, j + 32, j + 64, j + 96 in a byte), 16 scales, d."""
    q = (codes.numpy().astype(np.int16) + 32).astype(np.uint8).reshape(len(codes), 2, 128)
    low, high = q & 15, q >> 4
    lower = low[:, :, :64] | low[:, :, 64:] << 4
    four = high.reshape(len(codes), 2, 4, 32)
    upper = four[:, :, 0] | four[:, :, 1] << 2 | four[:, :, 2] << 4 | four[:, :, 3] << 6
    return np.concatenate([lower.reshape(len(codes), 128), upper.reshape(len(codes), 64),
                           sc.numpy().astype(np.int8).view(np.uint8), d.numpy().view(np.uint8)], axis=1)
