"""A quantized weight: integer codes, and the scales that give them back their size.

`W_ij ~ (codes_ij - zero_point_ig) * scale_ig`, where `g = j // group_size` is the group that column j belongs to. Every
quantizer returns one of these; how the codes are laid out in memory or on disk is not its business (see `packing.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["QuantizedWeight"]


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes and scales of one linear layer's weight.

    codes:      (out, in) int8, signed, in [-2^(bits-1), 2^(bits-1) - 1]
    scale:      (out, groups), in the dtype in which it is stored
    zero_point: (out, groups) int8 in the same range as codes, or None when symmetric
    bits:       2 to 8
    group_size: columns that share a scale; -1 when a whole row does (groups = 1)
    activation_bits: 16, or 8 where the inputs are rounded to int8, token by token, before the product
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    activation_bits: int = 16

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        groups = 1 if self.group_size == -1 else columns // self.group_size
        if self.scale.shape != (rows, groups):
            raise ValueError(f"scale is {tuple(self.scale.shape)}; expected {(rows, groups)} for codes of "
                             f"{(rows, columns)} in groups of {self.group_size}")
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise ValueError(f"zero_point is {tuple(self.zero_point.shape)}; expected {tuple(self.scale.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    @property
    def kind(self) -> str:
        """What the numbers are: "w8a8" where activations are rounded to int8, too, else "int"."""
        return "w8a8" if self.activation_bits == 8 else "int"

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes on disk, its share of scale and zero point counted."""
        extra = self.scale.numel() * torch.finfo(self.scale.dtype).bits
        if self.zero_point is not None:
            extra += self.zero_point.numel() * self.bits
        return self.bits + float(extra) / float(self.codes.numel())

    def dequantize(self) -> Tensor:
        """(out, in) in the dtype of `scale`: what every runtime that reads this weight computes with."""
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scale.shape[1], -1).to(self.scale.dtype)
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.to(self.scale.dtype).unsqueeze(-1)  # up to 255: exact in bfloat16 too
        return (grouped * self.scale.unsqueeze(-1)).view(rows, columns)
