"""benchmarks/gpu.py rehearsed on the CPU: every check holds, every case and the model run, the file is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("triton")


def gpu(*words: str) -> subprocess.CompletedProcess[str]:
    """As from a checkout, with nothing of ours on the path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words], capture_output=True, text=True,
                          env=environment | {"OMP_NUM_THREADS": "1"}, cwd="/")


@pytest.mark.slow
def test_the_whole_run_in_the_interpreter(tmp_path: Path) -> None:
    done = gpu("--dry", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    ops = {path.stem for path in (ROOT / "benchmarks" / "kernels").glob("*.py") if not path.stem.startswith("_")}
    assert {check["op"] for check in found["checks"]} == ops and all(check["held"] for check in found["checks"])
    assert found["errors"] == [] == found["left_out"] and found["meta"]["dry"] is True
    timed = {row["op"] for row in found["timings"]}
    assert timed >= ops - {"int_matmul", "kv_append"} and "kv_rope_append" in timed
    for row in found["timings"]:
        assert row["floor_us"] > 0 and len(row["contenders"]) >= 2 and "llmops" in row["contenders"], row
        assert all(one["us"] > 0 and one["of_floor"] > 0 for one in row["contenders"].values())
    assert [row["kind"] for row in found["end_to_end"]] == ["bf16", "w8", "w4", "w4+kv8"]
    assert all(row["tokens_per_s"] > 0 and row["joined"] == 4 and row["joules_per_token"] is None
               for row in found["end_to_end"])


def test_it_stops_when_the_time_is_used_up_and_writes_what_it_has(tmp_path: Path) -> None:
    done = gpu("--dry", "--only", "quantize_tokens", "--no-model", "--budget", "0", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["timings"] == [] and len(found["left_out"]) == 3 and len(found["checks"]) == 1
    assert set(found["ceilings"]) >= {"copy", "bf16", "int8"}


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = gpu("--no-model")
    assert done.returncode == 2 and "--dry rehearses" in done.stderr
