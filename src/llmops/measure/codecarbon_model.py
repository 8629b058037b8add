"""CodeCarbon's offline model of power, as a sensor. It is an estimate, always labelled so.

The model (CodeCarbon 3, without hardware counters): CPU = thermal design power of the CPU model x the share of CPU
time that this process and its children used; RAM = a constant that depends on how many memory modules a machine of
this size is likely to have. The RAM constant is often most of the total, so halving the CPU's work shows as much less
than half: read the parts.

Why it is driven as it is:

- `OfflineEmissionsTracker`, never the online one: that one asks the network where it is and, without an answer, falls
  back to one particular province. Carbon intensity is not taken from it at all (`carbon.py` applies it last).
- Every option is given, so that neither `.codecarbon.config` nor CODECARBON_* variables change a figure. The token of
  the electricity map is an empty string: None would let the old name of that option be read from the file.
- The task API (`start_task`, `stop_task`): `stop` skips its last sample when the one before is younger than 50 ms.
  Tasks don't nest, so a reading ends one task and begins the next, and the sums make a counter.
- `allow_multiple_runs=True`: the lock of the other mode outlives a killed process and then silences every later run.
- `tracking_mode="process"`: "machine" bills the load of everybody else on the machine to this run.
- One tracker a process: finding the hardware costs seconds, once.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import tempfile
import time
import uuid
from typing import Any

from llmops.measure.sensors import NotUsable
from llmops.quantity import Provenance

__all__ = ["CodeCarbonModel", "open_codecarbon", "tracker_options"]

JOULES_PER_KWH = 3.6e6
CLOCK_TICK_S = 0.01  # CPU time of a process is counted in ticks of 10 ms

_shared: CodeCarbonModel | None = None


def tracker_options(known: set[str]) -> dict[str, Any]:
    """Every option of OfflineEmissionsTracker that the installed version knows, explicitly."""
    wanted: dict[str, Any] = {
        "project_name": "llmops", "measure_power_secs": 1.0, "tracking_mode": "process", "log_level": "error",
        "logger_preamble": "", "output_dir": tempfile.gettempdir(), "output_file": "unused.csv", "output_methods": [],
        "output_handlers": [], "logging_logger": None, "on_csv_write": "append", "metadata": None,
        "prometheus_url": "", "emissions_endpoint": None, "api_call_interval": -1, "api_endpoint": "", "api_key": "",
        "experiment_id": str(uuid.UUID(int=0)), "experiment_name": "llmops", "electricitymaps_api_token": "",
        "gpu_ids": None, "force_cpu_power": None, "force_ram_power": None, "force_mode_cpu_load": False,
        "rapl_include_dram": False, "rapl_prefer_psys": False, "pue": 1.0, "wue": 0.0,
        "force_carbon_intensity_g_co2e_kwh": 0.0, "allow_multiple_runs": True,
        "country_iso_code": None, "region": None, "cloud_provider": None, "cloud_region": None,
        "country_2letter_iso_code": None,
    }
    if "output_methods" not in known:  # before 3.1 the outputs were switched one by one
        wanted |= dict.fromkeys(("save_to_file", "save_to_api", "save_to_logger", "save_to_prometheus",
                                 "save_to_logfire"), False)
    return {name: value for name, value in wanted.items() if name in known}


class CodeCarbonModel:
    """One tracker and the sums of its tasks. Use `open_codecarbon`, which shares one a process."""

    provenance: Provenance = "estimated"

    def __init__(self) -> None:
        try:
            from codecarbon.emissions_tracker import BaseEmissionsTracker, OfflineEmissionsTracker
        except ImportError as error:
            raise NotUsable(f"codecarbon is not installed ({error})") from error
        from importlib.metadata import version

        logging.getLogger("codecarbon").setLevel(logging.ERROR)  # it warns before it has read its own log_level
        known = {*inspect.signature(BaseEmissionsTracker.__init__).parameters,
                 *inspect.signature(OfflineEmissionsTracker.__init__).parameters}
        began = time.perf_counter()
        self._tracker = OfflineEmissionsTracker(**tracker_options(known))
        self._joules = {"cpu": 0.0, "ram": 0.0}
        self._running = False
        self.skipped: dict[str, str] = {}
        self.update_period_s: float | None = CLOCK_TICK_S
        self.name = "codecarbon"
        # Its constructor and its start swallow every exception; a first task shows whether anything works.
        self.start()
        self.stop()
        first = self.read()
        if not any(value > 0 for value in first.values()):
            raise NotUsable("CodeCarbon's model returned no energy")
        self.start_s = time.perf_counter() - began
        self.method = (f"CodeCarbon {version('codecarbon')} offline model, this process and its children "
                       f"({' + '.join(sorted(first))}; RAM is a constant of the model); not a measurement")

    def start(self) -> None:
        self._tracker.start_task()
        self._running = True

    def _end_task(self) -> None:
        self._running = False
        spent = self._tracker.stop_task()
        # It keeps every finished task for a summary that is never written.
        with contextlib.suppress(AttributeError):
            self._tracker._tasks.clear()
        if spent is None:
            raise RuntimeError("CodeCarbon had no running task")
        for part, kwh in (("cpu", spent.cpu_energy), ("ram", spent.ram_energy), ("gpu", spent.gpu_energy)):
            if part in self._joules or (spent.gpu_count or 0) > 0:
                self._joules[part] = self._joules.get(part, 0.0) + kwh * JOULES_PER_KWH

    def read(self) -> dict[str, float]:
        if self._running:
            self._end_task()
            self.start()
        return dict(self._joules)

    def stop(self) -> None:
        if self._running:
            self._end_task()


def open_codecarbon() -> CodeCarbonModel:
    """The process's one CodeCarbon model; the first call takes seconds. Raises NotUsable with the reason."""
    global _shared
    if _shared is None:
        _shared = CodeCarbonModel()
    return _shared
