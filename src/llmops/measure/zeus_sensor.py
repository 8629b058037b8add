"""Zeus, for what this project has no reader of its own: AMD GPUs, Apple silicon, Jetson boards (extra: llmops[zeus]).

Its device classes are read, not its monitor: they hand out cumulative millijoules, which is what a sensor is here. The
monitor would give 0 J for a machine without sensors and only a warning for a window that its counter did not see.

A board is one part: its total where it tells one, else the sum of what it tells. Lists (single cores) and the managers
of cores lie inside the CPU's figure and are left out; an engine that is not used may stand still. NVIDIA cards and RAPL
are not read this way: `nvml.py` and `rapl.py` are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from llmops.measure.sensors import NotUsable
from llmops.quantity import Provenance

__all__ = ["ZeusCounter", "open_zeus"]


class ZeusCounter:
    """`counters`: part -> a function that gives its joules since some fixed time."""

    provenance: Provenance = "measured"

    def __init__(self, counters: Callable[[], Mapping[str, float]], covers: str, version: str) -> None:
        self.name = "zeus"
        self.method = f"Zeus {version}, energy counters of {covers}"
        self.update_period_s: float | None = None  # differs by board; probed
        self.skipped: dict[str, str] = {}
        self._counters = counters
        self._origin = dict(counters())

    def start(self) -> None:
        pass

    def read(self) -> dict[str, float]:
        return {part: joules - self._origin.get(part, 0.0) for part, joules in self._counters().items()}

    def stop(self) -> None:
        pass


def open_zeus(modules: Callable[[str], Any] = importlib.import_module) -> ZeusCounter:
    """AMD GPUs, else the board. Raises NotUsable with the reason. modules: how modules are found."""
    try:
        gpu, soc, version = modules("zeus.device.gpu"), modules("zeus.device.soc"), modules("zeus").__version__
    except ImportError as error:
        raise NotUsable(f"zeus is not installed ({error}); pip install llmops[zeus]") from error
    reasons = []
    for opener, device in ((_amd, gpu), (_board, soc)):
        try:
            counters, covers = opener(device)
            return ZeusCounter(counters, covers, version)
        except Exception as error:  # each board raises errors of its own when it is not there
            reasons.append(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
    raise NotUsable("zeus finds no AMD GPU and no board it can read: " + "; ".join(reasons))


def _amd(device: Any) -> tuple[Callable[[], Mapping[str, float]], str]:
    found = device.get_gpus()
    if "AMD" not in type(found).__name__:
        raise NotUsable("its GPUs are read by the NVML sensor")
    indices = range(len(found))
    lacking = [index for index in indices if not found.supports_get_total_energy_consumption(index)]
    if lacking or not len(found):
        raise NotUsable(f"AMD GPU {lacking or 'list'} has no energy counter")
    return (lambda: {f"gpu{index}": found.get_total_energy_consumption(index) / 1000 for index in indices},
            f"{len(found)} AMD GPU(s); without the host")


def _board(device: Any) -> tuple[Callable[[], Mapping[str, float]], str]:
    board = device.get_soc()

    def counters() -> dict[str, float]:
        return _board_j(vars(board.get_total_energy_consumption()))

    if not counters():
        raise NotUsable(f"{type(board).__name__} tells no energy")
    return counters, type(board).__name__


def _board_j(fields: Mapping[str, Any]) -> dict[str, float]:
    """Joules from the millijoules of a board's measurement; {} where it tells none."""
    told = {name.removesuffix("_mj").removesuffix("_energy"): value / 1000 for name, value in fields.items()
            if name.endswith("_mj") and isinstance(value, int | float) and "manager" not in name}
    return {"board": told.get("total", sum(told.values()))} if told else {}
