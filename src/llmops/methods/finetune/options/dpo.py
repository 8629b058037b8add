"""Options of DPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmops.methods.finetune.options.training import Training

__all__ = ["Dpo"]


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
