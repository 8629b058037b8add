"""What a recipe is made of, once it has been read.

The leaves (a method's options, a data source, a score, the workload) are the pydantic models that the rooms keep beside
their code. This file adds the few that belong to no room (`ModelSource`, `Runtime`, `Goal`) and the frozen objects that
hold them together. `STEPS` is the one place that says which methods a recipe can name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from llmops.data.options import DataSource
from llmops.evaluate.options import Evaluation
from llmops.measure.options import Budget, MeasureOptions
from llmops.options import Models, Options

__all__ = ["BASE", "BOUNDS", "COSTS", "NAME", "RESERVED", "STEPS", "Card", "Goal", "Goals", "Kind", "ModelSource",
           "Recipe", "Runtime", "TRACKERS", "Tracking", "Variant", "score_ids"]

Kind = Literal["finetune", "prune", "quantize", "distill"]
#: Kind of step -> method -> options; only what a recipe names is imported.
STEPS = {
    "finetune": Models("llmops.methods.finetune.options", {"lora": "Lora", "qlora": "Qlora", "full": "Full",
                                                           "dpo": "Dpo"}),
    "prune": Models("llmops.methods.prune.options", {"magnitude": "Magnitude", "wanda": "Wanda",
                                                     "sparsegpt": "Sparsegpt", "depth": "Depth", "width": "Width"}),
    "quantize": Models("llmops.methods.quantize.options", {
        "rtn": "Rtn", "gptq": "Gptq", "awq": "Awq", "hqq": "Hqq", "autoround": "Autoround", "auto": "Auto",
        "smoothquant": "Smoothquant", "kv_cache": "KvCache"}),
    "distill": Models("llmops.methods.distill.options", {"logits": "Logits"}),
}
#: Where `report_to` can send what a training tells.
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
BASE = "base"  # the name of the model itself
#: Costs that a goal can bound and `prefer` can name.
COSTS = ("joules_per_token", "decode_tokens_per_s", "first_token_ms", "disk_bytes", "weights_bytes",
         "peak_memory_bytes")
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"  # a folder on every system, and one word on a command line
#: YAML 1.1 readers take the first of these for truth values; Windows keeps the others for devices.
RESERVED = frozenset(("yes", "no", "on", "off", "true", "false", "null", "con", "prn", "aux", "nul"))


#: What a goal can bound.
BOUNDS = ("max_drop", "noninferior", "max_gap", "max_ratio", "min", "max")


class ModelSource(Options):
    """The model that everything starts from: a hub id, a folder, or builtin:tiny."""

    id: str = Field(min_length=1, description="hub id, folder (beside the recipe, or absolute), or builtin:tiny")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model; true only for code "
                                                       "you have read")


class Runtime(Options):
    """The machine and the precision that every variant is built and scored with."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: that of the model; on a CPU without instructions for it, float32")
    device: str = Field("auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$", description="auto: the first GPU, else the CPU")
    kernel: Literal["auto", "torch", "reference", "triton", "ops"] = Field(
        "auto", description="which kernels compressed weights run on; ops: those of llmops_kernels, on a CPU what they "
                            "are checked against")
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads; default: those of torch")
    checkpoint_s: float = Field(60.0, gt=0, description="seconds between two checkpoints of a training; the first "
                                                        "follows the first step. Changes no result")


class Tracking(Options):
    """Where the trackers of `report_to` put what they are told. Changes no build and no score."""

    project: str | None = Field(None, min_length=1, description="project or experiment; default: name of the recipe")
    folder: str | None = Field(None, min_length=1, description="folder for tensorboard, wandb and mlflow (beside the "
                                                               "recipe, or absolute); default: runs/NAME/tracking")


class Card(Options):
    """What only people can say of the models that come out: printed in every model card and in the report, as stated.
    What is left out is said to be stated by nobody. Changes no build and no score."""

    intended_use: str | None = Field(None, min_length=1, description="what the models are for, and for whom")
    out_of_scope: str | None = Field(None, min_length=1, description="what they must not be used for")
    limitations: list[Annotated[str, Field(min_length=1)]] = Field(
        [], max_length=50, description="known limits, beside those that the run measured; each a line")
    license: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,63}$",
                                description="of the models, by the hub's short name, as apache-2.0 or other")


