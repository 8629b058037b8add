"""Commands that compare and show: `bench models`, `bench show`, `ui`. As in `cli.py`, each is a function of plain
arguments whose docstring is its help; each imports what it calls."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llmops.arguments import JSON, QUIET, RUNS
from llmops.errors import LlmopsError, unknown
from llmops.parser import Argument, Command, at_least

__all__ = ["COMMANDS"]


def bench_models(models: Sequence[str], against: str | None, batches: Sequence[int], contexts: Sequence[int],
                 new_tokens: int, repeats: int, window: float, sensor: str, watts: float | None, device: str,
                 threads: int | None, kernel: str, seed: int, out: str, runs: str | None, as_json: bool,
                 quiet: bool) -> int:
    """Measure MODELs, of any runtime, at every batch size and context, each beside the first one in interleaved blocks:
    speed, prefill and decode apart, energy, ratios with intervals. A matrix that was stopped goes on where it was."""
    import torch

    from llmops.bench_models.arms import arms
    from llmops.bench_models.matrix import Matrix, run_matrix
    from llmops.bench_models.tables import lines, write
    from llmops.measure.options import MeasureOptions
    from llmops.measure.reserve import reserved
    from llmops.models.load import pick_device

    if new_tokens < 2:
        raise LlmopsError(f"given --new-tokens {new_tokens}; expected at least 2, one comes from the prefill")
    if sensor == "declared" and watts is None:
        raise LlmopsError("--sensor declared needs --watts, the power that the machine draws")
    found = arms(models, runs)
    options = MeasureOptions(new_tokens=new_tokens, repeats=repeats, window_s=window, sensor=sensor, watts=watts)
    matrix = Matrix(found, against or found[0].name, sorted(set(batches or [1, 8])), sorted(set(contexts or [256])),
                    options, str(pick_device(device)), threads or torch.get_num_threads(), kernel, seed,
                    (lambda _: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True)))
    with reserved(False, f"bench {out}"):
        cells = run_matrix(matrix, Path(out))
    paths = write(cells, Path(out))
    print(json.dumps(cells, indent=1, ensure_ascii=False) if as_json else "\n".join(
        [*lines(cells), ", ".join(map(str, paths))]))
    return 3 if any(cell["state"] == "failed" for cell in cells) else 0


def bench_show(folders: Sequence[str], as_json: bool) -> None:
    """Print finished matrices in one table; refused where they were given other prompts or ran on another machine."""
    from llmops.bench_models.join import joined
    from llmops.bench_models.tables import lines, read

    cells = joined([(folder, read(Path(folder))) for folder in folders])
    print(json.dumps(cells, indent=1, ensure_ascii=False) if as_json else "\n".join(lines(cells)))


def ui(port: int, host: str, anywhere: bool, runs: str | None, quiet: bool) -> None:
    """Serve the pages of all runs on this machine: filters, every run's report, two runs side by side. Reads only; ends
    with Ctrl-C."""
    from llmops.ui.server import serve

    serve(runs, host, port, anywhere=anywhere, quiet=quiet)


def _sensor(given: str) -> str:
    if given not in SENSORS:
        raise argparse.ArgumentTypeError(unknown("sensor", given, SENSORS))
    return given


def _positive(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f'given "{given}"; expected a number of at least 0')
    return value


SENSORS = ("auto", "nvml", "rapl", "zeus", "codecarbon", "declared", "none")
MODELS: Argument = ("models",), {
    "metavar": "MODEL", "nargs": "+",
    "help": "[NAME=][RUNTIME:]MODEL; RUNTIME is llmops (default), transformers, onnxruntime, openvino, llamacpp or "
            "vllm; MODEL a folder, a file, a hub id, builtin:tiny, or RUN/VARIANT."}
COMMANDS: dict[str, Command] = {
    "bench models": (
        bench_models, MODELS,
        (("--against",), {"metavar": "NAME", "help": "The model that the others are held against (default: the "
                                                     "first)."}),
        (("--batch",), {"dest": "batches", "metavar": "N", "type": at_least(1), "action": "append", "default": [],
                        "help": "Batch size; may be repeated (default: 1 and 8)."}),
        (("--context",), {"dest": "contexts", "metavar": "N", "type": at_least(1), "action": "append", "default": [],
                          "help": "Prompt tokens; may be repeated (default: 256)."}),
        (("--new-tokens",), {"metavar": "N", "type": at_least(1), "default": 64,
                             "help": "New tokens of a request, exactly (default: 64)."}),
        (("--repeats",), {"metavar": "N", "type": at_least(2), "default": 5,
                          "help": "Pairs of blocks a cell (default: 5)."}),
        (("--window",), {"metavar": "S", "type": _positive, "default": 0.0,
                         "help": "Seconds that a block lasts at least (default: one request)."}),
        (("--sensor",), {"metavar": "NAME", "default": "auto", "type": _sensor,
                         "help": "auto, nvml, rapl, zeus, codecarbon, declared or none."}),
        (("--watts",), {"metavar": "W", "type": _positive, "help": "Declared power of the machine."}),
        (("--device",), {"metavar": "DEVICE", "default": "auto", "help": "auto, cpu or cuda."}),
        (("--threads",), {"metavar": "N", "type": at_least(1), "help": "CPU threads of every runtime (default: "
                                                                       "torch's)."}),
        (("--kernel",), {"metavar": "KERNEL", "default": "auto", "help": "Of runtime llmops, as runtime.kernel."}),
        (("--seed",), {"metavar": "N", "type": at_least(0), "default": 0, "help": "Of prompts and order (default: "
                                                                        "0)."}),
        (("--out",), {"metavar": "DIR", "default": "bench", "help": "Where cells and results go (default: bench)."}),
        RUNS, JSON, QUIET),
    "bench show": (bench_show, (("folders",), {"metavar": "DIR", "nargs": "+",
                                               "help": "What `bench models --out` wrote."}), JSON),
    "ui": (ui, (("--port",), {"metavar": "N", "type": at_least(0), "default": 8600,
                              "help": "Port; 0 takes a free one (default: 8600)."}),
           (("--host",), {"metavar": "HOST", "default": "127.0.0.1", "help": "Address to listen on (default: this "
                                                                             "machine alone)."}),
           (("--anywhere",), {"action": "store_true", "help": "Needed with a --host that others can reach: everything "
                                                              "in the store can be read there, by anyone."}),
           RUNS, QUIET),
}
