"""Hours of intensity: means against a sum over seconds, the cleanest window against a search of every minute."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

import pytest

from llmops.errors import LlmopsError
from llmops.measure.grid import Grid, cleanest, read_grid

BEGIN = datetime(2026, 11, 24, tzinfo=UTC).timestamp()


def written(place: Path, text: str) -> Path:
    path = place / "grid.csv"
    path.write_text(text)
    return path


def grid(figures: list[float], step_s: float = 3600.0) -> Grid:
    return Grid("g.csv", {"FRA": (tuple(BEGIN + step_s * n for n in range(len(figures) + 1)), tuple(figures))})


def test_a_file_is_read(tmp_path: Path) -> None:
    found = read_grid(written(tmp_path, "utc,zone,g_per_kwh,note\n2026-11-24T01:00Z,FRA,50,x\n"
                                        "2026-11-24T01:00+01:00,FRA,30,x\n2026-11-24T00:00,US-CAL-CISO,200,x\n"))
    assert found.zones["FRA"] == ((BEGIN, BEGIN + 3600, BEGIN + 7200), (30.0, 50.0))  # in order, in UTC
    assert found.mean("FRA", BEGIN + 1800, BEGIN + 5400) == 40 and found.mean("FRA", BEGIN + 3600, BEGIN + 3600) == 50
    assert found.covers("US-CAL-CISO") == (BEGIN, BEGIN + 3600)


@pytest.mark.parametrize("text, said", [
    ("time,zone,g_per_kwh\n", "grid.csv:1: no column utc"), ("utc,zone,g_per_kwh\n", "holds no figures"),
    ("utc,zone,g_per_kwh\nnoon,FRA,1\n", 'grid.csv:2: utc "noon"'),
    ("utc,zone,g_per_kwh\n2026-11-24T00:00Z,FRA,-1\n", 'grid.csv:2: g_per_kwh "-1"'),
    ("utc,zone,g_per_kwh\n2026-11-24T00:00Z,FRA,\n", 'grid.csv:2: g_per_kwh ""'),
    ("utc,zone,g_per_kwh\n2026-11-24T00:00Z,,5\n", "grid.csv:2: no zone"),
    ("utc,zone,g_per_kwh\n2026-11-24T00:00Z,FRA,5\n2026-11-24T00:00Z,FRA,6\n", "a second figure for FRA"),
    ("utc,zone,g_per_kwh\n" + "".join(f"2026-11-24T0{h}:00Z,FRA,5\n" for h in (0, 1, 3)), "without holes")])
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(LlmopsError, match="expected") as caught:
        read_grid(written(tmp_path, text))
    assert said in str(caught.value)


def test_no_other_zone_and_no_other_hour_is_taken() -> None:
    both = Grid("g.csv", {**grid([1.0]).zones, "DEU": grid([2.0]).zones["FRA"]})
    assert grid([1.0]).zone(None) == "FRA"
    for wanted, said in ((None, "FRA, DEU"), ("FR", 'did you mean "FRA"')):
        with pytest.raises(LlmopsError, match=said):
            both.zone(wanted)
    for start, end in ((-1.0, 10.0), (10.0, 3601.0)):
        with pytest.raises(LlmopsError, match="covers it"):
            both.mean("FRA", BEGIN + start, BEGIN + end)
    unknown = both.intensity("FRA", BEGIN, BEGIN + 1e6)
    assert unknown.value is None and "tells of FRA from 2026-11-24T00:00Z" in unknown.method


def test_means_are_those_of_a_sum_over_seconds() -> None:
    draw = random.Random(0)
    figures = [draw.uniform(10, 600) for _ in range(9)]
    hours = grid(figures, 600.0)
    for _ in range(50):
        start, end = sorted(draw.sample(range(9 * 600), 2))
        summed = sum(figures[second // 600] for second in range(start, end)) / (end - start)
        assert hours.mean("FRA", BEGIN + start, BEGIN + end) == pytest.approx(summed)


@pytest.mark.parametrize("seed", range(6))
def test_the_cleanest_window_is_that_of_a_search_of_every_minute(seed: int) -> None:
    draw = random.Random(seed)
    hours = grid([draw.uniform(10, 600) for _ in range(12)])
    earliest, lasts = BEGIN + 60 * draw.randrange(100), 60.0 * draw.randrange(20, 240)
    deadline = BEGIN + 3600 * 10.5
    best = min(hours.mean("FRA", start, start + lasts)
               for start in (earliest + 60 * n for n in range(700)) if start + lasts <= deadline)
    found = cleanest(hours, "FRA", earliest, deadline, lasts)
    assert earliest <= found.start and found.end <= deadline and found.end - found.start == pytest.approx(lasts)
    assert found.g_per_kwh <= best + 1e-9 and found.g_per_kwh == hours.mean("FRA", found.start, found.end)
    assert found == cleanest(hours, "FRA", earliest, deadline, lasts)


def test_equal_windows_start_at_once_and_none_is_refused() -> None:
    assert cleanest(grid([5.0] * 4), "FRA", BEGIN + 7, BEGIN + 9000, 3600).start == BEGIN + 7
    with pytest.raises(LlmopsError, match="later deadline"):
        cleanest(grid([5.0] * 4), "FRA", BEGIN + 7, BEGIN + 3600, 3600)
