"""What the ops of the KV cache refuse: all raise ValueError, with what was given and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CODES", "check_append", "check_attention", "check_rope_append"]

#: The type of the codes of each format.
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
HALVES = (torch.float16, torch.bfloat16)
WIDTHS = (16, 32, 64, 128, 256)


def check_cache(k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor, format: str,
                shape: tuple[int, int], D: int, device: torch.device) -> None:
    """shape: (batch, key-value heads)."""
    if format not in CODES:
        raise ValueError(f"format {format!r}; expected one of {', '.join(CODES)}")
    width, numbers = (D // 2, 2) if format == "int4" else (D, 1)
    for name, codes, scales in (("k", k_codes, k_scales), ("v", v_codes, v_scales)):
        if codes.dtype != CODES[format] or codes.dim() != 4 or codes.shape[:2] != shape or codes.shape[3] != width:
            raise ValueError(f"{name}_codes are {codes.dtype} {tuple(codes.shape)}; expected {CODES[format]} "
                             f"({shape[0]}, {shape[1]}, tokens, {width}) for {format} and heads of {D}")
        if scales.dtype != torch.bfloat16 or scales.shape != (*codes.shape[:3], numbers):
            raise ValueError(f"{name}_scales are {scales.dtype} {tuple(scales.shape)}; expected torch.bfloat16 "
                             f"{(*codes.shape[:3], numbers)}")
        if codes.stride(3) != 1 or scales.stride(3) != 1:
            raise ValueError(f"{name}_codes have strides {codes.stride()}, {name}_scales {scales.stride()}; expected 1 "
                             "along the last dimension")
        if format == "int4" and any(scales.stride(i) % 2 for i in range(3) if scales.shape[i] > 1) or (
                format == "int4" and scales.storage_offset() % 2):
            raise ValueError(f"{name}_scales have strides {scales.stride()}; expected even ones: a scale and its "
                             "minimum are read as one word")
    if k_codes.shape != v_codes.shape or k_codes.stride() != v_codes.stride() or k_scales.stride() != v_scales.stride():
        raise ValueError(f"codes of keys are {tuple(k_codes.shape)} with strides {k_codes.stride()}, of values "
                         f"{tuple(v_codes.shape)} with {v_codes.stride()}; expected both laid out alike")
    _one_device(device, k_codes=k_codes, k_scales=k_scales, v_codes=v_codes, v_scales=v_scales)


def check_append(key: Tensor, value: Tensor, k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor,
                 start: Tensor, format: str) -> None:
    if key.dim() != 4 or key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(f"key is {key.dtype} {tuple(key.shape)}, value {value.dtype} {tuple(value.shape)}; expected "
                         "both (batch, heads, tokens, D) of one type")
    _check_heads("key", key)
    _check_heads("value", value)
    check_cache(k_codes, k_scales, v_codes, v_scales, format, (key.shape[0], key.shape[1]), key.shape[3], key.device)
    _check_counts("start", start, key.shape[0])
    _one_device(key.device, value=value, start=start)


def check_rope_append(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, k_codes: Tensor,
                      k_scales: Tensor, v_codes: Tensor, v_scales: Tensor, start: Tensor, format: str) -> None:
    check_append(key, value, k_codes, k_scales, v_codes, v_scales, start, format)
    B, H, T, D = key.shape
    if query.dim() != 4 or (query.shape[0], *query.shape[2:]) != (B, T, D) or query.shape[1] % max(H, 1):
        raise ValueError(f"query is {tuple(query.shape)}; expected ({B}, a multiple of {H}, {T}, {D}) as the keys have")
    if query.dtype != key.dtype:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}; expected one type")
    _check_heads("query", query)
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.dim() != 3 or angles.shape[0] not in (1, B) or angles.shape[1:] != (T, D):
            raise ValueError(f"{name} is {tuple(angles.shape)}; expected ({B} or 1, {T}, {D}): all of a head is turned")
        if not angles.is_floating_point():
            raise ValueError(f"{name} is {angles.dtype}; expected a floating type")
    if cos.stride() != sin.stride() or cos.dtype != sin.dtype or cos.stride(2) != 1:
        raise ValueError(f"cos has strides {cos.stride()}, sin {sin.stride()}; expected both alike, 1 along a head")
    _one_device(key.device, query=query, cos=cos, sin=sin)


def check_attention(query: Tensor, k_codes: Tensor, k_scales: Tensor, v_codes: Tensor, v_scales: Tensor,
                    length: Tensor, first: Tensor | None, mask: Tensor | None, scale: float, window: int,
                    softcap: float, format: str) -> None:
    if query.dim() != 4:
        raise ValueError(f"query is {tuple(query.shape)}; expected (batch, heads, tokens, D)")
    B, heads, T, D = query.shape
    _check_heads("query", query)
    H = k_codes.shape[1] if k_codes.dim() == 4 else 1
    if H == 0 or heads % H:
        raise ValueError(f"query has {heads} heads over {H} of keys and values; expected a multiple")
    check_cache(k_codes, k_scales, v_codes, v_scales, format, (B, H), D, query.device)
    _check_counts("length", length, B)
    _one_device(query.device, length=length)
    if first is not None:
        _check_counts("first", first, B)
        _one_device(query.device, first=first)
    if mask is not None:
        N = k_codes.shape[2]
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[0] not in (1, B) or mask.shape[1] != 1 or (
                mask.shape[2] not in (1, T)) or mask.shape[3] > N:
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool ({B} or 1, 1, {T} or 1, "
                             f"at most {N})")
        _one_device(query.device, mask=mask)


def _check_heads(name: str, x: Tensor) -> None:
    if x.device.type != "cpu" and x.dtype not in HALVES or not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; expected torch.float16 or torch.bfloat16")
    if x.shape[3] not in WIDTHS or (x.numel() and x.stride(3) != 1):
        raise ValueError(f"{name} has heads of {x.shape[3]} with strides {x.stride()}; expected heads of "
                         f"{', '.join(map(str, WIDTHS))}, contiguous")


def _check_counts(name: str, counts: Tensor, batch: int) -> None:
    if counts.dtype not in (torch.int32, torch.int64) or counts.dim() != 1 or counts.shape[0] not in (1, batch):
        raise ValueError(f"{name} is {counts.dtype} {tuple(counts.shape)}; expected int32 or int64 of ({batch},) or "
                         "(1,)")


def _one_device(device: torch.device, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, as the others")
