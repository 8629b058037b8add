"""Options of the distillation methods."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmops.methods.finetune.options import Training
from llmops.options import Options

__all__ = ["Distill", "Logits", "Offline", "OnPolicy", "Student"]


class Student(Options):
    """A student that is no variant: a fresh one of the teacher's architecture, or another pretrained model."""

    config: dict[str, bool | int | float | str] | None = Field(
        None, description="keys of the teacher's config.json that are others in the student's, as {num_hidden_layers: "
                          "3}; its weights are drawn at random from the seed")
    model: str | None = Field(None, min_length=1, description="hub id or folder of a pretrained model with the same "
                                                              "vocabulary, padding rows apart")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")

    @model_validator(mode="after")
    def _one_of_two(self) -> Student:
        if (self.config is None) == (self.model is None):
            raise ValueError(f"given {'neither' if self.config is None else 'both'} of config and model; expected one: "
                             "config: {num_hidden_layers: 3} for a fresh student, model: hub id or folder for a "
                             "pretrained one")
        if self.revision is not None and self.model is None:
            raise ValueError("given a revision without a model; expected it only beside `model`: remove it")
        return self


class Offline(Options):
    """The teacher runs once over the data; its likeliest tokens are kept and serve every student with the same k,
    temperature, data and max_length."""

    k: int = Field(32, ge=1, le=4096, description="likeliest tokens that are kept of each distribution, beside the "
                                                  "mass of all others")
    cache: str | None = Field(None, min_length=1, description="folder of signals made before (beside the recipe, or "
                                                              "absolute), as runs/signals/KEY of another store; "
                                                              "default: made where they are not there")


class OnPolicy(Options):
    """The student answers prompts itself and the teacher judges its words (GKD, Agarwal et al. 2024)."""

    fraction: float = Field(0.5, gt=0, le=1, description="share of the rows whose answer is drawn from the student; "
                                                         "the others keep that of the data (lambda of GKD)")
    temperature: float = Field(1.0, gt=0, le=10, description="of the student's draw; the loss has its own")
    max_new_tokens: int = Field(64, ge=1, le=100_000, description="tokens of a drawn answer, at most")


class Logits(Training):
    """Match the teacher's next-token distribution (Hinton et al. 2015), every weight of the student trained."""

    method: Literal["logits"]
    teacher: str = Field(description="name of the variant that teaches (base: the model itself)")
    student: Student | None = Field(None, description="train another model than the parent: a fresh one, or a "
                                                      "pretrained one")
    loss: Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "skewed_reverse_kl"] = Field(
        "forward_kl", description="divergence of the two distributions: KL(teacher, student) or its reverse, "
                                  "Jensen-Shannon (Agarwal et al. 2024), or skewed (Ko et al. 2024)")
    beta: float = Field(0.5, gt=0, lt=1, description="of jensen_shannon: share of the teacher in the mixture; near 0 "
                                                     "it behaves as forward_kl, near 1 as reverse_kl")
    skew: float = Field(0.1, gt=0, lt=1, description="of skewed_kl and skewed_reverse_kl: share of the first "
                                                     "distribution in the second")
    top_k: int | None = Field(None, ge=1, description="compare the teacher's likeliest tokens, and all others as one; "
                                                      "default: every token (with `offline`: its k)")
    temperature: float = Field(1.0, gt=0, le=100, description="softens both distributions; the loss is scaled by T^2")
    hard_weight: float = Field(0.0, ge=0, lt=1, description="share of the loss that comes from the labels themselves")
    hidden_weight: float = Field(0.0, ge=0, le=1e6, description="weight of matching the teacher's hidden states at "
                                                                "every layer (Jiao et al. 2019), relative to their "
                                                                "size, through a learned matrix where the widths "
                                                                "differ; 0: only what it says is matched")
    attention_weight: float = Field(0.0, ge=0, le=1e6, description="weight of matching where its attention looks, at "
                                                                   "every layer (Wang et al. 2020)")
    answers: Literal["data", "teacher"] = Field(
        "data", description="whose words the student learns: those of the data, or the teacher's own greedy answers to "
                            "its prompts (Kim and Rush 2016), so that prompts without answers will do")
    max_new_tokens: int = Field(64, ge=1, le=100_000, description="tokens of an answer of the teacher; longer ones are "
                                                                  "left out and counted")
    offline: Offline | None = Field(None, description="read the teacher's signals from a cache, written once; {} takes "
                                                      "the defaults. Without it the teacher runs beside the student")
    on_policy: OnPolicy | None = Field(None, description="train on answers that the student draws itself; {} takes the "
                                                         "defaults")

    @model_validator(mode="after")
    def _fits_together(self) -> Logits:
        given = self.model_fields_set
        if "beta" in given and self.loss != "jensen_shannon":
            raise ValueError(f"given beta {self.beta:g} with loss: {self.loss}, which has no use for it; expected "
                             "loss: jensen_shannon, or no beta")
        if "skew" in given and not self.loss.startswith("skewed"):
            raise ValueError(f"given skew {self.skew:g} with loss: {self.loss}, which has no use for it; expected "
                             "loss: skewed_kl or skewed_reverse_kl, or no skew")
        if self.offline is not None:
            self._refuse_offline()
        return self

    def _refuse_offline(self) -> None:
        """What a cache of likeliest tokens cannot give. Raises ValueError."""
        if self.on_policy is not None:
            raise ValueError("given offline and on_policy together: nobody can know beforehand what the student will "
                             "say; expected one of the two")
        matched = [name for name in ("hidden_weight", "attention_weight") if getattr(self, name)]
        if matched:
            raise ValueError(f"given {matched[0]} with offline, which keeps what the teacher says and not its states; "
                             f"expected no {matched[0]}, or no offline: the teacher then runs beside the student")
        if self.top_k is not None:
            raise ValueError(f"given top_k {self.top_k} with offline, whose k says it already; expected offline: "
                             f"{{k: {self.top_k}}} alone")

    @property
    def outcomes(self) -> int | None:
        """Tokens that the loss tells apart; None: all."""
        return self.offline.k if self.offline is not None else self.top_k


Distill = Logits
