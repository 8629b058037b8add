"""Options of QLoRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.finetune.options.adapters import Adapters

__all__ = ["Qlora"]


class Qlora(Adapters):
    """Low-rank adapters on a base that is held in 4 bits (Dettmers et al. 2023), through bitsandbytes."""

    method: Literal["qlora"]
    quant: Literal["nf4", "fp4"] = Field("nf4", description="data type of the base: 4-bit normal float, or 4-bit float")
    double_quant: bool = Field(True, description="round the scales of the blocks to 8 bits too, which saves 0.37 bits "
                                                 "a weight")
    loftq_iterations: int = Field(5, ge=1, le=100, description="alternating steps of init: loftq")
    merge: Literal["dequantized", "original", "apart"] = Field(
        "dequantized", description="what is kept. dequantized: the adapters folded into the base they were trained on, "
                                   "written out in 16 bits. original: folded into the 16-bit base, which they have not "
                                   "seen. apart: a PEFT folder that records its 4-bit base. All three are measured "
                                   "against what was trained")
