"""Where a figure was taken: machine, versions, sensor, and hints that the machine was shared."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmops.measure.sensors import Sensor

__all__ = ["conditions", "cpu_model", "environment", "gpus"]

PACKAGES = ("llmops", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "compressed-tensors",
            "triton", "codecarbon", "nvidia-ml-py", "numpy")


def cpu_model() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    """What NVML tells of one device; a field that a card does not have is left out."""
    facts: dict[str, Any] = {}
    readers: dict[str, Callable[[], Any]] = {
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "other_processes": lambda: len([process for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
                                        if process.pid != os.getpid()]),
    }
    for name, read in readers.items():
        with contextlib.suppress(Exception):  # every card lacks something, each with an error of its own
            facts[name] = read()
    return facts


def gpus() -> dict[str, Any]:
    """The CUDA devices that torch sees, the driver, and what NVML tells of each."""
    import torch

    from llmops.measure.nvml import visible_uuids

    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append({"name": facts.name, "memory_bytes": int(facts.total_memory),
                        "capability": f"{facts.major}.{facts.minor}"})
    group: dict[str, Any] = {"gpu": [device["name"] for device in devices], "gpus": devices, "cuda": torch.version.cuda}
    try:
        import pynvml

        pynvml.nvmlInit()
        group["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
        for device, uuid in zip(devices, visible_uuids(), strict=True):
            device.update(_gpu(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)))
    except Exception as error:  # without NVML there are names and no more
        group["driver"] = None
        group["driver_unknown"] = f"{type(error).__name__}: {error}"
    return group


def conditions(device: Any = "cpu") -> dict[str, Any]:
    """What drifts while something is measured: load, and each GPU's clock, temperature, limit and other processes."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, AttributeError):
        found["load_average_1m"] = round(os.getloadavg()[0], 2)
    return found | ({"gpus": gpus()["gpus"]} if str(device).startswith("cuda") else {})


def environment(device: Any = "cpu", sensor: Sensor | None = None) -> dict[str, Any]:
    """Plain values for the row's group "environment".

    `load_average_1m` (of all processes, this one included) and `other_processes` of a GPU hint at a machine that was
    not ours alone. RAM in bytes.
    """
    import psutil
    import torch

    group: dict[str, Any] = {
        "device": str(device), "cpu": cpu_model(), "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "hardware_threads": os.cpu_count(), "ram_bytes": int(psutil.virtual_memory().total),
        "threads": torch.get_num_threads(), "os": platform.platform(), "python": sys.version.split()[0],
        "versions": _versions(),
    }
    with contextlib.suppress(OSError, AttributeError):
        group["load_average_1m"] = round(os.getloadavg()[0], 2)
    group |= {name: group["versions"].get(name) for name in ("llmops", "torch", "transformers")}
    group |= gpus() if str(device).startswith("cuda") else {"gpu": [], "driver": None}
    if sensor is not None:
        group |= {"sensor": sensor.name, "sensor_provenance": sensor.provenance, "sensor_method": sensor.method,
                  "sensor_update_period_s": sensor.update_period_s, "sensors_skipped": dict(sensor.skipped)}
    return group
