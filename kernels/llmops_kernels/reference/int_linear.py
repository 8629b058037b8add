"""y = x @ ((codes - zero) * scale).T + bias for 2-, 3-, 4- and 8-bit weights, in PyTorch; and the layout of the kernel.

The layout. A weight is cut into tiles of 128 rows and one *chunk* of columns; a tile is contiguous, so a program
streams (one of 64 rows reads half a tile). Inside a tile a row is W runs of `RUN` 16-bit words, and bit field i of
word j of a run holds the code of column `i * RUN + j` of the run's columns (planar): the kernel extracts field i of all
words with one mask and has the codes of RUN neighbouring columns, ready to be multiplied with RUN neighbouring elements
of x. Two words share a register, which makes every mask work on two codes. Codes are stored unsigned, by half their
range too large.

    bits   RUN                            words of a row and chunk   fields                    columns in a chunk
    8      128, groups of 32 or 64: 64    RUN; 2 * RUN               2 a word                  256
    4      64                             RUN                        4                         256
    2      32                             RUN                        8                         256
    3      32                             3 * RUN                    16: words 0, 1 the low    512
                                                                     two bits (8 fields
                                                                     each), word 2 the high

Of groups of 32 a run of 64 has two. Codes of 5 to 7 bits are stored as 8. Scales and zero points lie by tile, two, four
or eight groups of a row next to each other, then the rows: what a program needs for a chunk is contiguous, and a row's
scales are one read. Zero points are 16 bits wide, since the compiler picks the registers' layout by the narrowest
number that it sees. Rows are padded to 128, columns to whole chunks; padding multiplies zeros.

Shapes: N rows (outputs), K columns (inputs); T = ceil(N / 128) tiles of rows, C = ceil(K / chunk); x (M, K); words
int16 (T, C, 128, W, RUN), W: words of a row and chunk / RUN; scale (T, C * groups a chunk / near, 128, near), (T, 1,
128, 1) for one a row; zero int16, the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GROUPS", "HIGH_BITS", "TILE_ROWS", "Layout", "Packed", "dequantize", "int_linear", "layout", "pack",
           "unpack"]

TILE_ROWS = 128
GROUPS = (32, 64, 128)  # beside -1, one scale a row
# 3 bits: where word 2 keeps the high bit of code i, chosen so that few shifts bring it above the code's low bits.
HIGH_BITS = (2, 4, 6, 8, 3, 5, 7, 9, 10, 12, 14, 0, 11, 13, 15, 1)


@dataclass(frozen=True)
class Layout:
    """How codes of some width and group size lie in words."""

    bits: int  # 2, 3, 4 or 8: the width of a field
    run: int  # columns that are neighbours in a tile's row
    fields: int  # codes of a row and chunk in words j, j + run, ...
    words: int  # words that hold them: 3 for 3 bits, 1 or 2 for 8, else 1
    group: int  # columns of a scale; -1: the whole row

    @property
    def chunk(self) -> int:
        return self.run * self.fields

    @property
    def groups(self) -> int:
        """Scales of a row and chunk; 0: one scale for the whole row."""
        return 0 if self.group == -1 else self.chunk // self.group

    @property
    def near(self) -> int:
        """Scales of a row that lie next to each other: a kernel reads them at once."""
        if self.group == -1:
            return 1
        return 8 if self.bits == 8 and self.group == 32 else 4 if self.groups % 4 == 0 else 2


@dataclass(frozen=True)
class Packed:
    """A weight as the kernel reads it. All tensors are contiguous and on one device."""

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    rows: int
    columns: int


def layout(bits: int, group_size: int) -> Layout:
    """Raises ValueError on a width or group size that has no layout."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; expected 2 to 8")
    if group_size != -1 and group_size not in GROUPS:
        raise ValueError(f"group_size is {group_size}; expected one of {list(GROUPS)}, or -1 for one scale a row")
    width = 8 if bits > 4 else bits
    run = 32 if width < 4 else 128 if width == 8 and group_size in (-1, 128) else 64
    if width == 8:  # a chunk of 256 columns, whatever the run
        return Layout(width, run, 256 // run, 128 // run, group_size)
    return Layout(width, run, 16 if width == 3 else 16 // width, 3 if width == 3 else 1, group_size)


def pack(codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, bits: int, group_size: int) -> Packed:
    """Signed codes (N, K) int8, scale (N, G), zero (N, G) int8 or None -> what the kernel reads. Once per layer.

    G is 1 for group_size -1, else K / group_size. zero is in the units of codes: w = (code - zero) * scale. Raises
    ValueError when shapes, dtypes or the group size do not fit together.
    """
    how = layout(bits, group_size)
    N, K = codes.shape
    G = 1 if group_size == -1 else K // group_size
    if codes.dtype != torch.int8 or (group_size != -1 and K % group_size):
        raise ValueError(f"codes are {codes.dtype} {(N, K)} in groups of {group_size}; expected int8, whole groups")
    for name, given in (("scale", scale), ("zero", zero)):
        if given is not None and given.shape != (N, G):
            raise ValueError(f"{name} is {tuple(given.shape)}; expected {(N, G)}, rows x groups")
    if zero is not None and zero.dtype != torch.int8:
        raise ValueError(f"zero is {zero.dtype}; expected int8, in the units of codes")
    tall, chunks = -(-N // 128) * 128, -(-K // how.chunk)
    padded = torch.zeros(tall, chunks * how.chunk, dtype=torch.int32, device=codes.device)
    padded[:N, :K] = codes
    tiles = padded.view(tall // TILE_ROWS, TILE_ROWS, chunks, how.fields, how.run).permute(0, 2, 3, 1, 4)
    unsigned = tiles + (1 << (how.bits - 1))  # (T, C, fields, rows, run)
    per = 8 if how.bits == 3 else 16 // how.bits
    words = torch.zeros(*tiles.shape[:2], how.words, TILE_ROWS, how.run, dtype=torch.int32, device=codes.device)
    for i in range(how.fields):
        if how.bits == 3:
            words[:, :, i // 8] |= (unsigned[:, :, i] & 3) << (2 * (i % 8))
            words[:, :, 2] |= (unsigned[:, :, i] >> 2) << HIGH_BITS[i]
        else:
            words[:, :, i // per] |= unsigned[:, :, i] << (how.bits * (i % per))
    signed = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    groups = max(1, chunks * how.groups)
    points = None if zero is None else _turn(zero.to(torch.int16), tall, groups, how.near)
    laid = signed.transpose(2, 3).contiguous()
    return Packed(laid, _turn(scale, tall, groups, how.near), points, bits, group_size, N, K)


def _turn(given: Tensor, tall: int, groups: int, near: int) -> Tensor:
    """(N, G) -> (T, groups / near, rows of a tile, near), padded with zeros."""
    out = torch.zeros(tall, groups, dtype=given.dtype, device=given.device)
    out[: given.shape[0], : given.shape[1]] = given
    return out.view(-1, TILE_ROWS, groups // near, near).transpose(1, 2).contiguous()


def _back(turned: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse of `_turn`: (rows, groups)."""
    return turned.transpose(1, 2).reshape(turned.shape[0] * TILE_ROWS, -1)[:rows, :groups]


def unpack(words: Tensor, bits: int, group_size: int, rows: int, columns: int) -> Tensor:
    """The codes again: (rows, columns) int8, the exact inverse of `pack`."""
    how = layout(bits, group_size)
    bare = words.transpose(2, 3).to(torch.int32) & 0xFFFF  # (T, C, W, rows, run)
    per = 8 if how.bits == 3 else 16 // how.bits
    fields = []
    for i in range(how.fields):
        if how.bits == 3:
            low = (bare[:, :, i // 8] >> (2 * (i % 8))) & 3
            fields.append((low | (((bare[:, :, 2] >> HIGH_BITS[i]) & 1) << 2)) - 4)
        else:
            field = (bare[:, :, i // per] >> (how.bits * (i % per))) & ((1 << how.bits) - 1)
            fields.append(field - (1 << (how.bits - 1)))
    codes = torch.stack(fields, dim=2)  # (T, C, fields, 64, run)
    tall, wide = codes.shape[0] * TILE_ROWS, codes.shape[1] * how.chunk
    return codes.permute(0, 3, 1, 2, 4).reshape(tall, wide)[:rows, :columns].to(torch.int8).contiguous()


def dequantize(words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, rows: int, columns: int,
               dtype: torch.dtype) -> Tensor:
    """(rows, columns) in dtype: (codes - zero) * scale."""
    size = columns if group_size == -1 else group_size
    groups = columns // size
    grouped = unpack(words, bits, group_size, rows, columns).to(dtype).view(rows, groups, size)
    if zero is not None:
        grouped = grouped - _back(zero, rows, groups).to(dtype).unsqueeze(-1)
    return (grouped * _back(scale, rows, groups).to(dtype).unsqueeze(-1)).view(rows, columns)


def int_linear(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int,
               group_size: int, rows: int) -> Tensor:
    """y (M, rows) in x's dtype, computed in float32."""
    weight = dequantize(words, scale, zero, bits, group_size, rows, x.shape[1], torch.float32)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
