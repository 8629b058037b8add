"""A run that kills itself (SIGKILL) right after its first checkpoint: `python -m llmops.doctor.killed RECIPE RUNS`.

The rehearsal starts it to see whether a recipe's training survives that.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from llmops.runner import run
from llmops.train.checkpoint import Checkpoints, Saved

__all__ = ["main"]


def main(recipe: str, runs: str) -> None:
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, step: int, saved: Saved) -> None:
        save(self, step, saved)
        os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = save_and_die  # type: ignore[method-assign]
    run(json.loads(Path(recipe).read_text(encoding="utf-8")), runs=runs)


if __name__ == "__main__":
    main(*sys.argv[1:3])
