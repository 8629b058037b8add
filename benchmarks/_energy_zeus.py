"""Zeus on simulated devices, in an environment of its own: `python _energy_zeus.py WINDOW_S EACH` prints a JSON list.

Its monitor runs as it is; NVML's functions and its clock are replaced by those of the simulation.
"""

from __future__ import annotations

import json
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pynvml

from _energy_traces import Case, cases


def main() -> None:
    window_s, each = float(sys.argv[1]), int(sys.argv[2])
    place: dict[str, Any] = {}
    fakes = {"nvmlInit": lambda: None, "nvmlDeviceGetCount": lambda: 1, "nvmlDeviceGetHandleByIndex": lambda index: 0,
             "nvmlDeviceGetC2cModeInfoV": lambda handle: SimpleNamespace(isC2cEnabled=False),
             "nvmlDeviceGetArchitecture": lambda handle: pynvml.NVML_DEVICE_ARCH_VOLTA + 3,
             "nvmlDeviceGetTotalEnergyConsumption":
                 lambda handle: int(place["case"].counter.joules(place["now"]) * 1000)}
    for name, fake in fakes.items():
        setattr(pynvml, name, fake)
    from zeus.monitor import energy

    energy.time = lambda: place["now"]
    found = []
    for case in cases(window_s, each):
        place |= {"case": case, "now": case.begin}
        monitor = energy.ZeusMonitor(gpu_indices=[0], cpu_indices=[])
        found.append(_window(monitor, case, place))
    print(json.dumps(found))


def _window(monitor: Any, case: Case, place: dict[str, Any]) -> dict[str, Any]:
    monitor.begin_window("w", sync_execution=False)
    place["now"] = case.end
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        measured = monitor.end_window("w", sync_execution=False)
    return {"joules": measured.total_energy, "warned": any("zero" in str(each.message) for each in told)}


if __name__ == "__main__":
    main()
