"""llmops: one recipe fine-tunes, prunes, quantizes and distills an LLM, and every variant is measured as it ships.

    import llmops

    result = llmops.run("recipe.yaml")                      # everything `llmops tune` does
    model, tokenizer = llmops.load("runs/demo/tuned-w4")    # on its compressed weights, ready to generate
    smaller = llmops.apply(model, tokenizer, {"prune": {"method": "wanda", "sparsity": 0.5, "data": "calib"}}, rows)
    rows = llmops.Ledger("runs/ledger.db").rows("demo")

Importing llmops imports nothing heavy; torch and transformers come with the first call that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmops.errors import (
    DataError,
    LlmopsError,
    ModelError,
    RecipeError,
    StepError,
    StoreError,
)

if TYPE_CHECKING:
    from llmops.api import apply, load
    from llmops.ledger import Ledger
    from llmops.planner import plan
    from llmops.runner import run

__version__ = "0.1.0"

__all__ = ["DataError", "Ledger", "LlmopsError", "ModelError", "RecipeError", "StepError", "StoreError", "__version__",
           "apply", "load", "plan", "run"]

_HOMES = {"run": "llmops.runner", "plan": "llmops.planner", "load": "llmops.api", "apply": "llmops.api",
          "Ledger": "llmops.ledger"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
