"""NVIDIA GPUs: the total energy counter, and integrated power where a card has no counter.

`nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded, on Volta and later. It covers the
card (on GH200 the module), not the host: CPU, memory, fans and losses of the power supply are not in it. It is updated
about every 100 ms, so a window of 10 s sees 100 updates.

A card without the counter is polled: power (a 1 s running average on Ampere and later) times time, by the trapezoid
rule. That is labelled `estimated`.

All devices that the process can see are counted, each as a part of its own, because a reserved GPU draws power also
when the model does not run on it. NVML ignores CUDA_VISIBLE_DEVICES and orders devices differently from CUDA, so they
are matched by UUID. A MIG slice has no counter of its own (the card's would bill the neighbours too): not usable.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmops.measure.sensors import NotUsable, Poller, Sensor
from llmops.quantity import Provenance

__all__ = ["NvmlCounter", "NvmlPower", "open_nvml", "visible_uuids"]

COUNTER_PERIOD_S = 0.1
POWER_PERIOD_S = 0.05


class NvmlCounter:
    """The hardware's energy counters. `handles`: part name -> NVML device handle; `nvml`: the pynvml module."""

    provenance: Provenance = "measured"

    def __init__(self, nvml: Any, handles: Mapping[str, Any]) -> None:
        self.name = "nvml"
        self.method = (f"NVML total energy counter of {len(handles)} GPU(s); without CPU, memory and cooling of the "
                       "host")
        self.update_period_s: float | None = COUNTER_PERIOD_S
        self.skipped: dict[str, str] = {}
        self._nvml = nvml
        self._handles = dict(handles)
        self._origin = {part: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for part, handle in handles.items()}

    def start(self) -> None:
        pass

    def read(self) -> dict[str, float]:
        count = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        return {part: (count(handle) - self._origin[part]) / 1000 for part, handle in self._handles.items()}

    def stop(self) -> None:
        pass


class NvmlPower:
    """Power polled every 50 ms and integrated by the trapezoid rule."""

    provenance: Provenance = "estimated"

    def __init__(self, nvml: Any, handles: Mapping[str, Any], clock: Callable[[], float] = time.perf_counter,
                 period_s: float = POWER_PERIOD_S) -> None:
        self.name = "nvml-power"
        self.method = (f"integrated power, NVML polled every {period_s * 1000:g} ms (a running average of "
                       f"up to 1 s), {len(handles)} GPU(s); no energy counter on this card")
        self.update_period_s: float | None = COUNTER_PERIOD_S
        self.skipped: dict[str, str] = {}
        self._nvml = nvml
        self._handles = dict(handles)
        self._clock = clock
        self._lock = threading.Lock()
        self._joules = dict.fromkeys(handles, 0.0)
        self._last: tuple[float, dict[str, float]] | None = None
        self._poller = Poller(self._sample, period_s)
        self._watts()  # a card without power readings is found out here, not in the first window

    def _watts(self) -> dict[str, float]:
        return {part: self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000 for part, handle in self._handles.items()}

    def _sample(self) -> None:
        with self._lock:
            now, watts = self._clock(), self._watts()
            if self._last is not None:
                then, before = self._last
                for part, value in watts.items():
                    self._joules[part] += (before[part] + value) / 2 * (now - then)
            self._last = (now, watts)

    def start(self) -> None:
        self._sample()
        self._poller.start()

    def read(self) -> dict[str, float]:
        self._poller.check()
        if self._last is not None:
            self._sample()
        return dict(self._joules)

    def stop(self) -> None:
        self._poller.stop()
        self._sample()
        self._last = None  # what lies between two windows is not billed


def visible_uuids() -> list[str]:
    """UUIDs of the devices that CUDA shows to this process, in CUDA's order."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        found.append(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    return found


def open_nvml(nvml: Any = None, uuids: Sequence[str] | None = None) -> Sensor:
    """The energy counter of all visible devices, else their integrated power. Raises NotUsable with the reason."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise NotUsable(f"nvidia-ml-py is not installed ({error})") from error
    try:
        nvml.nvmlInit()
    except Exception as error:
        raise NotUsable(f"NVML does not start: {error}") from error
    wanted = visible_uuids() if uuids is None else list(uuids)
    if not wanted:
        raise NotUsable("CUDA shows no device to this process")
    handles = {}
    for index, uuid in enumerate(wanted):
        try:
            handles[f"gpu{index}"] = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except Exception as error:
            raise NotUsable(f"NVML does not know device {uuid}: {error}") from error
        if uuid.startswith("MIG-") or _mig(nvml, handles[f"gpu{index}"]):
            raise NotUsable(f"gpu{index} is partitioned (MIG): its counter would bill the other slices too")
    try:
        return NvmlCounter(nvml, handles)
    except Exception as counter:
        try:
            return NvmlPower(nvml, handles)
        except Exception as power:
            raise NotUsable(f"neither energy counter ({counter}) nor power reading ({power})") from power


def _mig(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except Exception:  # cards that cannot be partitioned raise "not supported"
        return False
    return bool(current)
