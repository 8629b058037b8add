"""How long `llmops validate` and `llmops plan` take to start, beside a Python that does nothing.

    python benchmarks/bench_startup.py [--rounds 15] [--json FILE]

Whole processes in turns, medians, and the ratio with its interval; the aim is at most 15 times `python -c pass`. Also
says whether torch was imported on the way.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from _runner.machine import about, said
from _runner.results import Results, parser
from _runner.turns import ratio, shown, timed

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
RUN = "import sys; from llmops.cli import main; sys.argv = ['llmops', *sys.argv[1:]]; main()"
NOTHING = "python -c pass"


def torch_imported(name: str) -> bool:
    """Whether `llmops NAME` had torch among its modules at its end."""
    script = f"{RUN[:-len('main()')]}\ntry: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, name, str(RECIPE)], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1] == "True"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    asked = options.parse_args()
    record = about(asked, ("pydantic", "PyYAML"))
    results = Results(asked.out, record)
    print(said(record))
    commands = {NOTHING: ["-c", "pass"], "llmops validate": ["-c", RUN, "validate", str(RECIPE)],
                "llmops plan": ["-c", RUN, "plan", str(RECIPE)]}

    def call(words: list[str]) -> Any:
        return lambda _: subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    times = timed({name: call(words) for name, words in commands.items()}, turns=asked.rounds)
    lines = {name: {"median_s": median(found), "over_nothing": ratio(found, times[NOTHING])}
             for name, found in times.items()}
    for name, found in lines.items():
        print(f"{name:16} {1000 * found['median_s']:7.1f} ms  {shown(found['over_nothing'], 1)} x")
    results.keep(lines=lines)
    imported = {name: torch_imported(name) for name in ("validate", "plan")}
    print("\n".join(f"torch imported by {name}: {yes}" for name, yes in imported.items()))
    results.end(torch_imported=imported)


if __name__ == "__main__":
    main()
