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
    hidden_weight: float = Field(0.0, ge=0, le=1e6, description="weight of matching the teacher's hidden states at "
                                                                "every layer (Jiao et al. 2019), relative to their "
                                                                "size; 0: only what it says is matched")
    answers: Literal["data", "teacher"] = Field(
        "data", description="whose words the student learns: those of the data, or the teacher's own greedy answers to "
                            "its prompts (Kim and Rush 2016), so that prompts without answers will do")
    max_new_tokens: int = Field(64, ge=1, le=100_000, description="tokens of an answer of the teacher; longer ones are "
                                                                  "left out and counted")


Distill = Logits