class Goal(Options):
    """Bounds on one score or one cost. `max_drop`, `noninferior`, `max_gap` and `max_ratio` compare with the variant
    named in `against`."""

    max_drop: float | None = Field(None, ge=0, description="how much worse than the other variant, at most, in the "
                                                           "unit of the score or cost")
    noninferior: float | None = Field(None, gt=0, description="a margin that the drop of a score must be shown to "
                                                              "stay within: one-sided test at 2.5 %, corrected by Holm "
                                                              "over the variants")
    max_gap: float | None = Field(None, ge=0, description="how much more than the other items those of any one group "
                                                          "may lose; for a score with `slices`")
    max_ratio: float | None = Field(None, gt=0, description="largest value divided by that of the other variant")
    min: float | None = Field(None, description="smallest value")
    max: float | None = Field(None, description="largest value")
    against: str | None = Field(None, description="the variant compared with; default: base")

    @property
    def reference(self) -> str | None:
        """The variant compared with, or None for a goal that compares with none."""
        given = (self.max_drop, self.noninferior, self.max_gap, self.max_ratio)
        return (self.against or BASE) if any(bound is not None for bound in given) else None

    def bounds(self) -> dict[str, float]:
        """The bounds that are given, by name."""
        return {name: bound for name in BOUNDS if (bound := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Goals:
    """`quality` by score id (`exact_match:test`), `costs` by the names of COSTS; `prefer` is one of either."""

    quality: dict[str, Goal]
    costs: dict[str, Goal]
    prefer: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As rows keep them: `{"quality": {id: bounds}, "costs": {name: bounds}, "prefer": ...}`; {} without goals."""
        if not (self.quality or self.costs or self.prefer):
            return {}
        return {"quality": {key: goal.model_dump(exclude_none=True) for key, goal in self.quality.items()},
                "costs": {key: goal.model_dump(exclude_none=True) for key, goal in self.costs.items()},
                "prefer": self.prefer}


@dataclass(frozen=True)
class Variant:
    """One step from a parent. `options` is the method's own options object."""

    name: str
    parent: str
    kind: Kind
    options: Any
    score: bool = True
    writers: tuple[str, ...] = ()  # variants that write data which the step reads

    @property
    def method(self) -> str:
        return str(self.options.method)

    @property
    def teacher(self) -> str | None:
        return getattr(self.options, "teacher", None)

    def parents(self) -> list[str]:
        """The variants that must be built first: the parent, a teacher if there is one, then those who write data."""
        first = [self.parent, *([self.teacher] if self.teacher else [])]
        return [*first, *(name for name in dict.fromkeys(self.writers) if name not in first)]

    def data_names(self) -> list[str]:
        """The data that the step reads: what it trains or calibrates on, then what it holds out."""
        return list(dict.fromkeys([*self.read_names(), *self.held_names()]))

    def read_names(self) -> list[str]:
        """The data that the step trains or calibrates on, and last what it judges by, if that is another."""
        data, judge = getattr(self.options, "data", None) or [], getattr(self.options, "judge", None)
        names = [data] if isinstance(data, str) else list(data)
        return names + ([judge] if judge and judge not in names else [])

    def held_names(self) -> list[str]:
        """The data that the step holds out."""
        name = getattr(getattr(self.options, "stop", None), "data", None)
        return [name] if name else []


@dataclass(frozen=True)
class Recipe:
    """A recipe that was found right. `variants` are in the order of building and leave out "base"."""

    version: int
    name: str
    seed: int
    model: ModelSource
    runtime: Runtime
    data: dict[str, DataSource]
    evaluate: list[Evaluation]
    measure: MeasureOptions | None
    variants: dict[str, Variant]
    goals: Goals
    base_dir: Path
    sha256: str  # of the content, whatever its layout and comments
    text: str  # as it was written; empty when it came from Python values
    file: str = "<recipe>"
    report_to: tuple[str, ...] = ()  # of TRACKERS
    tracking: Tracking = field(default_factory=Tracking)
    budget: Budget | None = None
    card: Card = field(default_factory=Card)

    def chain(self, name: str) -> list[Variant]:
        """The steps from base to `name`, first to last; empty for base."""
        steps: list[Variant] = []
        while name != BASE:
            steps.append(self.variants[name])
            name = steps[-1].parent
        return steps[::-1]

    def score_ids(self) -> list[str]:
        """The ids of all scores that a variant gets."""
        return [score for entry in self.evaluate for score in score_ids(entry)]


def score_ids(entry: Evaluation) -> list[str]:
    """The scores of one entry of `evaluate`: one, or for the harness one a task."""
    return [f"harness:{task}" for task in entry.options.tasks] if entry.metric == "harness" else [entry.id]

