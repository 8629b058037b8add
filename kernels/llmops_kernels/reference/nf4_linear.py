"""y = x @ dequantize(W).T + bias for weights as bitsandbytes stores them in 4 bits (NF4 or FP4), in PyTorch.

The layout, read as it is (Dettmers et al. 2023, "QLoRA", section 3): the elements of W (N, K), row after row, two a
byte, the first in the high half; each block of `blocksize` consecutive elements has an absmax. Element = table[code] *
absmax. With double quantization the absmax are 8-bit codes themselves, in blocks of 256:

    absmax[i] = absmax_table[absmax_codes[i]] * absmax2[i // 256] + offset

with one offset, or one for every row, as several weights below each other have (each brings its own).

Shapes: x (M, K); codes uint8 with N * K / 2 elements; absmax float32 (N * K / blocksize), or absmax2 with absmax_codes
uint8 (N * K / blocksize), absmax_table float32 (256), offset float32 of one element or (N,); y (M, N).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TABLES", "absmax_of", "dequantize", "nf4_linear"]

# NF4: the quantiles of a normal distribution that QLoRA's appendix E lists; FP4: 2 exponent bits, 1 mantissa bit, / 12.
TABLES = {
    "nf4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    "fp4": (0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25,
            0.0, -0.0052083333, -0.6666666667, -1.0, -0.3333333333, -0.5, -0.1666666667, -0.25)}


def absmax_of(absmax: Tensor, absmax_codes: Tensor | None, absmax_table: Tensor | None, offset: Tensor | None
              ) -> Tensor:
    """The absmax of every block, float32: as given, or out of their own 8-bit codes."""
    if absmax_codes is None:
        return absmax
    assert absmax_table is not None and offset is not None
    blocks = torch.arange(absmax_codes.numel(), device=absmax.device) // 256
    if offset.numel() > 1:
        offset = offset.repeat_interleave(absmax_codes.numel() // offset.numel())
    return absmax_table[absmax_codes.flatten().long()] * absmax[blocks] + offset


def dequantize(codes: Tensor, absmax: Tensor, kind: str, blocksize: int, rows: int, columns: int, dtype: torch.dtype
               ) -> Tensor:
    """(rows, columns) in dtype, from `absmax_of`'s absmax."""
    flat = codes.flatten()
    both = torch.stack([flat >> 4, flat & 15], dim=1).flatten().long()
    table = torch.tensor(TABLES[kind], dtype=torch.float32, device=codes.device)
    return (table[both].view(-1, blocksize) * absmax.unsqueeze(1)).view(rows, columns).to(dtype)


def nf4_linear(x: Tensor, codes: Tensor, absmax: Tensor, absmax_codes: Tensor | None, absmax_table: Tensor | None,
               offset: Tensor | None, bias: Tensor | None, kind: str, blocksize: int, rows: int) -> Tensor:
    """y (M, rows) in x's dtype, computed in float32."""
    blocks = absmax_of(absmax, absmax_codes, absmax_table, offset)
    weight = dequantize(codes, blocks, kind, blocksize, rows, x.shape[1], torch.float32)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
