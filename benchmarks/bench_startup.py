"""How long `llmops validate` and `llmops plan` take to start, beside a Python that does nothing.

    python benchmarks/bench_startup.py [--rounds 15]

Interleaved whole processes, medians, and the ratio; the aim is at most 15 times `python -c pass`. Also says whether
torch was imported on the way.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
RUN = "import sys; from llmops.cli import main; sys.argv = ['llmops', *sys.argv[1:]]; main()"


def wall_s(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    commands = {"python -c pass": [sys.executable, "-c", "pass"],
                "llmops validate": [sys.executable, "-c", RUN, "validate", str(RECIPE)],
                "llmops plan": [sys.executable, "-c", RUN, "plan", str(RECIPE)]}
    for command in commands.values():
        wall_s(command)
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            times[name].append(wall_s(command))
    nothing = statistics.median(times["python -c pass"])
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name:16} {1000 * median:7.1f} ms  {median / nothing:5.1f} x")
    for name in ("validate", "plan"):
        script = f"{RUN[:-len('main()')]}\ntry: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", script, name, str(RECIPE)], capture_output=True, text=True)
        print(f"torch imported by {name}: {done.stdout.split()[-1]}")


if __name__ == "__main__":
    main()
