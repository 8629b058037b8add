"""Options of every quantization of weights."""

from __future__ import annotations

from pydantic import Field

from llmops.methods.quantize.options.shared import (
    BITS,
    BLOCK,
    FIXED,
    KV_CACHE,
    ROTATE,
    KvDtype,
    Rotate,
    Scales,
    Scheme,
    parts,
)
from llmops.options import Options

__all__ = ["WeightOnly"]


class WeightOnly(Options, defer_build=True):
    """What every quantization of weights shares: bits, groups, which layers."""

    scheme: Scheme = Field(description="wNa16: integers of N bits, activations stay 16 bit. w8a8: int8, activations "
                                       "too, token by token. fp8: E4M3, activations too. mxfp4, nvfp4: E2M1 in groups "
                                       "of 32 or 16, activations stay 16 bit")
    scales: Scales | None = Field(None, description="for scheme fp8: one for the weight, for each row, or for each "
                                                    "block of 128 x 128 (activations then by 128, else by token). "
                                                    "Default: channel")
    group_size: int | None = Field(None, description="weights that share a scale along the input; -1 a whole row. "
                                                     "Default: -1 at 8 bits, 128 below. Only for wNa16")
    symmetric: bool = Field(True, description="false stores a zero point for every scale. Only for wNa16")
    ignore: list[str] = Field(["lm_head"], description="layers left in 16 bit, by the end of their name; [] quantizes "
                                                       "the head, too")
    embeddings: bool = Field(False, description="token embeddings in 8 bits, and with them a head that is tied to them")
    kv_cache: KvDtype | None = Field(None, description=KV_CACHE)
    rotate: Rotate = Field(None, description=ROTATE)

    @property
    def rotations(self) -> tuple[str, ...]:
        """The parts of `rotate`, none when it is left out."""
        return parts(self.rotate)

    @property
    def bits(self) -> int:
        return BITS[self.scheme]

    @property
    def number_format(self) -> str | None:
        """The kind of numbers, "w8a8", "fp8-channel" and so on; None for integers of any group size."""
        if self.scheme == "fp8":
            return f"fp8-{self.scales or 'channel'}"
        return self.scheme if self.scheme in FIXED else None

    @property
    def group(self) -> int:
        """The group size with its default filled in."""
        if self.scheme in FIXED:
            return BLOCK if self.scales == "block" else FIXED[self.scheme]
        return self.group_size if self.group_size is not None else (-1 if self.bits == 8 else 128)
