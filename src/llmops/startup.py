"""What lets a short command answer at once: `@at_once()` keeps two habits of Python and pydantic out of its way.

pydantic looks for plugins when the first model class is made, through `importlib.metadata`, which takes as long to
import as a dozen of our classes take to make. And the garbage collector walks through all that was imported, several
times while it is imported and once more at the end, when nothing of it can be garbage. A command that lives for a tenth
of a second spends a sixth of it on these two. Neither changes what a command does; one that trains wants its collector.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["at_once"]

_METADATA = "importlib.metadata"
_SWITCH = "PYDANTIC_DISABLE_PLUGINS"


@contextmanager
def at_once() -> Iterator[None]:
    """No search for plugins and no garbage collection, for a command that ends when the block does.

    A user who wants pydantic's plugins sets PYDANTIC_DISABLE_PLUGINS to something else, as an empty string.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        if os.environ.setdefault(_SWITCH, "__all__") == "__all__" and _METADATA not in sys.modules:
            _import_options()
        yield
    finally:
        gc.freeze()  # what is left goes with the process, unsearched
        if was_on:
            gc.enable()


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
