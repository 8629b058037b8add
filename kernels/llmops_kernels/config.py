"""Tile sizes: a JSON table per op, device, shape and number of rows, and nothing decided by timing at call time.

    configs/OP.json   {device name: {"N=4096,K=4096,...": {M: {"BLOCK_N": 64, ..., "num_warps": 4, "num_stages": 3}}}}

A call looks its device and exact key up and takes the entry whose M is nearest in log space; without an entry it
takes the op's own rule, which must work on any device. `@triton.autotune` is left out: it times at the first call
of every shape, fails while a CUDA graph is captured, and needs a driver in the interpreter. `llmops_kernels.tune`
writes the tables; LLMOPS_KERNEL_CONFIGS names a folder whose tables come before the packaged ones.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

__all__ = ["Config", "device_name", "entries", "key", "pick", "processors", "table", "trying"]

Config = dict[str, int]
PACKAGED = Path(__file__).parent / "configs"
_TRIED: dict[str, Config] = {}


def key(n: int, k: int, **more: int | str) -> str:
    """The name of a shape in a table: `key(4096, 4096, bits=4)` -> "N=4096,K=4096,bits=4"."""
    return ",".join([f"N={n}", f"K={k}", *(f"{name}={value}" for name, value in more.items())])


def pick(op: str, shape: str, m: int, device: str) -> Config | None:
    """The tuned tiles of `op` for `shape` (from `key`) and m rows on `device` (from `device_name`); None: not tuned."""
    if op in _TRIED:
        return _TRIED[op]
    rows = entries(op, device).get(shape)
    if not rows:
        return None
    wanted = math.log(max(m, 1))
    return rows[min(rows, key=lambda row: (abs(math.log(row) - wanted), row))]


@contextmanager
def trying(op: str, tiles: Config) -> Iterator[None]:
    """Inside it every call of `op` takes these tiles, whatever its shape: how `llmops_kernels.tune` measures them."""
    _TRIED[op] = tiles
    try:
        yield
    finally:
        del _TRIED[op]


@cache
def entries(op: str, device: str) -> dict[str, dict[int, Config]]:
    """shape -> M -> tiles, of one op on one device; a user's folder replaces shapes of the packaged table."""
    found: dict[str, dict[int, Config]] = {}
    for folder in (PACKAGED, os.environ.get("LLMOPS_KERNEL_CONFIGS")):
        if folder and (path := Path(folder) / f"{op}.json").exists():
            found |= table(path).get(device, {})
    return found


def table(path: Path) -> dict[str, dict[str, dict[int, Config]]]:
    """Read and check one file. Raises ValueError with the place of what is wrong."""
    try:
        raw = json.loads(path.read_text())
        read = {device: {shape: {int(m): dict(tiles) for m, tiles in rows.items()} for shape, rows in shapes.items()}
                for device, shapes in raw.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: {error}; expected {{device: {{shape: {{M: {{name: integer}}}}}}}}") from error
    for device, shapes in read.items():
        for shape, rows in shapes.items():
            for m, tiles in rows.items():
                if m < 1 or not all(isinstance(value, int) for value in tiles.values()):
                    raise ValueError(f"{path}: {device}: {shape}: M = {m}: {tiles}; expected M >= 1 and whole numbers")
    return read


@cache
def device_name(index: int | None) -> str:
    """The name of CUDA device `index` in the tables, "cpu" for None: NVIDIA_H200, NVIDIA_H100_80GB_HBM3, ..."""
    return "cpu" if index is None else torch.cuda.get_device_name(index).replace(" ", "_")


@cache
def processors(index: int | None) -> int:
    """Streaming multiprocessors of CUDA device `index`; an H100's 132 for None (the interpreter, offline compiles)."""
    return 132 if index is None else int(torch.cuda.get_device_properties(index).multi_processor_count)
