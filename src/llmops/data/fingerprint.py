"""A hash of the options and of the bytes behind a source, without reading a row and without torch.

It is part of a build's key: a changed byte, split or column rebuilds, a file that was only moved or renamed does not.
`limits` are left out, since they change no row. A hub data set without a revision cannot be hashed before it has been
fetched; its id is, with the word "unpinned", and `unpinned` tells a caller to say so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from llmops.data.locate import Located, locate, named
from llmops.data.options import DataSource
from llmops.data.world_size import WORLD_VERSION
from llmops.errors import DataError

__all__ = ["fingerprint", "unpinned"]


def fingerprint(name: str, sources: Mapping[str, DataSource], base_dir: Path) -> str:
    """SHA-256 (hex) over the options and the bytes behind the source `name`. DataError when it is not there."""
    chain = named(name, sources)
    root = chain[-1]
    where = locate(root, base_dir)
    options = [source.model_dump(mode="json", exclude={"source", "from_", "limits", "synthesize"}) for source in chain]
    return hashlib.sha256(json.dumps([options, _content(where, root)], sort_keys=True).encode()).hexdigest()


def unpinned(name: str, sources: Mapping[str, DataSource], base_dir: Path) -> bool:
    """Whether the rows come from the hub at no fixed revision, so that they can change behind the same fingerprint."""
    root = named(name, sources)[-1]
    return locate(root, base_dir).what == "hub" and root.revision is None


def _content(where: Located, source: DataSource) -> list[str]:
    if where.what == "builtin":
        return [where.label, f"version {WORLD_VERSION}"]
    if where.path is None:
        return [where.label, source.revision or "unpinned"]
    if where.what == "file":
        return [where.path.suffix.lower(), _sha256(where.path)]
    paths = where.files.values() if where.files else (path for path in where.path.rglob("*") if path.is_file())
    inside = {path.relative_to(where.path).as_posix(): path for path in paths}
    shown = {key: path for key, path in inside.items() if not any(part.startswith(".") for part in key.split("/"))}
    return [f"{key} {_sha256(shown[key])}" for key in sorted(shown)]


def _sha256(path: Path) -> str:
    try:
        stat = path.stat()
        return _sha256_of(str(path), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights") from error


@lru_cache(maxsize=1024)
def _sha256_of(path: str, size: int, modified_ns: int) -> str:
    """Size and time only tell this process's memory of the hash that the file has changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
