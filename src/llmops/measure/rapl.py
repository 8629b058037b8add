"""RAPL: the energy counters that Intel and AMD CPUs show under /sys/class/powercap (Linux).

A package domain (`intel-rapl:0`, named `package-0`) counts a socket; its child named `dram` counts the memory, where
there is one. `core` and `uncore` lie inside the package and `psys` around it, `intel-rapl-mmio:*` is the same package
seen through another door: counting them would count twice.

Counters wrap at `max_energy_range_uj`, at 200 W after about 20 minutes, so a thread reads them every 30 s while a
window is open: then no wrap goes by unseen. A counter that was set back (a machine that slept) looks like one that
wrapped, and would be billed nearly its whole range: a wrap that means more than `MOST_WATTS` for a socket is told as a
fall instead, which no window survives. Since 2020 kernels let only root read `energy_uj` (a side
channel, CVE-2020-8694): where it cannot be read, the reason names the cure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from llmops.measure.sensors import NotUsable, Poller
from llmops.quantity import Provenance

__all__ = ["ROOT", "RaplCounter", "open_rapl"]

ROOT = Path("/sys/class/powercap")
UPDATE_PERIOD_S = 0.001
WRAP_WATCH_S = 30.0
MOST_WATTS = 2000.0  # of one socket or its memory; several times what any draws
SHORT_S = 0.01  # readings may lie closer than two changes of the counter


class _Domain:
    """One counter file, unwrapped into joules since it was opened."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._energy = folder / "energy_uj"
        self._clock = clock
        self._at = clock()
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = int(self._energy.read_text())
        self._total_uj = 0

    def joules(self) -> float:
        now, at = int(self._energy.read_text()), self._clock()
        step, passed = now - self._last, max(at - self._at, SHORT_S)
        self._last, self._at = now, at
        if step < 0 and (step + self._range) / 1e6 <= MOST_WATTS * passed:
            step += self._range
        self._total_uj += step  # falls where the counter was set back, which a meter sees
        return self._total_uj / 1e6


class RaplCounter:
    """Sum of all sockets as `cpu` and of their memory as `ram` (only where the machine has that counter)."""

    provenance: Provenance = "measured"

    def __init__(self, packages: list[Path], drams: list[Path], clock: Callable[[], float] = time.perf_counter) -> None:
        self.name = "rapl"
        covered = "CPU packages and DRAM" if drams else "CPU packages; DRAM is not metered on this machine"
        self.method = f"RAPL counters, {len(packages)} socket(s): {covered}; whole machine, other processes included"
        self.update_period_s: float | None = UPDATE_PERIOD_S
        self.skipped: dict[str, str] = {}
        self._lock = threading.Lock()
        self._domains = {"cpu": [_Domain(folder, clock) for folder in packages]}
        if drams:
            self._domains["ram"] = [_Domain(folder, clock) for folder in drams]
        self._watch = Poller(self._poll, WRAP_WATCH_S)

    def _poll(self) -> None:
        self._joules()

    def _joules(self) -> dict[str, float]:
        with self._lock:
            return {part: sum(domain.joules() for domain in group) for part, group in self._domains.items()}

    def start(self) -> None:
        self._watch.start()

    def read(self) -> dict[str, float]:
        self._watch.check()
        return self._joules()

    def stop(self) -> None:
        self._watch.stop()


def open_rapl(root: Path = ROOT, clock: Callable[[], float] = time.perf_counter) -> RaplCounter:
    """The machine's RAPL counters. Raises NotUsable with the reason."""
    if not root.is_dir():
        raise NotUsable(f"{root} does not exist (no RAPL driver: a virtual machine, a container or not Linux)")
    domains = {folder: _name(folder) for folder in sorted(root.glob("intel-rapl:*"))}
    packages = [folder for folder, name in domains.items() if name.startswith("package")]
    if not packages:
        raise NotUsable(f"{root} holds no package domain")
    drams = [folder for folder, name in domains.items() if name == "dram"]
    try:
        return RaplCounter(packages, drams, clock)
    except PermissionError as error:
        raise NotUsable(f"{error.filename} is readable by root only; as root: chmod a+r {root}/intel-rapl:*/energy_uj "
                        f"{root}/intel-rapl:*/*/energy_uj") from error
    except (OSError, ValueError) as error:
        raise NotUsable(f"a RAPL counter cannot be read: {error}") from error


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""
