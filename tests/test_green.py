"""A green start: what is chosen, what starting at once would have cost, and options that do not go together."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.runs import recipe, workplace

from llmops.cli import main
from llmops.errors import LlmopsError
from llmops.green import Green, asked, choose, seconds, wait
from llmops.planner import plan
from llmops.quantity import Quantity

NOW = datetime(2026, 11, 24, tzinfo=UTC).timestamp()
SMALL = {"prompt_tokens": 8, "new_tokens": 2, "batch_sizes": [1], "repeats": 2}
W8 = {"w8": {"quantize": {"method": "rtn", "scheme": "w8a16"}}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workplace(tmp_path_factory.mktemp("green"))
    figures = (300, 280, 120, 60, 90, 400)
    (folder / "grid.csv").write_text("utc,zone,g_per_kwh\n" + "".join(
        f"2026-11-24T0{hour}:00Z,FRA,{value}\n" for hour, value in enumerate(figures)))
    return folder


def planned(place: Path, tmp_path: Path, **measure: Any) -> Any:
    from llmops.recipe import parse_recipe

    body = recipe(W8, **({"measure": SMALL | measure} if measure else {}))
    return plan(parse_recipe(body, base_dir=place), runs=tmp_path / "runs")


def test_the_cleanest_hours_are_chosen_and_now_is_written_beside(place: Path, tmp_path: Path) -> None:
    start = choose(Green(6 * 3600, lasts_s=7200), planned(place, tmp_path, intensity="grid.csv", zone="FRA"), now=NOW)
    assert (start.waited_s, start.g_per_kwh, start.now_g_per_kwh) == (3 * 3600, 75, 290)
    assert "in 3 h; 75 gCO2e/kWh in FRA by grid.csv, starting now 290 (-74.1 %)" in start.told()
    row = start.row(Quantity(3.6e6, "J", "measured", "counter"))
    assert row["start_now_building_g"]["value"] == 290 and row["start_intensity"]["value"] == 75
    assert start.row(Quantity.null("J", "no sensor"))["start_now_building_g"]["value"] is None
    soon = choose(Green(3 * 3600, place / "grid.csv", 3600), planned(place, tmp_path), now=NOW)  # its only zone
    assert soon.start == NOW + 7200 and soon.deadline == NOW + 3 * 3600


def test_how_long_it_takes_is_what_it_took_before(place: Path, tmp_path: Path) -> None:
    made = planned(place, tmp_path, intensity="grid.csv")
    rows = [{"identity": {"run": "r", "variant": name}, "status": {"state": "ok"},
             "building": {"wall_s": {"value": 3000.0}, "evaluate_wall_s": {"value": 600.0}}} for name in ("base", "w8")]
    known, assumed = choose(Green(2e4), made, rows, now=NOW), choose(Green(2e4), made, rows[:1], now=NOW)
    assert known.lasts_s == 7200 and "took before" in known.lasts_from
    assert assumed.lasts_s == 3600 and "assumed" in assumed.lasts_from


@pytest.mark.parametrize("green, measure, said", [
    (Green(3600, lasts_s=7200), {"intensity": "grid.csv"}, "the run takes 2 h"),
    (Green(3600), {}, "--forecast FILE"),
    (Green(3600, lasts_s=60), {"intensity": "grid.csv", "sensor": "none"}, "")])
def test_bad_calls_are_refused(place: Path, tmp_path: Path, green: Green, measure: Any, said: str) -> None:
    made = planned(place, tmp_path, **measure)
    if not said:  # the forecast is of another day
        with pytest.raises(LlmopsError, match="use a forecast that covers it"):
            choose(green, made, now=NOW + 1e6)
        return
    with pytest.raises(LlmopsError, match=said):
        choose(green, made, now=NOW)


def test_options_and_times() -> None:
    assert asked(False, None, None, None) is None
    assert asked(True, "12h", "f.csv", "90m") == Green(43200.0, Path("f.csv"), 5400.0)
    for given, said in (((False, "12h", None, None), "without --green"), ((True, None, None, None), "--deadline 12h"),
                        ((True, "noon", None, None), '"noon"'), ((True, "0h", None, None), "expected a time")):
        with pytest.raises(LlmopsError, match=said):
            asked(*given)
    assert seconds("1.5d", "x") == 129600


def test_waiting_looks_at_the_clock_again(place: Path, tmp_path: Path) -> None:
    start = choose(Green(6 * 3600, lasts_s=7200), planned(place, tmp_path, intensity="grid.csv"), now=NOW)
    clock, naps = [NOW], []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        clock[0] += seconds if len(naps) > 1 else 9000  # a laptop slept

    wait(start, lambda: clock[0], sleep)
    assert clock[0] == pytest.approx(start.start) and max(naps) <= 30


def test_a_run_keeps_what_starting_at_once_would_have_cost(place: Path, tmp_path: Path, capsys: Any,
                                                           monkeypatch: Any) -> None:
    import llmops.green

    monkeypatch.setattr(llmops.green, "wait", lambda start: None)
    monkeypatch.setattr(llmops.green.time, "time", lambda: NOW)
    body = recipe(W8, measure={"sensor": "declared", "watts": 50, **SMALL}, name="g")
    (place / "g.yaml").write_text(json.dumps(body))
    call = ["tune", str(place / "g.yaml"), "--runs", str(tmp_path), "--green", "--deadline", "5h", "--forecast",
            str(place / "grid.csv"), "--json"]
    assert main(call) == 0
    told = capsys.readouterr()
    row = next(row for row in json.loads(told.out) if row["identity"]["variant"] == "w8")
    kept = json.loads((tmp_path / "g" / "start.json").read_text())
    assert kept["start_utc"] == "2026-11-24T03:00Z" and kept["saved"] == pytest.approx(1 - 60 / 300)
    joules = row["building"]["chain_energy_j"]["value"]
    assert row["carbon"]["start_now_building_g"]["value"] == pytest.approx(joules * 300 / 3.6e6)
    assert "green start: at 2026-11-24T03:00Z" in told.err
    assert main(["tune", str(place / "g.yaml"), "--runs", str(tmp_path), "--lasts", "2h"]) == 2
