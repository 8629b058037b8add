"""Options of every method that trains adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.finetune.options.training import Training

__all__ = ["Adapters"]


class Adapters(Training):
    """What LoRA and QLoRA share: size, scale, place and start of the adapters."""

    rank: int = Field(16, ge=1, le=4096, description="rank r of the adapters")
    alpha: float = Field(32.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="names of the linear layers that get an adapter, or all-linear (lm_head excepted)")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023), so that a high rank "
                                            "learns as fast as a low one")
    dora: bool = Field(False, description="train the length of each weight row apart from its direction (Liu et al. "
                                          "2024); more time a step")
    init: Literal["default", "pissa", "loftq"] = Field(
        "default", description="default: the adapters add nothing at first (Hu et al. 2021). pissa: they hold the "
                               "largest singular directions of the weight (Meng et al. 2024). loftq: they make up for "
                               "the rounding of a 4-bit base (Li et al. 2023; only with method: qlora)")
    lora_plus_ratio: float = Field(0.0, ge=0, le=1000, description="learning rate of B over that of A (LoRA+, Hayou "
                                                                   "et al. 2024); 0: one rate for both, 16 is usual")
