"""The table of all kernels as machine code for sm_90, no GPU needed: `python -m benchmarks.offline [OP ...]`.

Compiles what every `benchmarks/kernels/OP.py` lists in `compiled()`, prints the table that docs/kernels.md holds, and
exits with 1 when a kernel breaks one of its requirements (tests/kernels/offline.py says what is read and why).

    --check   print only what is broken        --json    a line a kernel, with the opcodes of its main loop
    --write   put the table into docs/kernels.md
    --sample  of each op only the first of each kernel, matrix instruction and limit, and of each type of what it reads
              where there is a limit: what the ordinary tests compile
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- offline table: python -m benchmarks.offline --write -->", "<!-- end of the offline table -->"


def ops() -> list[str]:
    """Every op that has a benchmark, by name."""
    return sorted(path.stem for path in (ROOT / "benchmarks" / "kernels").glob("*.py") if not path.stem.startswith("_"))


def sample(cases: Sequence[Any]) -> list[Any]:
    """The first of each `kind` among the cases of an op."""
    return list({kind(case): case for case in reversed(cases)}.values())[::-1]


def kind(case: Any) -> tuple[Any, ...]:
    """Kernel, matrix instruction and limit; with a limit the types of all that the kernel reads, too."""
    read = [(name, held) for name, held in sorted(case.types.items()) if name != "y_ptr"]
    return id(case.kernel), case.matrix, case.limit, tuple(read) if case.limit else ()


def table(rows: list[tuple[Any, Any]]) -> str:
    """Markdown; each row is (Compiled, Code)."""
    lines = ["| kernel | registers | shared, KB | matrix instructions | 16-byte copies | main loop | instructions a "
             "weight (limit) |", "|-|-:|-:|-|-:|-:|-:|"]
    for case, code in rows:
        matrix = ", ".join(f"{count} {name}" for name, count in code.matrix.items()) or "-"
        weight = "-" if code.per_weight is None else f"{code.per_weight:.2f}"
        limit = f" ({case.limit:g})" if case.limit else ""
        lines.append(f"| {code.name} | {code.registers} | {code.shared / 1024:.0f} | {matrix} | "
                     f"{code.async16}/{code.async_all} | {code.loop} | {weight}{limit} |")
    return "\n".join(lines)


def write(text: str) -> None:
    page = ROOT / "docs" / "kernels.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(ops())}; all when none is named")
    for flag in ("--check", "--json", "--sample", "--write"):
        parser.add_argument(flag, action="store_true")
    asked = parser.parse_args()
    if asked.write and (asked.sample or asked.ops):
        parser.error("--write puts down the whole table; expected neither --sample nor names of ops beside it")
    from tests.kernels import offline

    rows, wrong = [], []
    for op in asked.ops or ops():
        cases = importlib.import_module(f"benchmarks.kernels.{op}").compiled()
        for case in sample(cases) if asked.sample else cases:
            code = offline.inspect(case)
            rows.append((case, code))
            wrong += offline.faults(case, code)
            if asked.json:
                print(json.dumps({"op": op, **asdict(code), "limit": case.limit}), flush=True)
    import triton

    text = f"Triton {triton.__version__}, sm_90.\n\n{table(rows)}"
    if asked.write:
        write(text)
    elif not asked.json and not asked.check:
        print(text)
    print("\n".join(wrong) or f"Triton {triton.__version__}: {len(rows)} kernels as required", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
