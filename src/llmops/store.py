"""Where everything a run makes lies: `runs/ledger.db`, `runs/store/KEY/` the builds, `runs/NAME/` what one run shows.

A build is found by its key alone, so two recipes that share a prefix share its builds. A run's own folder holds the
recipe as it ran, the log, the report, and a link per variant.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops.errors import StoreError

if TYPE_CHECKING:
    from llmops.ledger import Ledger
    from llmops.locks import Locks

__all__ = ["RUNS_VARIABLE", "Store", "replace_file"]

RUNS_VARIABLE = "LLMOPS_RUNS"


class Store:
    """`Store(None)` is `$LLMOPS_RUNS`, or `runs/` here."""

    def __init__(self, runs: str | Path | None = None) -> None:
        self.runs = Path(runs or os.environ.get(RUNS_VARIABLE) or "runs").expanduser().absolute()
        if self.runs.exists() and not self.runs.is_dir():
            raise StoreError(f"{self.runs}: is a file; expected a folder for runs; name another with --runs")

    @property
    def builds(self) -> Path:
        return self.runs / "store"

    def build(self, key: str) -> Path:
        """The folder of a build; it is whole when it is there."""
        return self.builds / key

    def work(self, key: str) -> Path:
        """Where a build that is under way keeps checkpoints and notes; gone once the build is whole."""
        return self.builds / f"{key}.work"

    def scoring(self, score_key: str) -> Path:
        """Where the scores of a variant wait, entry by entry, until its row is written."""
        return self.runs / "scoring" / score_key

    def scored(self, score_key: str) -> None:
        """The row is written: what waited for it goes."""
        import shutil

        shutil.rmtree(self.scoring(score_key), ignore_errors=True)

    def measured(self, key: str) -> Path:
        """What was measured of a parent for builds that differ in their budget alone."""
        return self.runs / "measured" / f"{key}.json"

    def signals(self, key: str) -> Path:
        """A teacher's signals, which any student may read."""
        return self.runs / "signals" / key

    def answers(self, key: str) -> Path:
        """A teacher's answers to the prompts of some data, which any student may read."""
        return self.runs / "answers" / key

    def written(self, key: str) -> Path:
        """Data that a teacher wrote."""
        return self.runs / "written" / key

    def folder(self, run: str) -> Path:
        """What one run shows: recipe, log, report, links."""
        return self.runs / run

    def ledger(self) -> Ledger:
        from llmops.ledger import Ledger  # brings SQLite, which a plan without a ledger does not need

        return Ledger(self.runs / "ledger.db")

    def locks(self) -> Locks:
        """Who is building or scoring what, by key."""
        from llmops.locks import Locks

        return Locks(self.builds)

    def tidy(self, key: str) -> None:
        """Remove what killed processes left of a build, whose lock is held; work that can be gone on with stays."""
        import shutil  # brings every kind of archive, which a plan does not need

        for left in self.builds.glob(f".{key}.*"):
            shutil.rmtree(left, ignore_errors=True)
        if (self.build(key) / "llmops.json").exists():
            shutil.rmtree(self.work(key), ignore_errors=True)

    def manifest(self, key: str) -> dict[str, Any]:
        """`llmops.json` of a build. Raises StoreError when the build is not there or its manifest is damaged."""
        path = self.build(key) / "llmops.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: cannot be read ({error}); expected the manifest of a finished build; remove the "
                             "folder and run the same command again, it will be rebuilt") from error

    def link(self, run: str, variant: str, key: str) -> None:
        """`runs/RUN/VARIANT` -> `../store/KEY`, replaced in one step."""
        _link(self.folder(run) / variant, Path("..") / "store" / key)

    def link_written(self, run: str, name: str, key: str) -> None:
        """`runs/RUN/_written/NAME` -> `../../written/KEY`: data that a teacher wrote for the run."""
        _link(self.folder(run) / "_written" / name, Path("..") / ".." / "written" / key)


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.parent / f".{place.name}.{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target, target_is_directory=True)
    fresh.replace(place)


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step, and remove what a killed process left of an earlier try."""
    from llmops.locks import alive

    for left in path.parent.glob(f".{path.name}.*"):
        pid = left.name.rpartition(".")[2]
        if pid.isdigit() and not alive(int(pid)):
            left.unlink(missing_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text + ("" if text.endswith("\n") else "\n"), encoding="utf-8")
    scratch.replace(path)
