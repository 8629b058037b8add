"""What one build makes and many use: a teacher's signals, data that a teacher wrote.

A folder under `runs/`, found by its key. It is made in shards, each written beside its place, flushed and renamed, so a
kill loses the shard under way and nothing else; the next build with the same key goes on after the last whole one. What
each shard cost is written beside it with the build that paid, so that the whole can be charged to all who use it: the
build that happened to come first would otherwise look dear and its siblings free.

    KEY/parts.json          what the key is made of
    KEY/SHARD               a finished shard, whatever it is
    KEY/SHARD.cost.json     seconds and joules of making it, and the build that made it
    KEY/manifest.json       there when all shards are
    KEY/users/BUILD         a build that used it
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmops.build.attempts import summed
from llmops.errors import StoreError
from llmops.locks import Locks
from llmops.quantity import Quantity

__all__ = ["Shared"]

POLL_S = 0.5
Reading = tuple[float, Quantity]  # (seconds, joules) since some moment


@dataclass
class Shared:
    """One such folder. user: key of the build that uses it now; reading: what this attempt has spent so far."""

    folder: Path
    parts: Mapping[str, str]
    user: str = ""
    reading: Callable[[], Reading] = lambda: (0.0, Quantity.null("J", "nothing is metered here"))
    note: Callable[[str], None] = field(default=lambda text: None)

    @contextmanager
    def making(self) -> Iterator[None]:
        """Alone with the folder, so that two builds do not make the same thing. Raises StoreError when it cannot be
        written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            locks = Locks(self.folder.parent)
            while (lock := locks.take(self.folder.name)) is None:
                time.sleep(POLL_S)
            with lock:
                for left in self.folder.glob(".*"):  # of a process that was killed while it wrote
                    left.unlink(missing_ok=True)
                if not (self.folder / "parts.json").exists():
                    self._write("parts.json", json.dumps(self.parts, indent=1, sort_keys=True).encode())
                yield
        except OSError as error:
            raise StoreError(f"{self.folder}: could not be written ({error}); expected room and the right to write; "
                             "free some disk or name another place with --runs, and run the same command again: "
                             "finished shards are kept") from error

    def shard(self, name: str, make: Callable[[], bytes]) -> bool:
        """Write the shard `name` unless it is there; whether it was made now. Inside `making`."""
        if (self.folder / name).exists():
            return False
        before = self.reading()
        scratch = self._scratch(name, make())
        after = self.reading()
        cost = {"wall_s": after[0] - before[0], "energy_j": _between(before[1], after[1]).as_dict(), "by": self.user}
        self._write(f"{name}.cost.json", json.dumps(cost).encode())
        scratch.replace(self.folder / name)
        return True

    def remembered(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, a JSON value that all users share, or what it gave before."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            with self.making():
                self.shard(path.name, lambda: json.dumps(make()).encode())
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: cannot be read ({error}); remove {self.folder} and run the same command again: "
                             "it will be made anew") from error

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """All shards are there."""
        self._write("manifest.json", json.dumps({**manifest, "parts": dict(self.parts)}, indent=1,
                                                sort_keys=True).encode())

    def manifest(self) -> dict[str, Any] | None:
        """What `finish` was given; None while it is being made. Raises StoreError when it is damaged."""
        path = self.folder / "manifest.json"
        if not path.exists():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: cannot be read ({error}); remove {self.folder} and run the same command again: "
                             "it will be made anew") from error

    def used(self) -> None:
        """Remember that `user` uses it."""
        if self.user:
            users = self.folder / "users"
            users.mkdir(exist_ok=True)
            (users / self.user).touch()

    def users(self) -> set[str]:
        """Keys of the builds that have used it."""
        return {path.name for path in (self.folder / "users").glob("*")}

    def cost(self, by: str | None = None) -> tuple[Quantity, Quantity]:
        """(seconds, joules) of making all shards, or those that the build `by` made; 0 where there are none."""
        bodies = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.cost.json"))
                  if path.with_name(path.name.removesuffix(".cost.json")).exists()]
        every = [body for body in bodies if by in (None, body["by"])]
        if not every:
            return Quantity.measured(0.0, "s", "nothing was made"), Quantity(0.0, "J", "constant", "nothing was made")
        wall = sum(float(body["wall_s"]) for body in every)
        return (Quantity.measured(wall, "s", f"wall clock of {len(every)} shards"),
                summed([(float(body["wall_s"]), Quantity.from_dict(body["energy_j"])) for body in every], "shards"))

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def _write(self, name: str, body: bytes) -> None:
        self._scratch(name, body).replace(self.folder / name)

    def _scratch(self, name: str, body: bytes) -> Path:
        scratch = self.folder / f".{name}.{os.getpid()}"
        with open(scratch, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        return scratch


def _between(before: Quantity, after: Quantity) -> Quantity:
    if after.value is None:
        return after
    if before.value is None:
        return before
    return Quantity(after.value - before.value, "J", after.provenance, after.method)
