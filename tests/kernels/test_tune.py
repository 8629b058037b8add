"""The tuner: its search, its tables, its refusals; and the whole path on a tiny shape in the interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.processes import python

from llmops_kernels import config, timing, tune
from llmops_kernels._trials import TRIALS, Trial


def test_the_search_finds_the_fastest_along_its_axes_and_skips_what_does_not_run() -> None:
    asked: list[dict[str, int]] = []

    def measure(tiles: config.Config) -> float | None:
        asked.append(tiles)
        if tiles["stages"] == 4:
            return None
        late = 0.5 * (tiles["stages"] != 3 and tiles["n"] == 128)  # after n has moved: a second round
        return 1 + abs(tiles["n"] - 128) / 64 + abs(tiles["k"] - 3) + late

    axes = {"stages": (2, 3, 4), "n": (32, 64, 128), "k": (1, 2, 3)}
    best, least, first, tried = tune.descend({"n": 32, "k": 1, "stages": 2}, axes, measure)
    assert best == {"n": 128, "k": 3, "stages": 3} and least == 1.0 and first == 4.5
    assert tried == len(asked) == len({json.dumps(tiles, sort_keys=True) for tiles in asked}) < 27
    with pytest.raises(RuntimeError, match="the rule's own tiles"):
        tune.descend({"n": 32, "k": 1, "stages": 4}, axes, measure)


def test_tiles_with_another_result_never_win(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(seed: int) -> Any:
        x = torch.randn(8, generator=torch.Generator().manual_seed(seed))

        def call() -> torch.Tensor:
            tiles = config.pick("toy", "N=1,K=1", 1, "cpu") or {}
            if tiles["n"] == 3:
                raise ValueError("tiles do not fit")
            return x * (2.0 if tiles["n"] == 2 else float("nan") if tiles["n"] == 5 else 1.0)

        return call

    def seconds(calls: Any) -> float:
        return 1.0 / (config.pick("toy", "N=1,K=1", 1, "cpu") or {})["n"]

    monkeypatch.setattr(timing, "seconds", seconds)
    trial = Trial("toy", "N=1,K=1", 1, ({"n": 1}, {"n": 3}), {"n": (1, 2, 3, 4, 5)}, 32, make)
    assert tune.tune(trial, "cpu")[0] == {"n": 4}
    assert config.pick("toy", "N=1,K=1", 1, "cpu") is None  # nothing is left of the trials


def test_another_start_is_taken_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(calls: Any) -> float:
        tiles = config.pick("toy", "N=1,K=1", 1, "cpu") or {}
        return 0.5 if "DENSE" in tiles else 1.0 / tiles["n"]

    monkeypatch.setattr(timing, "seconds", seconds)
    for largest, best in ((4, {"n": 4}), (1, {"DENSE": 1})):
        trial = Trial("toy", "N=1,K=1", 1, ({"n": 1}, {"DENSE": 1}), {"n": tuple(range(1, largest + 1))}, 32,
                      lambda seed: lambda: torch.ones(1))
        assert tune.tune(trial, "cpu")[0] == best


def test_tables_are_merged_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.write(tmp_path / "new", "toy", "NVIDIA_H200", "N=8,K=8", 64, {"BLOCK_N": 64})
    tune.write(tmp_path / "new", "toy", "NVIDIA_H200", "N=8,K=8", 1, {"BLOCK_N": 16})
    tune.write(tmp_path / "new", "toy", "NVIDIA_H200", "N=8,K=8", 64, {"BLOCK_N": 128})
    tune.write(tmp_path / "new", "toy", "NVIDIA_A100", "N=8,K=8", 1, {"BLOCK_N": 32})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["toy.json"]
    monkeypatch.setenv("LLMOPS_KERNEL_CONFIGS", str(tmp_path / "new"))
    config.entries.cache_clear()
    assert [(config.pick("toy", "N=8,K=8", m, "NVIDIA_H200") or {})["BLOCK_N"] for m in (1, 7, 9, 4096)] == [
        16, 16, 128, 128]
    assert config.pick("toy", "N=8,K=9", 1, "NVIDIA_H200") is None
    config.entries.cache_clear()
    (tmp_path / "new" / "toy.json").write_text('{"NVIDIA_H200": {"N=8,K=8": {"x": 1}}}')
    with pytest.raises(ValueError, match="toy.json: .*expected"):
        tune.write(tmp_path / "new", "toy", "NVIDIA_H200", "N=8,K=8", 1, {"BLOCK_N": 16})
    assert "x" in (tmp_path / "new" / "toy.json").read_text()


def test_every_start_and_axis_is_one_of_the_ops() -> None:
    for op, trials in TRIALS.items():
        for m in (1, 17, 4096):
            for trial in trials(4096, 4096, m, "cpu", 132):
                assert trial.op == op and any(set(trial.axes) <= set(start) for start in trial.starts), trial
                assert all(all(isinstance(v, int) for v in values) for values in trial.axes.values())
                assert trial.footprint > 0 and trial.shape.startswith("N=4096,K=4096")


def test_attention_is_tuned_for_widths_of_heads_and_rooms() -> None:
    found = list(tune.trials(["kv_attention", "int8_linear"], None, None, "cpu"))
    attention = [trial for trial in found if trial.op == "kv_attention"]
    assert [(trial.shape, trial.m) for trial in attention] == [
        (f"N=128,K=128,format={format}", room) for room in tune.ROOMS for format in ("int8", "fp8", "int4")]
    assert {trial.m for trial in found if trial.op == "int8_linear"} == set(tune.ROWS)
    assert all(set(trial.axes) == set(trial.starts[0]) and trial.starts[0]["BLOCK_N"] in trial.axes["BLOCK_N"]
               for trial in attention)
    assert list(tune.trials(["kv_attention"], [(4096, 4096)], [1], "cpu")) == []
    one = next(tune.trials(["kv_attention"], [(16, 16)], [40], "cpu"))
    assert one.make(1)().shape == (1, 1, 32, 16)


def test_the_whole_path_runs_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    asked = [word for op in ("int8_linear", "sparse24_linear", "kv_attention") for word in ("--op", op)]
    done = python("-m", "llmops_kernels.tune", "--dry", *asked, "--m", "2", "--out", str(tmp_path), interpreter=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "int8_linear N=64,K=256 M=2: not measured" in done.stdout
    read = config.table(tmp_path / "int8_linear.json")["cpu"]["N=64,K=256"][2]
    assert {"BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "SWAP", "num_warps"} <= set(read)
    assert 2 in config.table(tmp_path / "sparse24_linear.json")["cpu"]["N=64,K=256"]
    assert 2 in config.table(tmp_path / "kv_attention.json")["cpu"]["N=64,K=64,format=fp8"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert tune.main(["--op", "int8_linear"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (["--shapes", "4096"], "expected N,K as in 4096,14336"), (["--shapes", "64,0"], "expected N,K"),
    (["--shapes", "64,6"], "a K that 4 divides"), (["--m", "0"], "1 or more"), (["--op", "int9"], "invalid choice")])
def test_bad_arguments_are_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
