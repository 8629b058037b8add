"""Options of the choice of bits for each layer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.quantize.options.shared import (
    BITS,
    FACTORS,
    KV_CACHE,
    ROTATE,
    Experts,
    Integers,
    KvDtype,
    Rotate,
    parts,
)
from llmops.options import Options

__all__ = ["Auto"]


class Auto(Options):
    """Give each layer its own number of bits: measure what fewer cost it, then choose within a budget, exactly."""

    method: Literal["auto"]
    data: str = Field(description="name of the calibration data; its `samples` are the crops, 128 by default")
    length: int = Field(2048, ge=8, description="tokens a calibration crop holds (at most the model's context)")
    bits: float | None = Field(None, gt=0, le=16, description="budget: bits of a quantized weight on average, scales "
                                                              "and zero points counted. This or `bytes`")
    bytes: int | None = Field(None, gt=0, description="budget: bytes of all weights on disk, those in 16 bit counted")
    candidates: list[Integers] = Field(["w2a16", "w3a16", "w4a16", "w8a16"], min_length=1,
                                     description="schemes that a layer can get")
    group_size: int | list[int] | None = Field(None, description="weights that share a scale along the input; of a "
                                               "list each is tried with each scheme. At 8 bits always a whole row. "
                                               "Default: 128")
    symmetric: bool = Field(True, description="false stores a zero point for every scale")
    solver: Literal["gptq", "rtn", "awq", "autoround"] = Field(
        "gptq", description="how each layer is quantized in the end: by the method with its default options, rtn with "
                            "clip: mse")
    iterations: int = Field(200, ge=1, le=100_000, description="solver autoround: steps of the descent for each block")
    factors: Literal["awq"] | None = Field(None, description=FACTORS + ". For solver gptq and autoround")
    rotate: Rotate = Field(None, description=ROTATE)
    sensitivity: Literal["kl", "gradient"] = Field(
        "kl", description="what fewer bits cost a layer: the measured divergence of the next-token distribution, or "
                          "its second-order estimate, which takes one backward pass for all layers")
    judge: str | None = Field(None, description="name of data whose answers alone the cost of fewer bits is counted on "
                                                "(chat rows, or prompt and completion, as the task asks them). "
                                                "Default: every token of `data`")
    experts: Experts = Field("routed", description="what experts of a mixture are measured on: the tokens that were "
                                                   "sent to them, or all")
    crops: int | None = Field(None, ge=1, description="calibration crops that the sensitivity is measured on. "
                                                      "Default: 16 for kl, all for gradient")
    ignore: list[str] = Field(["lm_head"], description="layers left in 16 bit, by the end of their name")
    kv_cache: KvDtype | None = Field(None, description=KV_CACHE)

    @property
    def rotations(self) -> tuple[str, ...]:
        """The parts of `rotate`, none when it is left out."""
        return parts(self.rotate)

    @property
    def sizes(self) -> list[int]:
        """The group sizes with their default filled in."""
        given = self.group_size if self.group_size is not None else 128
        return given if isinstance(given, list) else [given]

    def grids(self) -> list[tuple[int, int]]:
        """(bits, group size) of every candidate, the smallest first, each once."""
        found = {(BITS[scheme], size) for scheme in self.candidates
                 for size in ([-1] if BITS[scheme] == 8 else self.sizes)}
        return sorted(found, key=lambda grid: (grid[0], -grid[1] if grid[1] != -1 else -(1 << 31)))
