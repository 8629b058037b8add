"""Every kernel of llmops on the GPU of this machine: checks, then timings, then a model; one JSON.

    python benchmarks/gpu.py                      # under nine minutes; writes benchmarks/results/gpu-DEVICE.json
    python benchmarks/gpu.py --only kv_attention --no-model
    python benchmarks/gpu.py --dry                # the same on a CPU in Triton's interpreter, tiny: measures nothing

Needs torch and Triton; transformers and the rest of llmops for the end-to-end part, which is left out with its reason
where they are not installed. Checks and cases come from benchmarks/kernels/*.py. Method: _gpu_timing.py. Beside each
time stands its fraction of the floor, which is the longer of moving the least bytes at the speed of a measured copy and
of computing at the speed of a measured large matmul. Baselines are timed in the same run, on the same data.

It stops in time: what is left when the budget is used up is listed under "left_out", and the file is written after
every step, so that a run that is cut off keeps what it has. Exit code 1: a check failed; 3: the device broke.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for part in ("src", "kernels", ""):
    if str(ROOT / part) not in sys.path:
        sys.path.insert(0, str(ROOT / part))
if "--dry" in sys.argv and __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

BUDGET_S = 525.0
MODEL_S = 150.0  # of it kept for the model
CHECKS_S = 150.0  # of it given to the checks at most
FIRST = (1, 16, 4096)  # numbers of tokens that are timed before all others


class Run:
    """What was found so far, and the clock."""

    def __init__(self, device: str, out: Path, budget: float, dry: bool) -> None:
        import torch

        self.torch, self.device, self.out, self.dry = torch, device, out, dry
        self.began, self.budget = time.monotonic(), budget
        self.found: dict[str, Any] = {"meta": _meta(torch, device, dry, budget), "ceilings": {}, "checks": [],
                                      "timings": [], "end_to_end": [], "errors": [], "left_out": []}

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def write(self) -> None:
        from benchmarks._runner.results import write

        self.found["meta"]["wall_s"] = round(time.monotonic() - self.began, 1)
        write(self.out, self.found)

    def error(self, where: str, error: BaseException) -> None:
        """Note what went wrong and go on. Raises SystemExit(3) when the device takes no more work."""
        lines = str(error).strip().splitlines() or [""]
        self.found["errors"].append({"where": where, "error": f"{type(error).__name__}: {lines[0][:300]}"})
        print(f"  {where}: {type(error).__name__}: {lines[0][:160]}", flush=True)
        gc.collect()
        if self.device == "cuda":
            try:
                self.torch.cuda.synchronize()
                self.torch.cuda.empty_cache()
            except RuntimeError as broken:
                self.found["errors"].append({"where": "device", "error": str(broken).splitlines()[0]})
                self.write()
                raise SystemExit(3) from broken


def _meta(torch: Any, device: str, dry: bool, budget: float) -> dict[str, Any]:
    from benchmarks._runner.machine import about

    record = about(packages=("torch", "triton", "transformers"))
    found = {**record, "device": "cpu, interpreter", "torch": torch.__version__, "triton": record["versions"]["triton"],
             "dry": dry, "cuda": torch.version.cuda, "budget_s": budget,
             "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "processors": properties.multi_processor_count,
                  "memory_bytes": properties.total_memory, "l2_bytes": properties.L2_cache_size,
                  "capability": ".".join(map(str, torch.cuda.get_device_capability()))}
    return found


def modules(only: list[str]) -> Iterator[tuple[str, Any]]:
    """(name, module) of benchmarks/kernels, those named in `only` where it names some."""
    for path in sorted((ROOT / "benchmarks" / "kernels").glob("*.py")):
        if not path.stem.startswith("_") and (not only or path.stem in only):
            yield path.stem, importlib.import_module(f"benchmarks.kernels.{path.stem}")


def check_all(run: Run, found: list[tuple[str, Any]]) -> None:
    """Every op beside float64. In a rehearsal the first check of each."""
    for name, module in found:
        if run.left() < run.budget - CHECKS_S and not run.dry:
            run.found["left_out"].append(f"checks of {name}: the time for checks was used up")
            continue
        try:
            for check in itertools.islice(module.checks(run.device), 1 if run.dry else None):
                held = check.error <= check.limit
                run.found["checks"].append({"op": name, "name": check.name, "error": check.error, "limit": check.limit,
                                            "held": held})
                if not held:
                    print(f"  FAILED {check.name}: {check.error:.3g} of {check.limit:.3g}", flush=True)
        except Exception as error:  # whatever it is, the other ops are still worth knowing
            run.error(f"checks of {name}", error)
            run.found["checks"].append({"op": name, "name": f"{name} ran", "error": None, "limit": 0.0, "held": False})
        run.write()


def in_order(found: list[tuple[str, Any]], dry: bool) -> list[Any]:
    """All cases: few and many tokens before those between, layers of 8B before those of 70B, ops in turns."""
    def urgency(item: tuple[int, Any]) -> tuple[Any, ...]:
        place, case = item
        tokens = case.shape.get("M", 1)
        later = tokens not in FIRST
        return later, case.name.startswith("70B"), tokens if later else FIRST.index(tokens), place

    cases = [case for _, module in found for case in module.cases(dry)]
    return [case for _, case in sorted(enumerate(cases), key=urgency)]


def time_all(run: Run, cases: list[Any], reserve: float) -> None:
    from benchmarks import _gpu_timing as timing

    for done, case in enumerate(cases):
        label = f"{case.op} {case.name} {case.shape.get('M', '')}".strip()
        if run.left() < reserve:
            run.found["left_out"] += [f"{late.op} {late.name} {late.shape}" for late in cases[done:]]
            print(f"  {len(cases) - done} cases left out: the time is used up", flush=True)
            break
        row = {"op": case.op, "name": case.name, "shape": case.shape, "bytes": case.bytes, "flops": case.flops,
               "floor_us": 1e6 * timing.floor(case, run.found["ceilings"]), "contenders": {}}
        try:
            made = [case.make(run.device, seed) for seed in range(timing.copies(case.footprint, run.device))]
            row["copies"] = len(made)
            row["config"] = case.config(run.device) if case.config is not None else None
        except Exception as error:
            run.error(label, error)
            continue
        for name in made[0]:
            try:
                spent = 1e6 * timing.seconds([calls[name] for calls in made if name in calls], run.device)
                row["contenders"][name] = {"us": spent, "of_floor": row["floor_us"] / spent}
            except Exception as error:
                run.error(f"{label}, {name}", error)
        del made
        run.found["timings"].append(row)
        print(f"  {label}: floor {row['floor_us']:.1f} us; " + ", ".join(
            f"{name} {one['us']:.1f} ({one['of_floor']:.0%})" for name, one in row["contenders"].items()), flush=True)
        run.write()


def time_model(run: Run) -> None:
    """Tokens a second and joules a token of an 8B-shaped model with random weights, a kind at a time."""
    try:
        from benchmarks import _gpu_model as model
    except ImportError as error:
        run.error("end to end: not installed", error)
        return
    for kind in model.KINDS:
        if run.left() < (model.LEAST_S if not run.dry else 0):
            run.found["left_out"].append(f"end to end {kind}: the time is used up")
            continue
        try:
            run.found["end_to_end"].append(model.measure(kind, run.device, run.dry))
            print(f"  {run.found['end_to_end'][-1]}", flush=True)
        except Exception as error:
            run.error(f"end to end {kind}", error)
        gc.collect()
        run.write()


def main(words: list[str] | None = None) -> int:
    from benchmarks._runner.results import add_option, free

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU: tiny shapes, Triton's interpreter")
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", help="these ops of benchmarks/kernels alone")
    parser.add_argument("--no-model", action="store_true", help="without the end-to-end part")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds (default: %(default)s)")
    add_option(parser, "benchmarks/results/gpu-DEVICE.json, or the next free gpu-DEVICE-N.json")
    asked = parser.parse_args(words)
    import torch

    if not asked.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry rehearses on the CPU")
    device = "cpu" if asked.dry else "cuda"
    name = "dry" if asked.dry else torch.cuda.get_device_name(0).replace(" ", "_")
    out = asked.out or free(f"gpu-{name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    run = Run(device, out, asked.budget, asked.dry)
    from benchmarks import _gpu_timing as timing

    with torch.inference_mode():
        print("ceilings", flush=True)
        run.found["ceilings"] = timing.ceilings(device)
        found = list(modules(asked.only))
        print("checks", flush=True)
        check_all(run, found)
        print("timings", flush=True)
        time_all(run, in_order(found, asked.dry), 0.0 if asked.no_model else min(MODEL_S, asked.budget / 3))
        if not asked.no_model:
            print("end to end", flush=True)
            time_model(run)
    run.write()
    failed = [check["name"] for check in run.found["checks"] if not check["held"]]
    print(f"{len(run.found['checks'])} checks, {len(failed)} failed; {len(run.found['timings'])} cases, "
          f"{len(run.found['left_out'])} left out, {len(run.found['errors'])} errors; {out}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
