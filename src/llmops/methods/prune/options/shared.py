"""Names that the options of several methods share."""

from __future__ import annotations

from typing import Literal

__all__ = ["Pattern"]

Pattern = Literal["unstructured", "2:4", "4:8"]
