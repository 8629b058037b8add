"""The benchmark of energy readings on devices whose energy is known: its devices, its readers, and what it finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_energy_traces

    return bench_energy_traces


def test_the_energy_of_a_simulated_power_is_its_integral(bench: Any) -> None:
    case = bench.cases(2.0, 1)[2]
    power = case.counter.power
    grid = [case.begin + step * 1e-3 for step in range(1500)]
    summed = sum((power.energy(later) - power.energy(earlier)) for earlier, later in zip(grid, grid[1:], strict=False))
    assert summed == pytest.approx(power.energy(grid[-1]) - power.energy(grid[0]))
    (t0, w0), (t1, w1) = power.points[2], power.points[3]
    assert power.energy(t1) - power.energy(t0) == pytest.approx((w0 + w1) / 2 * (t1 - t0))
    assert bench.cases(2.0, 1)[2].counter.joules(16.0) == case.counter.joules(16.0)  # the same in every process


def test_windows_of_the_protocol_are_within_one_percent_and_polling_is_not(bench: Any, tmp_path: Path,
                                                                          monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--each", "2", "--json", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 0, capsys.readouterr().out
    lines = json.loads((tmp_path / "r.json").read_text())["lines"]
    worst = {reader: max(each["largest_error"] for each in lines if each["reader"] == reader
                         and not each["case"].startswith("0.06 ")) for reader in ("llmops", "naive polling")}
    assert worst["llmops"] < 0.01 < worst["naive polling"]
    short = [each for each in lines if each["case"].startswith("0.06 ") and each["reader"] == "llmops"]
    assert short and all(each["not_known"] == each["windows"] for each in short)
    assert all("shorter than one update" in each["reason"] for each in short)
    wrapped = {each["reader"]: each["largest_error"] for each in lines if each["case"] == "rapl, wraps"}
    assert wrapped["llmops"] < 1e-4 < 0.5 < wrapped["end - begin"]
