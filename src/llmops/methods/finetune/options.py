"""Options of the fine-tuning methods, and of every step that trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llmops.options import Options

__all__ = ["Finetune", "Full", "Lora", "Training"]


class Training(Options):
    """What every training step shares: how long, how fast, how much at once."""

    data: str = Field(description="name of the data to train on")
    epochs: float = Field(1.0, gt=0, le=1000, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps, whatever the epochs")
    learning_rate: float = Field(2e-4, gt=0, le=1.0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning-rate schedule")
    warmup: float = Field(0.03, ge=0, lt=1, description="fraction of the steps spent warming up")
    batch_size: int = Field(8, ge=1, description="rows a forward pass holds")
    accumulate: int = Field(1, ge=1, description="forward passes a step of the optimizer adds up")
    max_length: int = Field(1024, ge=8, description="tokens a row may have; longer ones are cut, counted and shown")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW weight decay")


class Lora(Training):
    """Low-rank adapters (Hu et al. 2021), through PEFT."""

    method: Literal["lora"]
    rank: int = Field(16, ge=1, le=4096, description="rank r of the adapters")
    alpha: float = Field(32.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="names of the linear layers that get an adapter, or all-linear (lm_head excepted)")
    merge: bool = Field(True, description="fold the adapters into the weights; false keeps a PEFT adapter folder")


class Full(Training):
    """Every weight is trained."""

    method: Literal["full"]


Finetune = Annotated[Lora | Full, Field(discriminator="method")]
