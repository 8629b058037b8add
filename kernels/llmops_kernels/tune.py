"""Find tiles for the GPU at hand: `python -m llmops_kernels.tune [--op OP ...] [--shapes N,K ...] [--m M ...]`.

For each op, shape and number of tokens it starts from the tiles of the op's own rule and goes along one tile parameter
after the other, keeping what is faster, until a whole round changes nothing. Each candidate is first checked against
the result of the rule's tiles and then timed as a replayed CUDA graph over copies of the data that pass the L2 cache.
What it finds goes into OUT/OP.json under the device's name, beside what is there; a call takes the entry of its shape
whose M is nearest (`config.py`). For `kv_attention` N and K are both the width of a head, M is the room of the cache.

    --out DIR     the folder of the tables: LLMOPS_KERNEL_CONFIGS, or the package's own
    --dry         the same path without a GPU, on tiny shapes in Triton's interpreter: it says that tuning runs, and
                  nothing about speed; without --out the tables are thrown away
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import config, timing
from ._interpret import INTERPRETED
from ._trials import TRIALS, Trial
from ._triton import HAVE_TRITON

__all__ = ["Found", "descend", "main", "tune", "write"]

SHAPES = ((4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336))  # Llama-3-8B, N and K
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
TINY, FEW_ROWS = ((64, 256),), (1, 17)
HEADS, ROOMS = ((128, 128),), (2048, 8192, 32768)  # of kv_attention
ROUNDS = 3
FASTER = 0.99  # less than 1 % is noise
ALIKE = 2e-2  # relative distance from the result of the rule's tiles: another order of sums, not other numbers

Measure = Callable[[config.Config], float | None]
Found = tuple[config.Config, float, float, int]  # tiles, seconds, seconds of the rule's tiles, candidates measured


def descend(start: config.Config, axes: dict[str, tuple[int, ...]], measure: Measure) -> Found:
    """The tiles that no change along one axis makes faster; only along axes that `start` has.

    measure: seconds, None for tiles that do not work. Raises RuntimeError when `start` itself does not work.
    """
    first = measure(start)
    if first is None:
        raise RuntimeError(f"the rule's own tiles {start} do not run here")
    best, least, seen = start, first, {tuple(sorted(start.items()))}
    for _ in range(ROUNDS):
        before = best
        for name, values in ((name, values) for name, values in axes.items() if name in start):
            for tiles in [best | {name: value} for value in values]:
                if tuple(sorted(tiles.items())) in seen:
                    continue
                seen.add(tuple(sorted(tiles.items())))
                taken = measure(tiles)
                if taken is not None and taken < FASTER * least:
                    best, least = tiles, taken
        if best == before:
            break
    return best, least, first, len(seen)


def tune(trial: Trial, device: str) -> Found:
    """The best tiles of one trial."""
    calls = [trial.make(seed) for seed in range(timing.copies(trial.footprint, device))]
    with config.trying(trial.op, trial.starts[0]):
        wanted = calls[0]()

    def measure(tiles: config.Config) -> float | None:
        with config.trying(trial.op, tiles):
            try:
                if not _alike(calls[0](), wanted):
                    return None
                return timing.seconds(calls)
            except (TypeError, AttributeError, LookupError, NameError):  # a mistake, no refusal
                raise
            except Exception as error:  # too much shared memory, tiles that the compiler or the op refuses
                if "CUDA error" in str(error):  # the device is not usable any more
                    raise
                return None

    found = descend(trial.starts[0], trial.axes, measure)
    for start in trial.starts[1:]:
        if measure(start) is not None:
            other = descend(start, trial.axes, measure)
            best = min(found, other, key=lambda made: made[1])
            found = (best[0], best[1], found[2], found[3] + other[3])
    return found


def _alike(found: Tensor, wanted: Tensor) -> bool:
    return float((found.double() - wanted.double()).norm()) <= ALIKE * float(wanted.double().norm())


def write(folder: Path, op: str, device: str, shape: str, m: int, tiles: config.Config) -> None:
    """Put one entry into the table of an op, whole or not at all. Raises ValueError when the file there is none."""
    path = folder / f"{op}.json"
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, Any] = config.table(path) if path.exists() else {}
    tables.setdefault(device, {}).setdefault(shape, {})[m] = tiles
    ordered = {name: {key: {str(row): tables[name][key][row] for row in sorted(tables[name][key])}
                      for key in sorted(tables[name])} for name in sorted(tables)}
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(ordered, indent=1) + "\n")
    beside.replace(path)


def trials(ops: Sequence[str], shapes: Sequence[tuple[int, int]] | None, rows: Sequence[int] | None, device: str,
           dry: bool = False) -> Iterator[Trial]:
    """shapes, rows: None for those that an op is tuned for by default."""
    processors = config.processors(torch.cuda.current_device() if device == "cuda" else None)
    for op in ops:
        usual = (HEADS, ROOMS) if op == "kv_attention" else (SHAPES, ROWS)
        tiny = ((64, 64),) if op == "kv_attention" else TINY
        for n, k in shapes or (tiny if dry else usual[0]):
            for m in rows or (FEW_ROWS if dry else usual[1]):
                yield from TRIALS[op](n, k, m, device, processors)


# ---------------------------------------------------------------------------------------------------- command line
def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parse(arguments)
    if not HAVE_TRITON:
        return _refuse("Triton is not installed; pip install triton")
    if asked.dry and not INTERPRETED:  # the interpreter is chosen when triton is imported
        given = list(sys.argv[1:] if arguments is None else arguments)
        return subprocess.run([sys.executable, "-m", "llmops_kernels.tune", *given],
                              env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    if INTERPRETED and not asked.dry:
        return _refuse("TRITON_INTERPRET is set, so there is nothing to time; unset it, or give --dry")
    if not asked.dry and not torch.cuda.is_available():
        return _refuse("no CUDA device; tuning measures on the GPU at hand. --dry runs the same path on the CPU")
    if asked.dry and asked.out is None:
        with tempfile.TemporaryDirectory() as folder:
            return _run(asked, Path(folder), "cpu")
    default = os.environ.get("LLMOPS_KERNEL_CONFIGS") or config.PACKAGED
    return _run(asked, Path(asked.out or default), "cpu" if asked.dry else "cuda")


def _run(asked: argparse.Namespace, folder: Path, device: str) -> int:
    name = config.device_name(torch.cuda.current_device() if device == "cuda" else None)
    print(f"{name}: tables in {folder}", flush=True)
    for trial in trials(asked.op or list(TRIALS), asked.shapes, asked.m, device, asked.dry):
        if asked.dry:  # the second value of each axis shows that it is one
            trial = Trial(trial.op, trial.shape, trial.m, trial.starts, {a: v[1:2] for a, v in trial.axes.items()},
                          trial.footprint, trial.make)
        tiles, taken, first, measured = tune(trial, device)
        write(folder, trial.op, name, trial.shape, trial.m, tiles)
        speed = "not measured" if asked.dry else f"{taken * 1e6:.1f} us, rule {first * 1e6:.1f} us"
        print(f"{trial.op} {trial.shape} M={trial.m}: {speed}, {measured} tried: {tiles}", flush=True)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llmops_kernels.tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=list(TRIALS), help="an op to tune; all by default")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="N,K",
                        help="outputs and inputs of layers; those of Llama-3-8B by default")
    parser.add_argument("--m", nargs="+", type=_count, metavar="M", help="tokens; 1 to 4096 by default")
    parser.add_argument("--out", metavar="DIR", help="folder of the tables")
    parser.add_argument("--dry", action="store_true", help="run without a GPU, in the interpreter, on a tiny shape")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; expected N,K as in 4096,14336")
    if int(parts[1]) % 4:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a K that 4 divides")
    return int(parts[0]), int(parts[1])


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of tokens, 1 or more")
    return int(text)


def _refuse(reason: str) -> int:
    print(f"llmops_kernels.tune: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
