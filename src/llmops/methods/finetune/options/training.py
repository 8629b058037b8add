"""Options of every step that trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llmops.options import Options

__all__ = ["Stop", "Training"]


class Stop(Options):
    """When to stop before the last epoch: the held-out loss no longer falls, or falls too little for its energy."""

    data: str | None = Field(None, description="name of the held-out data; default: `holdout` of the training rows")
    holdout: float = Field(0.05, gt=0, lt=0.5, description="share of the training rows that is held out, where `data` "
                                                           "names none")
    every: int = Field(50, ge=1, description="optimizer steps between two looks at the held-out loss")
    patience: int = Field(3, ge=1, description="looks in a row that may gain too little before the training stops")
    min_gain: float = Field(0.0, ge=0, description="fall of the held-out loss (nats a token) that counts as a gain")
    min_gain_per_kilojoule: float | None = Field(
        None, gt=0, description="fall of the held-out loss that a kilojoule has to buy; less counts as too little")
    share: float = Field(0.1, gt=0, le=1, description="largest share of the training's cost that the looks may add")


class Training(Options, defer_build=True):
    """What every training step shares: how long, how fast, how much at once."""

    data: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="name of the data to train on, or a list of names whose rows are mixed")
    epochs: float = Field(1.0, gt=0, le=1000, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps, whatever the epochs")
    learning_rate: Annotated[float, Field(gt=0, le=1.0)] | Literal["auto"] = Field(
        2e-4, description="peak learning rate; auto: found by a range test before the training (Smith 2017)")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning-rate schedule")
    warmup: float = Field(0.03, ge=0, lt=1, description="fraction of the steps spent warming up")
    batch_size: int = Field(8, ge=1, description="rows a forward pass holds")
    batch_tokens: int | None = Field(None, ge=8, description="tokens a forward pass holds at most, instead of "
                                                             "batch_size; rows are never cut for it")
    accumulate: int = Field(1, ge=1, description="forward passes a step of the optimizer adds up")
    packing: bool = Field(True, description="rows follow each other without padding, positions and attention apart; "
                                            "false pads them to the longest")
    max_length: int = Field(1024, ge=8, description="tokens a row may have; longer ones are cut, counted and shown")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "sgd"] = Field(
        "adamw", description="8-bit ones (Dettmers et al. 2021) through bitsandbytes")
    weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled weight decay, of matrices alone")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are scaled down to this norm")
    neftune_alpha: float = Field(0.0, ge=0, le=100, description="noise on the embeddings while training (Jain et al. "
                                                                "2023); 0: none, 5 is usual")
    gradient_checkpointing: bool = Field(False, description="compute activations again in the backward pass: about a "
                                                            "third more time, much less memory")
    stop: Stop | None = Field(None, description="stop early; without it the last step's weights are kept")

    @property
    def mixed(self) -> list[str]:
        """The names in `data`, one or several."""
        return [self.data] if isinstance(self.data, str) else self.data
