"""The base of every block of options that a recipe can hold.

Each room that a recipe configures keeps its options in an `options.py` (or, where a recipe names some out of many, in a
package `options` with a module each) beside its code. Those files import this one and pydantic, nothing heavier, so
that a recipe is validated and planned without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from pydantic import BaseModel, ConfigDict

__all__ = ["Models", "Options"]


class Options(BaseModel):
    """Frozen, and strict about keys: an unknown key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())


class Models(Mapping[str, type[Options]]):
    """Name in a recipe -> options model; a model is imported when it is asked for, the names cost nothing.

    home: the module that has the models; names: name in a recipe -> name of the model there.
    """

    def __init__(self, home: str, names: Mapping[str, str]) -> None:
        self._home, self._names = home, names

    def __getitem__(self, name: str) -> type[Options]:
        model: type[Options] = getattr(import_module(self._home), self._names[name])
        return model

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
