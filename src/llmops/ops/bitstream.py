"""Small signed integers as a dense stream of bits, and back.

The layout is that of compressed-tensors' ``pack-quantized``: code `q` is stored as `q + 2^(bits-1)`, element `i` of a
row begins at bit `i * bits`, least significant bit first, in 32-bit words. At 3, 5, 6 and 7 bits an element may
straddle two words; no bit is wasted but at the end of a row.

Eight elements of b bits fill exactly b bytes, whatever b is. So one path packs every width: eight codes are laid into
a 64-bit word, and the first b bytes of it are kept.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

__all__ = ["pack_bits", "unpack_bits", "words"]

if sys.byteorder != "little":  # pragma: no cover - the byte views below would be wrong, silently
    raise ImportError("llmops packs weights on little-endian machines only")


def words(count: int, bits: int) -> int:
    """How many 32-bit words a row of `count` elements takes."""
    return (count * bits + 31) // 32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """int8 codes (rows, n) in [-2^(bits-1), 2^(bits-1)-1] -> int32 (rows, ceil(n * bits / 32)).

    Raises ValueError when `bits` is outside 2..8 or a code does not fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"codes are {codes.dtype} of {codes.dim()} dimensions; expected int8 of 2")
    rows, count = codes.shape
    half = 1 << (bits - 1)
    if codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise ValueError(f"codes reach {int(codes.min())}..{int(codes.max())}; {bits} bits hold {-half}..{half - 1}")
    eights = -(-count // 8)
    shifted = torch.zeros(rows, eights * 8, dtype=torch.int64, device=codes.device)
    shifted[:, :count] = codes.to(torch.int64) + half
    shifted = shifted.view(rows, eights, 8)
    word = torch.zeros(rows, eights, dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= shifted[:, :, i] << (i * bits)  # at 8 bits the last code lands on the sign bit, which is just a bit
    stream = word.view(torch.uint8).view(rows, eights, 8)[:, :, :bits].reshape(rows, eights * bits)
    packed = torch.zeros(rows, words(count, bits) * 4, dtype=torch.uint8, device=codes.device)
    kept = min(packed.shape[1], stream.shape[1])  # what is cut off is the padding of the last eight
    packed[:, :kept] = stream[:, :kept]
    return packed.view(torch.int32)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: int32 (rows, words) -> int8 (rows, count)."""
    _check_bits(bits)
    rows = packed.shape[0]
    if packed.dtype != torch.int32 or packed.shape[1] != words(count, bits):
        raise ValueError(f"packed is {packed.dtype} {tuple(packed.shape)}; expected int32 of {words(count, bits)} "
                         f"words a row for {count} elements of {bits} bits")
    plain = packed.contiguous().flatten().view(packed.shape)  # a column counts as contiguous whatever its stride
    raw = plain.view(torch.uint8)
    if 8 % bits == 0:
        return _unpack_bytes(raw, bits, count)
    eights = -(-count // 8)
    stream = torch.zeros(rows, eights * bits, dtype=torch.uint8, device=packed.device)
    kept = min(raw.shape[1], stream.shape[1])
    stream[:, :kept] = raw[:, :kept]
    word = torch.zeros(rows, eights, 8, dtype=torch.uint8, device=packed.device)
    word[:, :, :bits] = stream.view(rows, eights, bits)
    whole = word.view(torch.int64).view(rows, eights)
    half = 1 << (bits - 1)
    codes = torch.empty(rows, eights, 8, dtype=torch.int8, device=packed.device)
    for i in range(8):
        codes[:, :, i] = (((whole >> (i * bits)) & (2 * half - 1)) - half).to(torch.int8)
    return codes.view(rows, eights * 8)[:, :count].contiguous()


def _unpack_bytes(raw: Tensor, bits: int, count: int) -> Tensor:
    """2, 4 and 8 bits never straddle a byte: the same, several times faster (the reference matmul waits for it)."""
    half = 1 << (bits - 1)
    codes = torch.empty(*raw.shape, 8 // bits, dtype=torch.int8, device=raw.device)
    for i in range(8 // bits):
        unsigned = (raw >> (i * bits)) & (2 * half - 1)
        codes[:, :, i] = (unsigned ^ 128).view(torch.int8) if bits == 8 else unsigned.view(torch.int8) - half
    return codes.view(raw.shape[0], -1)[:, :count].contiguous()


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected 2 to 8")
