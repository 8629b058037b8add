"""Options of the quantization methods."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.options import Options

__all__ = ["BITS", "Quantize", "Rtn", "Scheme"]

Scheme = Literal["w8a16", "w4a16", "w3a16", "w2a16"]
BITS: dict[str, int] = {"w8a16": 8, "w4a16": 4, "w3a16": 3, "w2a16": 2}


class Rtn(Options):
    """Round to nearest: no data, one scale a group (or a row)."""

    method: Literal["rtn"]
    scheme: Scheme = Field(description="bits of the weights; activations stay 16 bit")
    group_size: int | None = Field(None, description="weights that share a scale along the input; -1 a whole row. "
                                                     "Default: -1 at 8 bits, 128 below")
    symmetric: bool = Field(True, description="false stores a zero point for every scale")
    ignore: list[str] = Field(["lm_head"], description="layers left in 16 bit, by the end of their name")

    @property
    def bits(self) -> int:
        return BITS[self.scheme]

    @property
    def group(self) -> int:
        """The group size with its default filled in."""
        return self.group_size if self.group_size is not None else (-1 if self.bits == 8 else 128)


Quantize = Rtn
