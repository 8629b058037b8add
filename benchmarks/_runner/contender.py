"""A contender as a process of its own, in a Python of its own, which answers lines of JSON with lines of JSON.

The other end is `worker.py`. What the process prints beside its answers goes to a log; one that ends, or cannot run
at all, is a row of the table with a reason and not the end of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Contender", "surroundings", "told_once"]

HERE = Path(__file__).parents[1]


def surroundings(threads: int = 1, **more: str) -> dict[str, str]:
    """The environment of a contender: this checkout on its path, so many threads, no network, no chatter."""
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE.parent / "kernels"), str(HERE)])
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore", "PYTHONPATH": path, **more}


class Contender:
    """The process. `failed`: why it can take no question, or ""."""

    def __init__(self, name: str, script: str, case: Mapping[str, Any], python: str | Path, logs: Path, *,
                 threads: int = 1, **more: str) -> None:
        """Starts `python benchmarks/SCRIPT NAME CASE` and waits for its first line. more: environment variables."""
        self.name, self.log = name, logs / f"{name}.log"
        logs.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as errors:
            self.process = subprocess.Popen([str(python), str(HERE / script), name, json.dumps(dict(case))],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                            env=surroundings(threads, **more), cwd=logs)
        self.failed = ""
        self.first = self.hear()
        self.failed = self.first.get("failed", "")

    def hear(self) -> dict[str, Any]:
        """Its next answer; {"failed": why} where it gives none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        made: dict[str, Any] = json.loads(line) if line else {"failed": self._ended()}
        return made

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to a question."""
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            return {"failed": self._ended()}
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"failed": self._ended()}
        return self.hear()

    def _ended(self) -> str:
        return self.failed or f"its process ended; see {self.log.name}"

    def end(self) -> None:
        """No more questions: wait until it has gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it went before
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def told_once(script: str | Path, words: list[str], *, python: str | Path = sys.executable,
              environment: Mapping[str, str] | None = None) -> Any:
    """What `python benchmarks/SCRIPT WORDS` prints as JSON on its last line. Raises SystemExit with the end of what it
    wrote to stderr when it fails. environment: all of it; the surroundings of a contender where none is given."""
    done = subprocess.run([str(python), str(HERE / script), *words], capture_output=True, text=True, check=False,
                          env=dict(environment) if environment is not None else surroundings())
    if done.returncode != 0:
        raise SystemExit(f"{Path(script).name} {' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
