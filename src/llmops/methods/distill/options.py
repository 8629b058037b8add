"""Options of the distillation methods."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.finetune.options import Training

__all__ = ["Distill", "Logits"]


class Logits(Training):
    """Match the teacher's next-token distribution (Hinton et al. 2015), every weight of the student trained."""

    method: Literal["logits"]
    teacher: str = Field(description="name of the variant that teaches (base: the model itself)")
    loss: Literal["forward_kl", "reverse_kl"] = Field("forward_kl", description="KL(teacher, student) or its reverse")
    temperature: float = Field(1.0, gt=0, le=100, description="softens both distributions; the loss is scaled by T^2")
    hard_weight: float = Field(0.0, ge=0, lt=1, description="share of the loss that comes from the labels themselves")


Distill = Logits
