"""Memory and disk: bytes of the weights as they are held, peak of a workload, bytes of a folder.

A GPU's allocator counts every byte it hands out, so a peak there is measured. A CPU's is not: the resident set holds
libraries, other models and pages that were freed and not given back. Here the peak is the growth of the process's
high-water mark over a section, plus the weights that were there before it. The mark is reset through
/proc/self/clear_refs where that is allowed; elsewhere a thread samples the resident set every 2 ms. Freed pages are
given back first (glibc), otherwise the section would reuse them unseen. Being a difference that also sees
interpreter and libraries, the CPU's figure is labelled an estimate.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmops.measure.sensors import Poller
from llmops.quantity import Quantity

__all__ = ["Peak", "disk_bytes", "kv_bytes_per_token", "peak", "weights_bytes"]

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx"}
TOLD = {"llmops.json", "README.md"}  # what a folder says of itself
SAMPLE_S = 0.002


def _tensors(model: Any) -> Iterable[Any]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        packed = getattr(module, "packed_tensors", None)
        if callable(packed):
            held = packed()
            yield from held.values() if isinstance(held, dict) else held


def weights_bytes(model: Any) -> Quantity:
    """Bytes of all parameters, buffers and packed tensors of a model as they lie in memory; shared storage once.

    Modules that keep tensors in plain attributes list them in `packed_tensors()` (a sequence, or a dict by name).
    """
    held: dict[tuple[str, int], int] = {}
    for tensor in _tensors(model):
        if tensor.is_mkldnn:  # in a layout of oneDNN's own, which has no storage to ask
            held["mkldnn", id(tensor)] = tensor.nbytes
            continue
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta":
            held[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return Quantity.measured(float(sum(held.values())), "B", "parameters, buffers and packed tensors as held, shared "
                                                             "storage counted once")


def kv_bytes_per_token(model: Any, tokens: int = 8) -> Quantity:
    """Bytes that the cache of keys and values holds for a token, all layers together, after a prefill of a few tokens.

    A sliding-window layer counts as long as its window is not full; later it grows no more. Null when the model's cache
    has layers that keep something else than keys and values.
    """
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    total = 0.0
    for layer in getattr(cache, "layers", []):
        held: list[Any] = (layer.packed_tensors() if hasattr(layer, "packed_tensors") else
                           [getattr(layer, "keys", None), getattr(layer, "values", None)])
        if any(part is None or part.shape[-2] == 0 for part in held):
            return Quantity.null("B/token", f"a layer keeps a {type(layer).__name__}, whose size is not one of tokens")
        total += sum(part.numel() * part.element_size() / part.shape[-2] for part in held)
    if not total:
        return Quantity.null("B/token", f"{type(model).__name__} gave no cache of keys and values back")
    return Quantity.measured(total, "B/token", f"tensors held by the cache after {tokens} tokens, over all layers")


def disk_bytes(folder: Path | str, *, weights_only: bool = False) -> Quantity:
    """Bytes of the files of a folder (links followed) that a server needs, or of its weight files alone.

    The record of a build and its model card are left out: they tell of the model, more of one made by more steps, and
    the card is written after the figures that it quotes. Null when there are no files.
    """
    files = [path for path in Path(folder).rglob("*") if path.is_file()
             and (path.suffix in WEIGHT_SUFFIXES if weights_only else path.name not in TOLD)]
    what = "weight files" if weights_only else "files that loading needs"
    if not files:
        return Quantity.null("B", f"{folder} holds no {'weight ' if weights_only else ''}files")
    return Quantity.measured(float(sum(path.stat().st_size for path in files)), "B", f"{what} of the folder, "
                                                                                     f"{len(files)} of them")


class Peak:
    """`quantity` is filled when the section closes."""

    def __init__(self) -> None:
        self.quantity = Quantity.null("B", "the section is still running")


@contextmanager
def peak(model: Any) -> Iterator[Peak]:
    """Peak bytes while the body of a `with` runs `model`: its weights plus the most that the body added.

    Only growth is counted, so other models that are resident do not matter, as long as the body runs only this one.
    After a body that raised there is no figure.
    """
    found = Peak()
    weights = weights_bytes(model).value or 0.0
    gc.collect()
    section = _cuda if next(model.parameters()).device.type == "cuda" else _cpu
    try:
        with section(found, weights):
            yield found
    except BaseException:
        found.quantity = Quantity.null("B", "the section failed")
        raise


@contextmanager
def _cuda(found: Peak, weights: float) -> Iterator[None]:
    import torch

    devices = [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(index) > 0]
    before = 0
    for index in devices:
        torch.cuda.synchronize(index)
        torch.cuda.reset_peak_memory_stats(index)
        before += torch.cuda.memory_allocated(index)
    yield
    for index in devices:
        torch.cuda.synchronize(index)
    most = sum(torch.cuda.max_memory_allocated(index) for index in devices)
    found.quantity = Quantity.measured(weights + most - before, "B", "weights + growth of "
                                       "torch.cuda.max_memory_allocated over the section")


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _reset_mark() -> bool:
    """Set the high-water mark VmHWM back to the present resident set (value 5 of clear_refs; Linux >= 4.0)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") - _status("VmRSS") < 1 << 20
    except OSError:
        return False


def _trim() -> None:
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):  # musl has none
            return


@contextmanager
def _cpu(found: Peak, weights: float) -> Iterator[None]:
    import psutil

    _trim()
    process = psutil.Process()
    if _reset_mark():
        before = _status("VmRSS")
        yield
        found.quantity = Quantity(weights + max(_status("VmHWM") - before, 0), "B", "estimated",
                                  "weights + growth of the process's resident high-water mark (VmHWM, reset before)")
        return
    before = most = process.memory_info().rss

    def sample() -> None:
        nonlocal most
        most = max(most, process.memory_info().rss)

    sampler = Poller(sample, SAMPLE_S)
    sampler.start()
    try:
        yield
    finally:
        sampler.stop()
    sample()
    found.quantity = Quantity(weights + most - before, "B", "estimated",
                              f"weights + growth of the resident set, sampled every {SAMPLE_S * 1000:g} ms (short "
                              "peaks are missed)")
