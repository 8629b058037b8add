"""Who else is at work while something is measured: other llmops on this machine, other processes on the GPU.

Everybody who measures holds a file `PID-TOKEN.measuring` of its own under an exclusive lock, in a folder that all
users of the machine share. Whoever begins writes its process into the files of those who are at it, and reads its own
when it ends: so both know of each other, whichever began first and even if one lay within the other. Those who work
without measuring, as a run that trains, hold the machine (`reserve.py`): their files are `PID-TOKEN.run`, and they
write their process into the files of those who measure likewise. A file whose process is gone is unlocked, means
nothing, and is removed.

With `exclusive` the one who comes second is refused (a whole run already at its start: `reserve.py`). Without it both
figures are kept, and say that they overlap.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmops.errors import LlmopsError

try:
    import fcntl
except ImportError:  # Windows: nobody is seen
    fcntl = None  # type: ignore[assignment]

__all__ = ["Beside", "beside", "holders", "shared_folder", "tell"]

_MEASURES, _WORKS = "llmops process {} measures on this machine", "llmops process {} is at work on this machine"


def shared_folder() -> Path:
    """Where those who measure and those who work on this machine find each other."""
    return Path(tempfile.gettempdir()) / "llmops-measuring"


class Beside:
    """`found`: lines on who else was there, complete once the block has ended."""

    def __init__(self) -> None:
        self.found: list[str] = []


@contextmanager
def beside(exclusive: bool = False, gpus: list[dict[str, Any]] | None = None, folder: Path | None = None
           ) -> Iterator[Beside]:
    """Watch for others while the block lasts. gpus: what `environment.gpus` tells of the devices in use.

    Raises LlmopsError at once when `exclusive` is asked for and somebody is there already, or when somebody came
    while the block lasted.
    """
    result, place = Beside(), folder or shared_folder()
    crowded = [f"{device['name']} runs {device['other_processes']} other process(es)" for device in gpus or []
               if device.get("other_processes")]
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(_announced(place)) if fcntl is not None else None
        there = _there(place, tell(place, "measures", mine)) if mine is not None else {}
        result.found += [*crowded, *there.values()]
        _refuse(exclusive, result.found)
        yield result
        if mine is not None:
            came = (line.partition(" ") for line in mine.read_text(encoding="utf-8").splitlines())
            told = {int(pid): (_WORKS if what == "works" else _MEASURES).format(pid) for pid, _, what in came}
            result.found += [line for pid, line in (told | _there(place, [])).items() if pid not in there]
        _refuse(exclusive, result.found)


def _there(place: Path, measuring: list[int]) -> dict[int, str]:
    """A line on each process that works or measures here now, our own work left out."""
    working = {each["pid"]: f"{_WORKS.format(each['pid'])} ({each['what']})" for each in holders(place)
               if each["pid"] != os.getpid()}
    return working | {pid: _MEASURES.format(pid) for pid in measuring}


def _refuse(exclusive: bool, found: list[str]) -> None:
    if exclusive and found:
        raise LlmopsError(f"exclusive measuring was asked for, and {'; '.join(found)}; expected nobody: wait for them, "
                          "or measure without --exclusive (measure.exclusive), and the figures will say so")


@contextmanager
def _announced(place: Path) -> Iterator[Path | None]:
    """A file of our own under a lock; None where the folder cannot be written to: others are then not seen."""
    path = place / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.measuring"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            place.chmod(0o1777)  # every user's
        while True:
            file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed below, when the lock goes
            path.chmod(0o666)
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():
                break
            file.close()  # somebody took it for one that was left behind, before it was locked
    except OSError:
        yield None
        return
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        file.close()


def tell(place: Path, what: str, mine: Path | None = None) -> list[int]:
    """Write that this process "works" or "measures" into the files of those who measure now; their processes."""
    found = []
    for path in sorted(place.glob("*.measuring")):
        if path == mine:
            continue
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.write(f"{os.getpid()} {what}\n")
                found.append(int(path.name.partition("-")[0]))
            else:
                path.unlink(missing_ok=True)  # its process is gone
    return found


def holders(place: Path) -> list[dict[str, Any]]:
    """What those who hold the machine now say of themselves (`reserve.py`); files of processes that are gone go."""
    found = []
    for path in sorted(place.glob("*.run")):
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(dict(json.load(file)))
            else:
                path.unlink(missing_ok=True)
    return found
