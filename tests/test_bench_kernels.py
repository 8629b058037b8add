"""`llmops bench kernels`: real layers, the op that would run them, and a ratio that was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmops import bench
from llmops.bench import SCHEMES, bench_kernels
from llmops.cli import main
from llmops.models.load import DTYPES, computed_in


def test_every_scheme_is_timed_on_the_op_that_would_run_it(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["bench", "kernels", "--shape", "128,256", "--tokens", "1", "--device", "cpu"]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["scheme"] for one in found] == list(SCHEMES)
    kernels = {one["scheme"]: one["kernel"] for one in found}
    assert kernels["w8a16"] == "torch:int8pack" and kernels["w3a16"] == "torch:int4pack (3-bit codes in 4-bit slots)"
    assert kernels["fp8"].startswith("reference")
    dense = computed_in("auto", "bfloat16", torch.device("cpu"))
    assert {one["dense"] for one in found} == {str(DTYPES.get(dense, torch.bfloat16)).removeprefix("torch.")}
    assert all(0 < one["ratio"] < 1e4 and (one["N"], one["K"], one["M"]) == (128, 256, 1) for one in found)
    assert main([*call, "--scheme", "w4a16", "--kernel", "ops"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.startswith("scheme  outputs x inputs") and line.split()[:6] == ["w4a16", "128", "x", "256", "1", "ops"]


def test_a_slower_op_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock by which torch takes two seconds and the op one."""
    made: list[float] = []

    def timer(call: Callable[[], Any], on_gpu: bool) -> Callable[[], float]:
        made.append(1.0 if made else 2.0)  # torch's comes first
        second = made[-1]
        return lambda: second

    monkeypatch.setattr(bench, "_timer", timer)
    (one,) = bench_kernels(["w8a16"], [(128, 128)], [2], device="cpu")
    assert one["ratio"] == 2.0


@pytest.mark.parametrize(("words", "message"), [
    (["--scheme", "w5a16"], 'unknown scheme "w5a16"'), (["--shape", "128"], "expected outputs,inputs"),
    (["--kernel", "triton", "--scheme", "w4a16", "--device", "cpu"], "kernel triton on device cpu"),
    (["--shape", "64,100", "--scheme", "w4a16", "--device", "cpu"], "expected a multiple of 128")])
def test_bad_calls_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *words]) == 2
    assert message in capsys.readouterr().err
