"""Append new keys and values to a quantized KV cache; with `kv_rope_append`, turn queries and keys by RoPE on the way.

    kv_append(key, value, k_codes, k_scales, v_codes, v_scales, start, format)
    kv_rope_append(query, key, value, cos, sin, k_codes, ..., start, format) -> queries after RoPE

One program takes ROWS vectors (a head of a token) of keys, of values or, with RoPE, of one query head in the group. A
vector is read once and its codes are written once: what is left of the time is the launch, so RoPE, which alone is ten
small kernels in a model written in PyTorch, comes for nothing. The formats are those of `_kv.py`.

RoPE: y_i = x_i cos_i - x_(i + D/2) sin_i in the first half, x_i cos_i + x_(i - D/2) sin_i in the second (the "rotate
half" pairing of GPT-NeoX and Llama), in float32; keys are quantized from there, queries rounded once.

Shapes: B batch, T new tokens, H key-value heads, G queries a key-value head, D numbers a head (16 to 256, a power of
two), N tokens the cache has room for.
    query (B, H G, T, D), key and value (B, H, T, D) float16 or bfloat16, any strides, rows contiguous
    cos, sin (B or 1, T, D), any floating type
    codes (B, H, N, D) int8 or float8_e4m3fn, (B, H, N, D/2) uint8; scales (B, H, N, 1), at int4 (B, H, N, 2) with the
    minimum second, bfloat16
    start (B,) or (1,) int32 or int64: how many tokens the cache holds; what would lie beyond N is dropped
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import config
from ._interpret import narrow
from ._kv import FORMATS, quantize
from ._kv_checks import check_append, check_rope_append
from ._library import define, ops
from ._triton import tl, triton
from .reference import kv_append as reference

__all__ = ["append_kernel", "kv_append", "kv_rope_append", "tiles"]


@triton.jit  # type: ignore[untyped-decorator]
def _store(x, codes_ptr, scales_ptr, code_at, scale_at, keep, FORMAT: tl.constexpr,  # type: ignore[no-untyped-def]
           ROWS: tl.constexpr, D: tl.constexpr):
    """Quantize rows x (ROWS, D) and write them to codes_ptr + code_at (ROWS,) and scales_ptr + scale_at."""
    codes, scale, least = quantize(x, FORMAT, ROWS, D)
    width: tl.constexpr = D // 2 if FORMAT == 2 else D
    tl.store(codes_ptr + code_at[:, None] + tl.arange(0, width)[None, :], codes, mask=keep[:, None])
    tl.store(scales_ptr + scale_at, scale.to(tl.bfloat16), mask=keep)
    if FORMAT == 2:
        tl.store(scales_ptr + scale_at + 1, least.to(tl.bfloat16), mask=keep)


@triton.jit  # type: ignore[untyped-decorator]
def _turned(x_ptr, at, cos_ptr, sin_ptr, angle_at, real, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of x after RoPE, float32 (ROWS, D); the partner of each number is read a second time, out of the cache."""
    i = tl.arange(0, D)
    half: tl.constexpr = D // 2
    x = tl.load(x_ptr + at[:, None] + i[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    partner = tl.load(x_ptr + at[:, None] + (i ^ half)[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle_at[:, None] + i[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle_at[:, None] + i[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    return x * cos + tl.where(i < half, -1.0, 1.0)[None, :] * partner * sin


@triton.jit  # type: ignore[untyped-decorator]
def append_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, turned_ptr, k_codes_ptr, k_scales_ptr,  # type: ignore[no-untyped-def]
                  v_codes_ptr, v_scales_ptr, start_ptr, rows, T, H, G, N, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
                  angle_b, angle_t, code_b, code_h, code_t, scale_b, scale_h, scale_t, start_b,
                  FORMAT: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """Program (i, role): ROWS vectors from the i-th on; role 0 keys, 1 values, 2 + g the g-th query of each group."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    role = tl.program_id(1)
    real = row < rows
    head, token, batch = (row % H).to(tl.int64), ((row // H) % T).to(tl.int64), (row // (H * T)).to(tl.int64)
    place = tl.load(start_ptr + batch * start_b, mask=real, other=0).to(tl.int64) + token
    keep = real & (place >= 0) & (place < N)
    code_at = batch * code_b + head * code_h + place * code_t
    scale_at = batch * scale_b + head * scale_h + place * scale_t
    i = tl.arange(0, D)
    angle_at = batch * angle_b + token * angle_t
    if role == 0:
        at = batch * k_b + head * k_h + token * k_t
        if ROPE:
            x = _turned(k_ptr, at, cos_ptr, sin_ptr, angle_at, real, D)
        else:
            x = tl.load(k_ptr + at[:, None] + i[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        _store(x, k_codes_ptr, k_scales_ptr, code_at, scale_at, keep, FORMAT, ROWS, D)
    elif role == 1:
        at = batch * v_b + head * v_h + token * v_t
        x = tl.load(v_ptr + at[:, None] + i[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        _store(x, v_codes_ptr, v_scales_ptr, code_at, scale_at, keep, FORMAT, ROWS, D)
    elif ROPE:
        query = head * G + role - 2
        x = _turned(q_ptr, batch * q_b + query * q_h + token * q_t, cos_ptr, sin_ptr, angle_at, real, D)
        out = ((batch * H * G + query) * T + token) * D
        tl.store(turned_ptr + out[:, None] + i[None, :], narrow(x, turned_ptr.dtype.element_ty), mask=real[:, None])


# ---------------------------------------------------------------------------------------------------- launch
def tiles(D: int, rows: int, device: torch.device) -> config.Config:
    """ROWS vectors a program: one where there are few, so that all processors have some."""
    tuned = config.pick("kv_append", config.key(D, D), rows, config.device_name(device.index))
    return tuned or {"ROWS": 1 if rows <= 2048 else 4, "num_warps": 1}


def _launch(query: Tensor | None, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, turned: Tensor,
            k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor, start: Tensor, format: str) -> None:
    B, H, T, D = key.shape
    rows = B * H * T
    if rows == 0:
        return
    q = key if query is None else query
    tile = tiles(D, rows, key.device)
    append_kernel[(triton.cdiv(rows, tile["ROWS"]), 2 if query is None else 2 + q.shape[1] // H)](
        q, key, value, cos, sin, turned, k_codes, k_scales, v_codes, v_scales, start, rows, T, H, q.shape[1] // H,
        k_codes.shape[2], *q.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), *k_codes.stride()[:3], *k_scales.stride()[:3],
        0 if start.shape[0] == 1 else start.stride(0), FORMAT=FORMATS[format], ROPE=query is not None, D=D,
        ROWS=tile["ROWS"], num_warps=tile["num_warps"], num_stages=1)


def launch(key: Tensor, value: Tensor, k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor,
           start: Tensor, format: str) -> None:
    _launch(None, key, value, key, key, key, k_codes, k_scales, v_codes, v_scales, start, format)


def launch_rope(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, k_codes: Tensor, k_scales: Tensor,
                v_codes: Tensor, v_scales: Tensor, start: Tensor, format: str) -> Tensor:
    turned = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _launch(query, key, value, cos, sin, turned, k_codes, k_scales, v_codes, v_scales, start, format)
    return turned


def kv_append(key: Tensor, value: Tensor, k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor,
              start: Tensor, format: str) -> None:
    """Write new keys and values (B, H, T, D) into the cache from `start` on. Raises ValueError."""
    ops.kv_append(key, value, k_codes, k_scales, v_codes, v_scales, start, format)


def kv_rope_append(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, k_codes: Tensor,
                   k_scales: Tensor, v_codes: Tensor, v_scales: Tensor, start: Tensor, format: str) -> Tensor:
    """The same with keys turned by RoPE; returns the queries turned, (B, H G, T, D) contiguous."""
    turned: Tensor = ops.kv_rope_append(query, key, value, cos, sin, k_codes, k_scales, v_codes, v_scales, start,
                                        format)
    return turned


def _fake(*arguments: object) -> None:
    return None


def _fake_rope(query: Tensor, *arguments: object) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


_CACHE = "Tensor(a!) k_codes, Tensor(b!) k_scales, Tensor(c!) v_codes, Tensor(d!) v_scales, Tensor start, str format"
define(f"kv_append(Tensor key, Tensor value, {_CACHE}) -> ()", check=check_append, cpu=reference.kv_append,
       cuda=launch, fake=_fake)
define(f"kv_rope_append(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, {_CACHE}) -> Tensor",
       check=check_rope_append, cpu=reference.kv_rope_append, cuda=launch_rope, fake=_fake_rope)
