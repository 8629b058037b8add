"""What a run is as a process: how it ends when it is told to, and what it is when `torchrun` started several.

`terminable` makes SIGTERM an orderly end (scratch folders are removed, the last note of the energy is written), exit
143. Under torchrun rank 0 is the run; `join` makes the other ranks its helpers: they wait, take part in every step that
trains, and end when it does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmops.errors import StepError
from llmops.progress import log
from llmops.recipe.plan import make_plan
from llmops.recipe.schema import Recipe
from llmops.store import Store

__all__ = ["join", "terminable"]


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM ends the process through all `finally` blocks, exit 143, unless somebody else handles it."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: Any) -> None:
    print("terminated; what was finished is kept, the same command goes on from there", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


@contextmanager
def join(recipe: Recipe, store: Store) -> Iterator[None]:
    """Rank 0 of several gets the others as helpers for the block; on the others this does not return, it exits.

    A process that torchrun did not start goes through. Raises StepError when the processes do not fit the devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    from llmops.train import ranks

    ranks.start(recipe.runtime.device)
    if int(os.environ["RANK"]) > 0:
        _help(recipe, store)
        ranks.stop()
        raise SystemExit(0)
    try:
        yield
    except Exception:
        ranks.tell(None)
        raise
    ranks.tell(None)
    ranks.stop()


def _help(recipe: Recipe, store: Store) -> None:
    import torch

    from llmops.build import assist
    from llmops.models.load import hush
    from llmops.train import ranks

    hush()
    if recipe.runtime.threads:
        torch.set_num_threads(recipe.runtime.threads)
    plan = make_plan(recipe, store.builds)
    while True:
        try:
            variant = ranks.hear()
        except RuntimeError as error:
            raise StepError(f"rank {os.environ['RANK']} has lost rank 0 ({error}); look at what rank 0 said last, and "
                            "run the same command again: it goes on from the last checkpoint") from error
        if variant is None:
            return
        try:
            assist(variant, plan, store)
        except Exception as error:  # rank 0 has heard of it and writes it into the row
            log.error("%s: %s", variant, error)
