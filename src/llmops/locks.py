"""Who is at work on what, so that several runs may share one store.

A lock is a file `NAME.lock` under an exclusive `flock`. The kernel holds it for the process, not the file: when the
holder ends, however it ends, the lock is free at once, and a file that was left behind means nothing. Who holds it
(process, host, since when, by which command) is written into the file, for messages alone. Whoever lets go removes the
file while it still holds the lock, and whoever gets a lock looks whether its file is still the one in the folder.

    local disks, and NFS as Linux mounts it       flock; on NFS a dead client's lock goes when its lease ends
    file systems that refuse flock, and Windows   a heartbeat: a file `NAME.beat` made with O_EXCL and touched every few
                                                  seconds. It is taken over when its process is gone from this host, or
                                                  when this process has seen no beat for `stale_s` by its own clock

With the heartbeat a holder that was stopped for longer than that (a laptop asleep) may find its lock taken; both then
build the same thing, and the one that comes second keeps what is there. Not supported: NFS mounted with `nolock` or
`local_lock=flock` on several hosts at once, where each host sees only its own locks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from llmops.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Holder", "Lock", "Locks", "alive"]

STALE_S = 60.0
NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. token: tells two holders apart; since: local time of its host."""

    pid: int
    host: str
    since: str
    command: str
    token: str

    def __str__(self) -> str:
        return f"{self.pid} on {self.host}, since {self.since} ({self.command})"


class Lock:
    """A lock that is held; leaving the `with` block lets it go."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._release()


class Locks:
    """The locks in a folder. stale_s: silence after which a heartbeat is taken over, where there is no flock."""

    def __init__(self, folder: Path, stale_s: float = STALE_S) -> None:
        self.folder, self.stale_s = folder, stale_s
        self._flock = fcntl is not None
        self._seen: dict[str, tuple[int, float]] = {}  # name -> (last beat, when it was first seen by our clock)

    def take(self, name: str) -> Lock | None:
        """The lock, or None while somebody else has it. Raises StoreError when the folder cannot be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._flock:
                try:
                    return self._take_flock(name)
                except OSError as error:
                    if error.errno not in NO_FLOCK:
                        raise
                    self._flock = False
                    self._path(name, "lock").unlink(missing_ok=True)
            return self._take_beat(name)
        except OSError as error:
            raise StoreError(f"{self.folder}: no lock can be taken there ({error}); expected a folder that can be "
                             "written to; free some disk, or name another place with --runs") from error

    def holder(self, name: str) -> Holder | None:
        """Who has the lock, as far as the file tells."""
        return _read(self._path(name, "lock" if self._flock else "beat"))

    def sweep(self, names: Iterable[str]) -> None:
        """Remove the files of locks that nobody holds."""
        for name in names:
            if self._path(name, "lock").exists() or self._path(name, "beat").exists():
                lock = self.take(name)
                if lock is not None:
                    with lock:
                        pass

    def _path(self, name: str, ending: str) -> Path:
        return self.folder / f"{name}.{ending}"

    # ------------------------------------------------------------------------------------------------------ flock

    def _take_flock(self, name: str) -> Lock | None:
        path = self._path(name, "lock")
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is(handle, path):  # its holder removed it between our two calls
                    os.close(handle)
                    continue
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            with contextlib.suppress(OSError):  # a full disk: the lock holds, its holder stays unnamed
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(asdict(_me())).encode())

            def release(handle: int = handle) -> None:
                path.unlink(missing_ok=True)
                os.close(handle)

            return Lock(release)

    # -------------------------------------------------------------------------------------------------- heartbeat

    def _take_beat(self, name: str) -> Lock | None:
        path, me = self._path(name, "beat"), _me()
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if self._is_stale(name, path) and self._clear(path):
                return self._take_beat(name)
            return None
        try:
            os.write(handle, json.dumps(asdict(me)).encode())
        finally:
            os.close(handle)
        halt = threading.Event()

        def beat() -> None:
            while not halt.wait(self.stale_s / 6):
                with contextlib.suppress(OSError):
                    os.utime(path)

        thread = threading.Thread(target=beat, name="llmops-lock", daemon=True)
        thread.start()

        def release() -> None:
            halt.set()
            thread.join()
            held = _read(path)
            if held is not None and held.token == me.token:
                path.unlink(missing_ok=True)

        return Lock(release)

    def _is_stale(self, name: str, path: Path) -> bool:
        try:
            beat = path.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        held = _read(path)
        if held is not None and held.host == socket.gethostname() and not alive(held.pid):
            return True
        last, since = self._seen.get(name, (None, 0.0))
        if last != beat:
            self._seen[name] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > self.stale_s

    def _clear(self, path: Path) -> bool:
        """Put a stale file aside; False when another process was quicker and what lies there now is alive."""
        before = _read(path)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return True
        now = _read(aside)
        mine = now is None or before is None or now.token == before.token
        if not mine:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return mine


def alive(pid: int) -> bool:
    """Whether a process of this host still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, and is not ours
        return True
    return True


def _me() -> Holder:
    return Holder(os.getpid(), socket.gethostname(), f"{datetime.now():%Y-%m-%d %H:%M:%S}",
                  " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200], uuid.uuid4().hex)


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is(handle: int, path: Path) -> bool:
    try:
        there, here = path.stat(), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
