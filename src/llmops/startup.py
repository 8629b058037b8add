"""What lets a short command answer at once: `@at_once()` keeps habits of Python, pydantic and PyYAML out of its way.

All of them are work at import that such a command has no use for. Beside each, the instructions that `llmops validate`
takes more without the cure (640 million with all of them; CPython 3.11, whose `-c pass` takes 40):

    plugins      pydantic looks for them when the first model class is made, by `importlib.metadata`:   62 million
    TypedDict    pydantic_core describes its schemas in ninety of them, for type checkers:              51 million
    patterns     PyYAML and what pydantic imports compile theirs at import, and use hardly any:         77 million
    collector    walks through all that was imported, meanwhile and at the end, and finds no garbage:   54 million

None of this changes what a command does. One that trains wants its collector, and has the time for the rest.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["at_once"]

_METADATA = "importlib.metadata"
_SWITCH = "PYDANTIC_DISABLE_PLUGINS"
_compile = re.compile


@contextmanager
def at_once() -> Iterator[None]:
    """No search for plugins, no needless work at import and no garbage collection, for a command that ends when the
    block does.

    A user who wants pydantic's plugins sets PYDANTIC_DISABLE_PLUGINS to something else, as an empty string.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        with _patterns_compiled_when_used():
            if "pydantic_core" not in sys.modules:
                _import_core()
            if os.environ.setdefault(_SWITCH, "__all__") == "__all__" and _METADATA not in sys.modules:
                _import_options()
            import_module("yaml")
        yield
    finally:
        gc.freeze()  # what is left goes with the process, unsearched
        if was_on:
            gc.enable()


@contextmanager
def _patterns_compiled_when_used() -> Iterator[None]:
    re.compile = _Pattern  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        re.compile = _compile


class _Pattern:
    """Stands in for a compiled pattern, and compiles it when anything of it is used."""

    def __init__(self, pattern: Any, flags: int = 0) -> None:
        self._given = pattern, flags

    def __getattr__(self, name: str) -> Any:
        return getattr(_compile(*self._given), name)  # `re` remembers it


def _import_core() -> None:
    """Import pydantic_core with plain classes of dictionaries for its descriptions of schemas."""
    homes = [import_module(name) for name in ("typing", "typing_extensions")]
    real = [home.TypedDict for home in homes]
    try:
        for home in homes:
            home.TypedDict = _Plain  # type: ignore[attr-defined]
        with suppress(TypeError):  # one that makes them otherwise is imported as it is, later
            import_module("pydantic_core")
    finally:
        for home, typed_dict in zip(homes, real, strict=True):
            home.TypedDict = typed_dict  # type: ignore[attr-defined]


class _Plain(dict[str, Any]):
    """Stands in for TypedDict."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()


def _import_options() -> None:
    """Import pydantic, as far as the base of all options, with a stand-in for the module it would never use."""
    sys.modules[_METADATA] = stand_in = _Metadata(_METADATA)
    try:
        import_module("llmops.options")
    finally:
        if sys.modules.get(_METADATA) is stand_in:
            del sys.modules[_METADATA]


class _Metadata(ModuleType):
    """Stands in for `importlib.metadata`, and imports it when anything of it is used."""

    def entry_points(self, **which: str) -> Any:
        return self.__getattr__("entry_points")(**which)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks of every module
            raise AttributeError(name)
        if sys.modules.get(_METADATA) is self:
            del sys.modules[_METADATA]
        return getattr(import_module(_METADATA), name)
