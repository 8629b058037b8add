"""SHA-256 of files, remembered by path, size and time of change, so that a plan does not read gigabytes twice.

The memory is a small JSON file beside the store. It is a convenience: when it cannot be read or written, the files are
hashed again. A file changed in place within the clock's resolution and to the same size would be missed, as by `make`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["FileHashes"]

_WORTH_REMEMBERING = 1_000_000  # bytes; smaller files are quicker to hash than to look up safely


class FileHashes:
    """`with FileHashes(path) as hashes: hashes.of(file)`. What is new is written when the block ends."""

    def __init__(self, memory: Path | None) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        self._changed = False

    def __enter__(self) -> FileHashes:
        if self._memory is not None:
            with contextlib.suppress(OSError, ValueError):
                known = json.loads(self._memory.read_text(encoding="utf-8"))
                self._known = known if isinstance(known, dict) else {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if not self._changed or self._memory is None or not self._memory.parent.is_dir():
            return
        scratch = self._memory.with_name(f".{self._memory.name}.{os.urandom(4).hex()}")
        with contextlib.suppress(OSError):
            scratch.write_text(json.dumps(self._known), encoding="utf-8")
            os.replace(scratch, self._memory)

    def of(self, path: Path) -> str:
        """SHA-256 (hex) of the file's bytes. OSError when it cannot be read."""
        stat = path.stat()
        name, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(name)
        if isinstance(known, list) and len(known) == 3 and known[:2] == state and stat.st_size >= _WORTH_REMEMBERING:
            return str(known[2])
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if stat.st_size >= _WORTH_REMEMBERING:
            self._known[name] = [*state, digest]
            self._changed = True
        return digest
