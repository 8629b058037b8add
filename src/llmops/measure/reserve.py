"""A machine that a run has for itself, from its start to its end.

`beside.py` sees who is at work while something is measured; by then hours of building are done, and with `exclusive`
the row is lost that was about to be written. So every run that has work to do, whether it measures or not, says so when
it begins: it holds a shared lock on the machine, or with `exclusive` the only one, and a conflict is refused before
anything is done, with who is there. The lock is a `flock` on one file in the folder of `beside.py`; the kernel frees it
when its holder ends, however it ends. Names stand in a file of each holder's own, locked as long as it lives.

Where nothing can be locked (no folder that all can write to, Windows) nobody is seen, and nobody is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from llmops.errors import LlmopsError
from llmops.measure import beside

try:
    import fcntl
except ImportError:  # Windows: nobody is seen
    fcntl = None  # type: ignore[assignment]

__all__ = ["reserved"]


@contextmanager
def reserved(exclusive: bool, what: str, folder: Path | None = None) -> Iterator[None]:
    """Hold the machine while the block lasts: with others at work, or with `exclusive` alone. what: for the others, as
    "run NAME".

    Raises LlmopsError at once when somebody has it for themselves, or with `exclusive` when anybody is there.
    """
    place = folder or beside.shared_folder()
    with contextlib.ExitStack() as stack:
        try:
            held = fcntl is None or _locked(stack, place / "machine.lock", exclusive)
        except OSError:
            held = True
        if not held:
            raise LlmopsError(_refusal(exclusive, beside.holders(place)))
        if fcntl is not None:
            with contextlib.suppress(OSError):
                _named(stack, place / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.run", exclusive, what)
                beside.tell(place, "works")
        yield


def _locked(stack: contextlib.ExitStack, path: Path, exclusive: bool) -> bool:
    """Whether the lock was got; it goes with the stack. Raises OSError where there can be none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        path.parent.chmod(0o1777)  # every user's
    try:  # a file of another user in such a folder may be opened, but not with O_CREAT
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _named(stack: contextlib.ExitStack, path: Path, exclusive: bool, what: str) -> None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    stack.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.write(handle, json.dumps({
        "pid": os.getpid(), "what": what, "exclusive": exclusive, "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]}).encode())
    stack.callback(path.unlink, missing_ok=True)


def _refusal(exclusive: bool, holders: list[dict[str, Any]]) -> str:
    who = "; ".join(f"process {each['pid']} ({each['what']}, since {each['since']}: {each['command']})"
                    for each in holders if exclusive or each["exclusive"]) or "another llmops"
    if exclusive:
        return (f"the machine was asked for exclusively, and others are at work on it: {who}; expected "
                "nobody: wait for them, or run without --exclusive (measure.exclusive), and the figures will say who "
                "else was there")
    return (f"the machine is held exclusively: {who}; expected one that is free or shared: wait until that has ended, "
            "for work beside it would be in its figures")
