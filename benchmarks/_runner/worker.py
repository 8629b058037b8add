"""The far end of a contender: a process that says lines of JSON on stdout, which nothing else may write to.

Standard library alone, since a peer's Python reads it. See `contender.py` for the near end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["Clock", "Mouth", "give_back", "peak_bytes", "questions", "reset_peak", "serve", "why"]


class Mouth:
    """What goes out. Made once, before anything is imported that might print: that goes to stderr from then on."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **message: Any) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()


def why(error: BaseException) -> str:
    """An error in a line."""
    told = str(error).strip().splitlines()
    return f"{type(error).__name__}: {told[0] if told else ''}"[:300]


def questions() -> Iterator[dict[str, Any]]:
    """Lines of stdin, until it is closed."""
    for line in sys.stdin:
        if line.strip():
            yield json.loads(line)


def serve(mouth: Mouth, imports: Iterable[str], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Import first, so that no clock and no memory counts it; say that it is ready; answer every question. An answer
    that raises is {"failed": why}, with the traceback in the log."""
    try:
        for module in imports:
            import_module(module)
    except Exception as error:
        mouth.say(failed=why(error))
        raise
    mouth.say(ready=True)
    for question in questions():
        try:
            mouth.say(**answer(question))
        except Exception as error:  # a contender that cannot do this is a row of the table, not the end of it
            traceback.print_exc()
            mouth.say(failed=why(error))


class Clock:
    """Wall, processor time and memory between `start` and `stop`. A solver with more to prepare starts it again, one
    with more to do afterwards stops it itself: the first stop counts."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def start(self) -> None:
        give_back()
        reset_peak(self.device)
        self.before = _status("VmRSS") if self.device == "cpu" else peak_bytes(self.device)
        self.stopped: dict[str, Any] = {}
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, Any]:
        if not self.stopped:
            self.stopped = {"seconds": time.perf_counter() - self.began,
                            "cpu_seconds": time.process_time() - self.began_cpu,
                            "peak_bytes": peak_bytes(self.device) - self.before}
        return self.stopped


def give_back() -> None:
    """Ask the C library for its freed memory (glibc alone): what a solver took from there would not be counted."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: str = "cpu") -> None:
    """Forget the high-water mark so far (Linux: writing 5 sets VmHWM back to what is resident now)."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str = "cpu") -> int:
    """Bytes at the high-water mark: resident in this process, or allocated on the GPU."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def _status(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(key))
