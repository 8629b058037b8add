"""What the options of several methods share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.options import Options

__all__ = ["Masks", "MeasuredMasks", "Pattern", "Ratios"]

Pattern = Literal["unstructured", "2:4", "4:8"]
Ratios = Literal["uniform", "owl", "sensitivity"]


class Masks(Options):
    """Which weights of which layers become zero."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="fraction of the weights set to zero")
    pattern: Pattern = Field("unstructured", description="where zeros may stand; N:M needs sparsity N/M")
    ignore: list[str] = Field(["lm_head"], description="layers left as they are, by the end of their name")


class MeasuredMasks(Masks):
    """The same by what the layers see of calibration data."""

    data: str = Field(description="name of the calibration data")
    length: int = Field(2048, ge=8, description="tokens a calibration crop holds (at most the model's context)")
    ratios: Ratios = Field("uniform", description="sparsity of each decoder block, `sparsity` on average: the same; "
                                                  "less where there are more outliers (owl); or where the measured "
                                                  "divergence of the output is least (sensitivity)")
    reach: float = Field(0.08, gt=0, lt=1, description="owl: half of how far apart the sparsities of blocks are; "
                                                           "sensitivity: how far each may be from the average")
    outliers: float = Field(5.0, gt=1, description="owl: times the mean score of its block from which an entry counts "
                                                   "as an outlier")
    sequential: bool | None = Field(None, description="measure each layer of a block with those before it pruned; "
                                                      "false: all of a block at once, as the papers do (default: "
                                                      "false; true for sparsegpt on a mixture of experts, whose "
                                                      "Hessians would all lie in memory)")
    experts: Literal["routed", "all"] = Field("routed", description="what experts of a mixture are measured on: the "
                                                                    "tokens that were sent to them, or all")
