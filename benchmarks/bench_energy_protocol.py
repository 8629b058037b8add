"""What measuring costs, how small a difference it can show here, and whether fewer bits save energy.

    python benchmarks/bench_energy_protocol.py overhead [--model builtin:tiny] [--window 1] [--pairs 24]
    python benchmarks/bench_energy_protocol.py noise [--model builtin:tiny] [--repeats 8] [--batches 1,8]
    python benchmarks/bench_energy_protocol.py compare --model HUB_ID_OR_FOLDER [--dry] [--json FILE]

overhead  the same decoding with and without a meter around it, in turns: the ratio of its times, on the wall and of the
          CPU (steadier on a shared machine), and what reading and waiting for changes of a counter add, as a share of
          a window. The counter is played back at the speed of a real one (100 ms).
noise     A/A: the model against itself, by the protocol. How far the interval reaches from 1 is the smallest
          difference that this machine can show with so many repeats.
compare   base against w8a16 and w4a16 at batches 1, 8 and 64, with verdicts; meant for a GPU. --dry rehearses it with
          the built-in model on the CPU, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from _runner.machine import about, said
from _runner.results import Results, parser
from _runner.turns import in_turn
from llmops.measure.codecarbon_model import open_codecarbon
from llmops.measure.decode import UPDATES_SIZED, measure
from llmops.measure.environment import environment
from llmops.measure.intervals import log_ratio
from llmops.measure.meter import Meter
from llmops.measure.options import MeasureOptions
from llmops.measure.replay import Replay, Trace
from llmops.measure.sensors import DeclaredSensor, Sensor, probe
from llmops.measure.workload import Runner, make_prompts
from llmops.models.load import hush, load, pick_device

PERIOD_S = 0.1


def counter(seconds: float) -> Sensor:
    """A counter of 300 W that changes every 100 ms, at the speed of the wall clock."""
    times = [PERIOD_S * step for step in range(round(seconds / PERIOD_S) + 1)]
    return Replay(Trace(times, {"gpu0": [300 * second for second in times]}), update_period_s=PERIOD_S)


def overhead(given: argparse.Namespace) -> dict[str, Any]:
    """Ratios of time with a meter over without, pairs in turns."""
    model, tokenizer = load(given.model, dtype="auto", device="auto")
    runner = Runner(model.eval(), given.tokens)
    prompt = make_prompts([model], tokenizer, 1, given.tokens, 0).to(runner.device)

    def work(requests: int) -> tuple[float, float]:
        """(wall, CPU) seconds of the same decoding."""
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(requests):
            runner.request(prompt, given.tokens)
        return time.perf_counter() - began, time.process_time() - cpu

    found: dict[str, Any] = {}
    with torch.inference_mode():
        work(1)
        requests = max(1, math.ceil(given.window / min(work(1)[1] for _ in range(3))))
        for name, sensor, lasts_s in (("counter, 100 ms", counter(3600), UPDATES_SIZED * PERIOD_S),
                                      ("codecarbon", open_codecarbon(), None), ("declared", DeclaredSensor(65), None)):
            found[name] = _overhead(Meter(sensor, runner.device), lambda: work(requests), given.pairs, lasts_s)
            print(f"{name:16} {_told(found[name])}", flush=True)
    return found


def _overhead(meter: Meter, work: Callable[[], tuple[float, float]], pairs: int, lasts_s: float | None
              ) -> dict[str, Any]:
    """Metered and not, in turns. lasts_s: how long the protocol makes a window; None: as long as here."""
    plain, metered, around = [], [], []
    for _, with_meter in in_turn((True, False), pairs):
        if not with_meter:
            plain.append(work())
            continue
        began = time.perf_counter()
        with meter.window("work", aligned=True):
            metered.append(work())
        around.append(time.perf_counter() - began - metered[-1][0])
    wall = log_ratio([each[0] for each in metered], [each[0] for each in plain])
    cpu = log_ratio([each[1] for each in metered], [each[1] for each in plain])
    long = lasts_s if lasts_s is not None else median(each[0] for each in metered)
    return {"work_wall_ratio": wall[0], "work_wall_ci95": wall[1], "work_cpu_ratio": cpu[0], "work_cpu_ci95": cpu[1],
            "around_s_median": median(around), "window_s": long, "share": median(around) / long, "pairs": pairs}


def _told(body: dict[str, Any]) -> str:
    parts = [f"{kind} {body[f'work_{kind}_ratio']:.4f} ({body[f'work_{kind}_ci95'][0]:.4f} to "
             f"{body[f'work_{kind}_ci95'][1]:.4f})" for kind in ("cpu", "wall")]
    return (f"time of the work over that without a meter: {', '.join(parts)}; reading and waiting "
            f"{1000 * body['around_s_median']:.2f} ms, {body['share']:.3%} of a window of {body['window_s']:.3g} s")


def noise(given: argparse.Namespace) -> dict[str, Any]:
    """The model against itself."""
    device = pick_device("auto")
    model, tokenizer = load(given.model, dtype="auto", device="auto")
    batches = [int(batch) for batch in given.batches.split(",")]
    options = MeasureOptions(prompt_tokens=64, new_tokens=32, batch_sizes=batches, repeats=given.repeats,
                             window_s=given.window, idle_s=0 if device.type == "cpu" else 10)
    meter = Meter(probe(options, device), device)
    done = measure(model, None, tokenizer, options, meter, seed=0)
    found: dict[str, Any] = {"sensor": meter.sensor.method, "warnings": done.warnings}
    for batch in batches:
        found[str(batch)] = {"speed": done.latency[str(batch)]["aa_speed_ratio"],
                             "energy": done.energy[str(batch)]["aa_ratio"]}
        for what, ratio in found[str(batch)].items():
            print(f"batch {batch:3} {what:6} {_floor(ratio)}")
    print(f"sensor: {found['sensor']}")
    return found


def _floor(ratio: dict[str, Any]) -> str:
    if ratio["value"] is None:
        return f"unmeasured: {ratio['method']}"
    low, high = ratio["ci95"]
    return (f"A/A ratio {ratio['value']:.4f} ({low:.4f} to {high:.4f}): noise floor "
            f"{100 * max(high - 1, 1 - low):.2f} % ({ratio['provenance']})")


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Base, w8 and w4 by a recipe of their own; one line a batch and variant."""
    from llmops.runner import run

    if not given.dry and not torch.cuda.is_available():
        sys.exit("compare: no CUDA device; its figures are of a GPU. --dry rehearses it here")
    cost = ({"prompt_tokens": 16, "new_tokens": 8, "batch_sizes": [1, 2], "repeats": 5} if given.dry else
            {"prompt_tokens": 512, "new_tokens": 256, "batch_sizes": [1, 8, 64], "repeats": given.repeats,
             "exclusive": True, "sensor": "nvml"})
    recipe = {"version": 1, "name": "energy", "model": "builtin:tiny" if given.dry else given.model, "measure": cost,
              "data": {"prose": {"source": "builtin:world", "samples": 20}},
              "evaluate": [{"perplexity": {"data": "prose", "context": 64}}],
              "variants": {name: {"quantize": {"method": "rtn", "scheme": f"{name}a16"}} for name in ("w8", "w4")}}
    with tempfile.TemporaryDirectory() as place:
        rows = run(recipe, runs=given.runs or place).rows
    found: dict[str, Any] = {"dry": given.dry, "rows": []}
    for row in rows:
        for batch in map(str, cost["batch_sizes"]):
            if row["status"]["state"] != "ok":
                sys.exit(f"{row['identity']['variant']}: {row['status']['reason']}")
            energy, name = row["energy"][batch], row["identity"]["variant"]
            ratio = energy["aa_ratio" if name == "base" else "ratio_to_base"]
            found["rows"].append({"variant": name, "batch": int(batch), "energy": energy, "kernel":
                                  row["transform"].get("kernel"), "conditions": row["workload"]["conditions"]})
            shown = ratio["method"] if ratio["value"] is None else (
                f"{ratio['value']:.3f} ({ratio['ci95'][0]:.3f} to {ratio['ci95'][1]:.3f})")
            print(f"{name:5} batch {batch:3} {'A/A' if name == 'base' else 'J/token over base'} {shown}: "
                  f"{energy['saving']}")
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=("overhead", "noise", "compare"))
    options.add_argument("--model", default="builtin:tiny")
    options.add_argument("--window", type=float, default=1.0, help="seconds of work in a window (default: 1)")
    options.add_argument("--pairs", type=int, default=24)
    options.add_argument("--repeats", type=int, default=8)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--batches", default="1,8")
    options.add_argument("--runs", help="where `compare` keeps its run (default: nowhere)")
    options.add_argument("--dry", action="store_true")
    asked = options.parse_args()
    hush()
    record = about(asked, ("llmops", "torch", "transformers", "codecarbon"), threads=torch.get_num_threads())
    print(said(record))
    results = Results(asked.out, {**record, "what": asked.what, "model": asked.model,
                                  "environment": environment(pick_device("auto"))})
    results.end(found={"overhead": overhead, "noise": noise, "compare": compare}[asked.what](asked))


if __name__ == "__main__":
    main()
