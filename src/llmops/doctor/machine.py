"""Is this machine fit? Versions, processor, GPU, sensors, kernels, memory, disk. Touches no network."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from llmops.doctor.checklist import Check, Checklist

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

__all__ = ["KNOWN_GOOD", "examine"]

#: package -> (the version the tests run with, what it is for where it is not needed by everything)
KNOWN_GOOD: dict[str, tuple[str, str]] = {
    "torch": ("2.13.0", ""), "transformers": ("5.17.0", ""), "peft": ("0.21.2", ""), "accelerate": ("1.15.0", ""),
    "datasets": ("5.2.0", ""), "safetensors": ("0.8.0", ""), "compressed-tensors": ("0.20.0", ""),
    "pydantic": ("2.14.3", ""), "triton": ("3.7.1", "kernels on a GPU"),
    "bitsandbytes": ("0.50.2", "NF4 and 8-bit optimizers"), "codecarbon": ("3.3.2", "energy without a sensor"),
    "lm-eval": ("", "the harness scores")}
GIGABYTE = 1e9


def examine(runs: str | Path | None = None, say: Callable[[Check], None] | None = None) -> list[Check]:
    """Look the machine over. runs: where runs lie (default `$LLMOPS_RUNS`, or `runs/`)."""
    found = Checklist(say)
    for look in (_python, _packages, _processor, _gpu, _memory, _sensors, _kernels):
        with found.trying(look.__name__.strip("_")):
            look(found)
    with found.trying("disk"):
        _disk(found, runs)
    return found.checks


def _python(found: Checklist) -> None:
    here = sys.version.split()[0]
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    found.add("python", "ok" if supported else "note", f"{here} at {sys.executable}",
              "Python 3.11 to 3.13 is what llmops supports")


def _packages(found: Checklist) -> None:
    from packaging.version import Version

    supported = _supported()
    for package, (tested, what) in KNOWN_GOOD.items():
        wanted = str(supported.get(package, ""))
        try:
            here = Version(version(package))
        except PackageNotFoundError:
            found.add(package, "note" if what else "fail", f"not installed ({what or 'needed'})",
                      f'pip install "{package}{wanted}"')
            continue
        fits = package not in supported or supported[package].contains(here.base_version, prereleases=True)
        tail = f", tested with {tested}" if tested and here.base_version != tested else ""
        found.add(package, "ok" if fits else "fail", f"{here} (supported: {wanted or 'any'}{tail})",
                  f'pip install "{package}{wanted}"')


def _supported() -> dict[str, SpecifierSet]:
    """Package -> the versions that llmops asks for, extras included."""
    from packaging.requirements import Requirement

    return {need.name: need.specifier for need in map(Requirement, requires("llmops") or [])}


def _processor(found: Checklist) -> None:
    import torch

    from llmops.measure.environment import cpu_model

    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    how = "multiplies bfloat16" if native else "imitates bfloat16: models run in float32 here"
    found.add("processor", "ok", f"{cpu_model()}, {os.cpu_count()} threads, torch uses {torch.get_num_threads()}, "
                                 f"{torch.backends.cpu.get_cpu_capability()}; {how}")


def _gpu(found: Checklist) -> None:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        found.add("gpu", "note", "none that torch sees" + ("" if built else " (this torch is built without CUDA)"),
                  "without a GPU everything runs on the CPU; for one, install the CUDA build of torch and the driver")
        return
    from llmops.measure.environment import gpus

    facts = gpus()
    for index, gpu in enumerate(facts["gpus"]):
        free, total = torch.cuda.mem_get_info(index)
        others = gpu.get("other_processes") or 0
        text = (f"{gpu['name']}, compute capability {gpu['capability']}, {free / GIGABYTE:.1f} of "
                f"{total / GIGABYTE:.1f} GB free, driver {facts['driver']}, CUDA {facts['cuda']}")
        found.add(f"gpu {index}", "note" if others else "ok", text + (f"; {others} other processes" if others else ""),
                  "timings and energy are only good while nothing else runs on the device")


def _memory(found: Checklist) -> None:
    import psutil

    memory = psutil.virtual_memory()
    found.add("memory", "ok", f"{memory.available / GIGABYTE:.1f} of {memory.total / GIGABYTE:.1f} GB free")


def _sensors(found: Checklist) -> None:
    from llmops.measure.options import MeasureOptions
    from llmops.measure.sensors import probe
    from llmops.models.load import pick_device

    sensor = probe(MeasureOptions(), pick_device("auto"))
    skipped = "".join(f"\n{name}: {reason}" for name, reason in sensor.skipped.items())
    state = {"measured": "ok", "estimated": "note", "null": "note"}[sensor.provenance]
    found.add("energy", state, f"{sensor.name}, {sensor.provenance}{skipped}",  # type: ignore[arg-type]
              "every energy figure will be marked so; a GPU's counter or RAPL (readable "
              "/sys/class/powercap) measures")


def _kernels(found: Checklist) -> None:
    """Every kernel that can run here, against the reference."""
    import torch

    from llmops.methods.quantize.packing import pack
    from llmops.methods.quantize.rtn import rtn
    from llmops.models.packed import PackedLinear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weight, x = torch.randn(256, 256, dtype=torch.bfloat16), torch.randn(4, 256, dtype=torch.bfloat16, device=device)
    for bits, group in ((8, -1), (4, 128), (3, 64), (2, 32)):
        parts = {name: part.to(device) if name != "weight_shape" else part
                 for name, part in pack(rtn(weight, bits=bits, group_size=group, symmetric=True)).items()}
        layers = {kernel: PackedLinear(parts, bits=bits, group_size=group, kernel=kernel)
                  for kernel in ("auto", "reference")}
        fast, slow = (layers[kernel](x).float() for kernel in ("auto", "reference"))
        error = float((fast - slow).norm() / slow.norm())
        found.add(f"kernel w{bits}a16", "ok" if error < 2e-2 else "fail",
                  f"{layers['auto'].kernel}, relative difference to the reference {error:.1e}",
                  "set `runtime: {kernel: reference}` and report this")


def _disk(found: Checklist, runs: str | Path | None) -> None:
    from llmops.store import Store

    place = Store(runs).runs
    there = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        found.add("disk", "fail", f"{there} cannot be written to ({error})", "name another place with --runs")
        return
    found.add("disk", "ok" if free > 5 * GIGABYTE else "note", f"{free / GIGABYTE:.1f} GB free at {there}",
              "a variant of a 1-billion-parameter model takes 2 GB; name another place with --runs")
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True")
    token = "set" if os.environ.get("HF_TOKEN") or (cache / "token").exists() else "not set"
    found.add("hub", "ok", f"cache {cache}, token {token}{', offline' if offline else ''}")
