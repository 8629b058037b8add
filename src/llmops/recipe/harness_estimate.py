"""How many tokens a task of lm-evaluation-harness takes, where that can be known without lm-eval: a task of one's own.

A task that a YAML file under `include` defines, over a local file of rows, is asked once a row and choice:

    T = rows x C x (bytes / rows / 4) x (1 + shots)      C: CHOICES of a task of choices, else 1

as a likely figure, like all of `energy_estimate.py`: a token is taken as four bytes of the row, answers and choices in
it included. A task that lm-eval brings has its data elsewhere, and their size is nobody's to know before: None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmops.evaluate.options import Harness

__all__ = ["harness_tokens"]

BYTES_A_TOKEN, CHOICES = 4.0, 4.0
LARGEST = 64_000_000  # bytes of a file whose rows are counted


def harness_tokens(options: Harness, base_dir: Path) -> dict[str, float | None]:
    """Task -> its likely tokens, None where they are not known."""
    own = dict(_own(base_dir / options.include)) if options.include is not None else {}
    return {task: _tokens(*own[task], options) if task in own else None for task in options.tasks}


def _own(folder: Path) -> Iterator[tuple[str, tuple[Mapping[str, Any], Path]]]:
    """(name, (definition, its folder)) of every task that a YAML file names; those with Python in them are left out."""
    import yaml

    for path in sorted(folder.rglob("*.yaml")):
        try:
            body = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(body, dict) and isinstance(body.get("task"), str):
            yield body["task"], (body, folder)


def _tokens(body: Mapping[str, Any], folder: Path, options: Harness) -> float | None:
    paths = [folder / each for each in _files(body)]
    if not paths or any(not path.is_file() or path.stat().st_size > LARGEST for path in paths):
        return None
    size, rows = sum(path.stat().st_size for path in paths), sum(map(_rows, paths))
    if not rows:
        return None
    asked = min(rows, options.limit) if options.limit is not None else rows
    shots = options.shots if options.shots is not None else body.get("num_fewshot")
    choices = CHOICES if body.get("output_type") == "multiple_choice" else 1.0
    return asked * choices * size / rows / BYTES_A_TOKEN * (1 + (shots if isinstance(shots, int) else 0))


def _files(body: Mapping[str, Any]) -> list[str]:
    """The local files of the split that is asked, as the task names them."""
    kwargs = body.get("dataset_kwargs")
    given = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    if isinstance(given, dict):
        given = given.get(body.get("test_split") or body.get("validation_split"))
    found = [given] if isinstance(given, str) else given
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def _rows(path: Path) -> int:
    with open(path, "rb") as file:
        lines = sum(1 for line in file if line.strip())
    return max(0, lines - 1) if path.suffix.lower() == ".csv" else lines
