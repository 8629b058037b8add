"""The cells as files that others read: results.json (everything), results.csv and results.parquet (a line a cell)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmops.errors import LlmopsError
from llmops.report.figures import show
from llmops.report.reading import quantity
from llmops.report.words import ZEROS_NOTE
from llmops.store import replace_file

__all__ = ["flat", "lines", "read", "write"]

FIGURES = (
    *(("latency", name) for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "first_token_ms_p50",
                                     "first_token_ms_p95", "inter_token_ms_p50", "inter_token_ms_p95",
                                     "speed_ratio_to_base", "aa_speed_ratio")),
    *(("energy", name) for name in ("joules_per_token", "joules_per_request", "prefill_joules_per_token",
                                    "decode_joules_per_token", "ratio_to_base", "aa_ratio")))
PLAIN = ("batch", "context", "new_tokens", "repeats", "window_s", "seed", "state", "reason", "prompts_sha256",
         "not_comparable", "weights_bytes", "runtime_version", "utc")


def flat(cell: dict[str, Any]) -> dict[str, Any]:
    """One line: names, workload, machine, and of every figure its value, both ends, provenance and method."""
    arm, reference, machine = cell["arm"], cell["reference"], cell["environment"]
    line: dict[str, Any] = {"name": arm["name"], "runtime": arm["runtime"], "model": arm["model"],
                            "model_sha256": arm["sha256"], "reference": reference["name"],
                            **{name: cell.get(name) for name in PLAIN}, "notes": "; ".join([*(cell.get("notes") or []),
                                                 *([f"zeros: {cell['zeros']}"] if cell.get("zeros") else [])]),
                            "saving": (cell.get("energy") or {}).get("saving", "unmeasured"),
                            "cpu": machine.get("cpu"), "gpu": ", ".join(map(str, machine.get("gpu") or [])) or None,
                            "device": machine.get("device"), "threads": machine.get("threads"),
                            "sensor": machine.get("sensor")}
    for part, name in FIGURES:
        found = quantity((cell.get(part) or {}).get(name), cell.get("reason") or "not in this cell")
        low, high = found.ci95 or (None, None)
        line |= {f"{name}": found.value, f"{name}_low": low, f"{name}_high": high,
                 f"{name}_provenance": found.provenance, f"{name}_method": found.method}
    return line


def write(cells: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """results.json, results.csv and results.parquet in `out`, each whole; returns their paths.

    Raises LlmopsError when the folder cannot be written.
    """
    rows = [flat(cell) for cell in cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["name"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths = [out / f"results.{kind}" for kind in ("json", "csv", "parquet")]
    try:
        replace_file(paths[0], json.dumps(list(cells), indent=1, ensure_ascii=False))
        replace_file(paths[1], text.getvalue())
        _parquet(rows, paths[2])
    except OSError as error:
        raise LlmopsError(f"{out}: cannot be written to ({error}); name another folder with --out") from error
    return paths


def _parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    scratch = path.with_name(f".{path.name}.part")
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), scratch)
    scratch.replace(path)


def read(folder: Path) -> list[dict[str, Any]]:
    """The cells of an earlier matrix. Raises LlmopsError when there are none."""
    path = folder / "results.json" if folder.is_dir() else folder
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LlmopsError(f"{path}: no results can be read there ({error}); expected a folder that `llmops bench "
                          "models --out` wrote") from error
    if not isinstance(body, list) or not all(isinstance(one, dict) and {"arm", "state", "batch"} <= set(one)
                                             for one in body):
        raise LlmopsError(f"{path}: holds no cells; expected what `llmops bench models` writes")
    return body


def lines(cells: Sequence[dict[str, Any]]) -> list[str]:
    """The cells as a table of text: batch and context, then each model with its figures and ratios."""
    heads = ("model", "runtime", "batch", "context", "first token", "decode", "speed over reference", "J/token",
             "energy over reference", "saving")
    rows = [_line(cell) for cell in cells]
    widths = [max(len(row[place]) for row in (heads, *rows)) for place in range(len(heads))]
    told = ["  ".join(part.ljust(width) for part, width in zip(row, widths, strict=True)).rstrip()
            for row in (heads, *rows)]
    reasons = dict.fromkeys(f"{cell['arm']['name']}: {cell['state']}: {cell['reason']}" for cell in cells
                            if cell["state"] != "ok")
    if any(cell.get("zeros") for cell in cells):
        reasons |= {ZEROS_NOTE: None}
    reasons |= dict.fromkeys(f"{cell['arm']['name']}: no ratio: {cell['not_comparable']}" for cell in cells
                             if cell.get("not_comparable"))
    missing = next((quantity((cell.get("energy") or {}).get("joules_per_token"), "") for cell in cells
                    if cell["state"] == "ok"), None)
    return [*told, *reasons, *([f"energy is not known: {missing.method}"] if missing is not None
                               and missing.value is None else [])]


def _line(cell: dict[str, Any]) -> tuple[str, ...]:
    def told(part: str, name: str, *, interval: bool = False) -> str:
        return show(quantity((cell.get(part) or {}).get(name), ""), with_interval=interval)

    itself = cell["arm"]["name"] == cell["reference"]["name"]
    ratios = ("aa_speed_ratio", "aa_ratio") if itself else ("speed_ratio_to_base", "ratio_to_base")
    mark = " (A/A)" if itself and cell["state"] == "ok" else ""
    name = cell["arm"]["name"] + (" †" if cell.get("zeros") else "")
    return (name, cell["arm"]["runtime"], str(cell["batch"]), str(cell["context"]),
            told("latency", "first_token_ms_p50"), told("latency", "decode_tokens_per_s"),
            told("latency", ratios[0], interval=True) + mark, told("energy", "joules_per_token"),
            told("energy", ratios[1], interval=True) + mark,
            str((cell.get("energy") or {}).get("saving", "unmeasured")))
