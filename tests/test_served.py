"""A run scores and measures a variant in the runtime that will serve it; with `kernel: ops` a CPU runs all of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.runs import recipe, workplace

import llmops
from llmops.evaluate import served
from llmops.models.serving import StepGraph, serving
from llmops.recipe import parse_recipe

VARIANTS: dict[str, Any] = {
    "w8a8": {"quantize": {"method": "rtn", "scheme": "w8a8"}},
    "kv8": {"quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32, "kv_cache": "int8"}},
    "pairs": {"prune": {"method": "magnitude", "pattern": "2:4"}}}
MEASURE = {"prompt_tokens": 8, "new_tokens": 4, "batch_sizes": [1], "repeats": 2, "window_s": 0.1, "idle_s": 0}


def test_rows_are_of_the_model_that_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, steps, answers = workplace(tmp_path), [], []
    step, write = StepGraph.__call__, served.write
    monkeypatch.setattr(StepGraph, "__call__", lambda self, **inputs: steps.append(1) or step(self, **inputs))
    monkeypatch.setattr(served, "write", lambda held, *args, **more: answers.append(held) or write(held, *args, **more))
    made = recipe(VARIANTS, runtime={"device": "cpu", "kernel": "ops"}, measure=MEASURE)
    rows = {row["identity"]["variant"]: row
            for row in llmops.run(parse_recipe(made, base_dir=place), runs=place / "runs").rows}
    for name, kernel in (("base", "torch"), ("w8a8", "ops (int8"), ("kv8", "ops"), ("pairs", "2:4")):
        row = rows[name]
        assert row["status"]["state"] == "ok", row["status"]
        assert row["transform"]["served"] == "8 layers joined, static cache, decode step by step"
        assert row["transform"]["kernel"].startswith(kernel)
        assert row["latency"]["1"] and row["quality"]["exact_match:test"]["value"]["value"] is not None
    assert rows["kv8"]["transform"]["kv_cache"] == "int8"
    assert rows["kv8"]["size"]["kv_bytes_per_token"]["value"] == 2 * 4 * 2 * 66
    assert rows["pairs"]["size"]["sparsity"]["value"] == pytest.approx(0.5)
    assert {name for name in rows["w8a8"]["transform"]["kernel_tiles"] if name.startswith("int8_linear")}
    assert len(answers) >= 4 and len(steps) > 4 * 2 * 3  # answers and requests, of every variant

    plain, _ = llmops.load(place / "runs" / "r" / "w8a8", device="cpu")
    assert serving(plain) is None
