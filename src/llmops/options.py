"""The base of every block of options that a recipe can hold.

Each room that a recipe configures keeps its options in an `options.py` beside its code. Those files import this one
and pydantic, nothing heavier, so that a recipe is validated and planned without torch.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Options"]


class Options(BaseModel):
    """Frozen, and strict about keys: an unknown key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())
