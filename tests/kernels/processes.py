"""Scripts in processes of their own: TRITON_INTERPRET is read when triton is imported, so a test can't set it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def pythons() -> list[str]:
    """This Python, and those of environments with other versions of Triton that LLMOPS_PYTHONS names (PATH-like)."""
    return [sys.executable, *filter(None, os.environ.get("LLMOPS_PYTHONS", "").split(os.pathsep))]


def oldest_triton() -> Path | None:
    """The folder with the oldest Triton that is supported, which `make test` installs; None where that failed."""
    folder = Path(sys.prefix) / "oldest-triton"
    return folder if list(folder.glob(".installed-*")) else None


def python(*arguments: str, interpreter: bool, which: str = sys.executable, before: Path | None = None
           ) -> subprocess.CompletedProcess[str]:
    """Run Python with the kernels on its path, and `before` ahead of all; Triton's interpreter on or off."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(before)] if before else []
    environment |= {"PYTHONPATH": os.pathsep.join([*path, *(str(ROOT / part) for part in ("kernels", "src", ""))]),
                    "OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpreter else {})
    return subprocess.run([which, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def interpreted(script: str, cases: Sequence[Any]) -> list[dict[str, Any]]:
    """Run tests/kernels/SCRIPT with the cases as JSON in argv[1] under the interpreter; a JSON line a case."""
    done = python(str(HERE / script), json.dumps(cases), interpreter=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
