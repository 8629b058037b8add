"""A whole run on a sensor that goes wrong midway: what was read before stands, what comes after is null with the
reason, nothing is 0, and the run itself ends well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.measure.replay import ReplaySensor
from tests.runs import recipe, workplace

from llmops.ledger import Ledger
from llmops.measure import sensors
from llmops.recipe import parse_recipe
from llmops.runner import run

SMALL = {"prompt_tokens": 8, "new_tokens": 2, "batch_sizes": [1], "repeats": 2, "idle_s": 0.05}
W8 = {"w8": {"quantize": {"method": "rtn", "scheme": "w8a16"}}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("sensors"))


def joules_of(body: Any) -> Iterator[dict[str, Any]]:
    """Every quantity in joules of a row's part."""
    if isinstance(body, dict):
        if str(body.get("unit", "")).startswith("J") and "provenance" in body:
            yield body
        for each in body.values():
            yield from joules_of(each)


def broken(wrong: Callable[[float], float]) -> tuple[ReplaySensor, list[bool]]:
    """A counter of 100 W, until the flag is set: then it reads what `wrong` makes of it."""
    flag = [False]

    def read() -> dict[str, float]:
        joules = 100 * time.perf_counter()
        return {"gpu0": wrong(joules) if flag[0] else joules}

    return ReplaySensor(read), flag


def lost(joules: float) -> float:
    raise RuntimeError("GPU is lost")


@pytest.mark.parametrize(("wrong", "said"), [
    (lost, "sensor replay failed: RuntimeError: GPU is lost"),
    (lambda joules: 7.0, "the counter of replay did not advance within")])
def test_a_sensor_that_goes_wrong_after_base(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             wrong: Callable[[float], float], said: str) -> None:
    sensor, flag = broken(wrong)
    monkeypatch.setattr(sensors, "probe", lambda options, device: sensor)
    appended = Ledger.append

    def append(self: Ledger, *given: Any) -> int:
        flag[0] = True
        return appended(self, *given)

    monkeypatch.setattr(Ledger, "append", append)
    result = run(parse_recipe(recipe(W8, measure=SMALL), base_dir=place), runs=tmp_path)
    base, w8 = result.rows
    assert result.exit_code == 0 and w8["status"]["state"] == "ok"
    assert base["energy"]["1"]["joules_per_token"]["value"] > 0
    assert base["building"]["evaluate_energy_j"]["provenance"] == "measured"
    after = [*joules_of(w8["energy"]), *joules_of(w8["building"])]
    assert len(after) > 4 and all(each["value"] is None and each["method"] for each in after)
    reasons = " | ".join(each["method"] for each in after)
    assert said in reasons
    assert w8["energy"]["1"]["saving"] == "unmeasured" and w8["carbon"]["per_1k_tokens_g"]["value"] is None
    assert w8["building"]["break_even_tokens"]["value"] is None
    assert w8["latency"]["1"]["decode_tokens_per_s"]["value"] > 0  # time is not the sensor's


def test_a_counter_that_falls_once_costs_the_window_it_fell_in(place: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    offset, scored = [0.0], []
    sensor = ReplaySensor(lambda: {"gpu0": 100 * time.perf_counter() - offset[0]})
    monkeypatch.setattr(sensors, "probe", lambda options, device: sensor)
    from llmops.score import Scorer

    evaluated = Scorer._evaluate

    def evaluate(self: Scorer, *given: Any) -> Any:
        scored.append(given)
        offset[0] = 1e6  # within the first window of scoring the counter starts anew
        return evaluated(self, *given)

    monkeypatch.setattr(Scorer, "_evaluate", evaluate)
    base, w8 = run(parse_recipe(recipe(W8, measure=SMALL), base_dir=place), runs=tmp_path).rows
    assert base["building"]["evaluate_energy_j"]["value"] is None
    assert base["building"]["evaluate_energy_j"]["method"].startswith("the counter of replay fell (gpu0)")
    assert base["energy"]["1"]["joules_per_token"]["value"] > 0
    assert w8["building"]["evaluate_energy_j"]["value"] > 0 and scored


def test_a_card_in_slices_is_a_reason_and_the_next_sensor_is_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from llmops.measure.nvml import open_nvml
    from llmops.measure.options import MeasureOptions

    card = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
                           nvmlDeviceGetMigMode=lambda handle: (1, 1))
    monkeypatch.setitem(sensors.SENSORS, "nvml", lambda options, device: open_nvml(card, ["GPU-1"]))
    named = sensors.probe(MeasureOptions(sensor="nvml"), "cuda")
    assert named.provenance == "null" and "gpu0 is partitioned (MIG)" in named.method
    declared = sensors.probe(MeasureOptions(sensor="auto", watts=300), "cuda")
    assert declared.provenance == "estimated" and "partitioned (MIG)" in declared.skipped["nvml"]
