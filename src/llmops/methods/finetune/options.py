"""Options of the fine-tuning methods, and of every step that trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmops.options import Options

__all__ = ["Adapters", "Dpo", "Finetune", "Full", "Lora", "Qlora", "Stop", "Training"]


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


class Training(Options):
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


class Lora(Adapters):
    """Low-rank adapters (Hu et al. 2021), through PEFT."""

    method: Literal["lora"]
    merge: bool = Field(True, description="fold the adapters into the weights; false keeps a PEFT adapter folder")


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


class Full(Training):
    """Every weight is trained."""

    method: Literal["full"]


class Dpo(Training):
    """Direct preference optimization (Rafailov et al. 2023): towards the better of two answers."""

    method: Literal["dpo"]
    data: str = Field(description="name of the data with pairs: prompt, chosen, rejected")
    learning_rate: Annotated[float, Field(gt=0, le=1.0)] | Literal["auto"] = Field(
        1e-5, description="peak learning rate, a twentieth of what the other methods begin with; with rank: null the "
                          "default is 1e-6. auto: found by a range test before the training (Smith 2017)")
    beta: float = Field(0.1, gt=0, le=1000, description="how dear it is to leave the reference, the model that the "
                                                        "step starts from; smaller goes further")
    loss: Literal["sigmoid", "hinge", "ipo"] = Field(
        "sigmoid", description="on the reward margin: sigmoid of the paper, hinge (SLiC, Zhao et al. 2023), or ipo "
                               "(Azar et al. 2023), which stops at a finite margin")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs whose sides may be the wrong way "
                                                                  "round (cDPO); sigmoid alone")
    sft_weight: float = Field(0.0, ge=0, le=1000, description="adds this times the chosen answer's own loss, nats a "
                                                              "token (Pang et al. 2024); 1 keeps it likely")
    average_log_probs: bool = Field(False, description="compare answers by nats a token instead of a whole, against a "
                                                       "pull towards length; wants a larger beta; usual with ipo")
    rank: int | None = Field(16, ge=1, le=4096, description="rank r of the adapters; null trains every weight")
    alpha: float = Field(32.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="names of the linear layers that get an adapter, or all-linear (lm_head excepted)")
    merge: bool = Field(True, description="fold the adapters into the weights; false keeps a PEFT adapter folder")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_all_weights(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("rank", 16) is None and "learning_rate" not in given:
            return {**given, "learning_rate": 1e-6}
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Dpo:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"given label_smoothing {self.label_smoothing:g} with loss: {self.loss}, which has no use "
                             "for it; expected loss: sigmoid, or no label_smoothing")
        if self.rank is None and not self.merge:
            raise ValueError("given merge: false with rank: null, which makes no adapter to keep apart; expected a "
                             "rank, or no merge")
        return self


Finetune = Annotated[Lora | Qlora | Full | Dpo, Field(discriminator="method")]
