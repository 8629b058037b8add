"""Options of the score harness."""

from __future__ import annotations

from pydantic import Field

from llmops.evaluate.slice_options import Sliced

__all__ = ["Harness"]


class Harness(Sliced):
    """Tasks of lm-evaluation-harness (the `harness` extra)."""

    tasks: list[str] = Field(min_length=1, description="task names, known to lm-eval or defined under `include`")
    include: str | None = Field(None, description="folder with task YAML files, beside the recipe")
    shots: int | None = Field(None, ge=0, description="examples in the prompt; default: what the task says, else 0")
    metric: str | None = Field(None, description="the metric kept, as acc_norm; default: the first the task names")
    chat: bool = Field(False, description="put the prompts through the model's chat template")
    limit: int | None = Field(None, ge=1, description="items a task")
    batch_size: int = Field(16, ge=1)
