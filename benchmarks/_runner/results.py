"""The file of a run: whole at every moment, written after every step, so that a run that is cut off keeps what it has.

A file holds the record of `machine.about` at its top, what the script adds to it, and how long the run had taken when
it was written. What earlier files hold is read by those who want it (`bench_quantize.py --against`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "Results", "add_option", "free", "parser", "write"]

FOLDER = Path(__file__).parents[1] / "results"


def parser(doc: str | None, default: str = "nowhere") -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with the option of the file. default: as there."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(made, default)
    return made


def add_option(to: argparse.ArgumentParser, default: str = "nowhere") -> None:
    """`--json FILE`, or `--out FILE`, which is the same. default: what the help says of a run without it."""
    to.add_argument("--json", "--out", dest="out", type=Path, metavar="FILE",
                    help=f"where the figures go, with machine and versions; a file of that name is replaced (default: "
                         f"{default})")


def free(name: str, folder: Path = FOLDER) -> Path:
    """`folder/NAME.json`, or NAME-2, NAME-3 ... where one is there: a run of today leaves the morning's figures."""
    place, number = folder / f"{name}.json", 1
    while place.exists():
        number += 1
        place = folder / f"{name}-{number}.json"
    return place


def write(path: Path, body: Any) -> None:
    """The body as JSON: beside its place first and then renamed into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


class Results:
    """The record of the run and what was found so far."""

    def __init__(self, path: Path | None, record: dict[str, Any]) -> None:
        self.path, self.body = path, dict(record)
        self.began = time.monotonic()

    def keep(self, **more: Any) -> None:
        """Add to the body, or put in the place of what has the name, and write all of it, where there is a file."""
        self.body |= {**more, "minutes": round((time.monotonic() - self.began) / 60, 1)}
        if self.path is not None:
            write(self.path, self.body)

    def end(self, **more: Any) -> None:
        """The last step, which says where the file is."""
        self.keep(**more)
        if self.path is not None:
            print(f"\nwritten: {self.path}")
