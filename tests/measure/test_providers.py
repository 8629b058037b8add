"""Carbon intensity from those who publish it, played by a local server: requests, units, zones, and everything that may
go wrong, without the key ever showing.
"""

from __future__ import annotations

import contextlib
import json
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from tests.runs import recipe, workplace

from llmops.cli import main
from llmops.errors import LlmopsError
from llmops.grids import answers, known_grid
from llmops.measure.grid import from_figures
from llmops.measure.providers import PROVIDERS, electricity_maps, forecast, history, uk_carbon_intensity, watttime, web
from llmops.measure.providers.web import get

NOW = datetime(2026, 11, 24, 12, 20, tzinfo=UTC).timestamp()
TOKEN = "em-Key-123-that-must-not-show"
USER, PASSWORD = "someone", "pass-word-that-must-not-show"
HOUR = 3600.0
W8 = {"w8": {"quantize": {"method": "rtn", "scheme": "w8a16"}}}
SMALL = {"prompt_tokens": 8, "new_tokens": 2, "batch_sizes": [1], "repeats": 2, "sensor": "declared", "watts": 50}
Answer = Callable[[dict[str, list[str]], Any], tuple[int, Any]]


def at(hour: float) -> str:
    return datetime.fromtimestamp(NOW - 1200 + hour * HOUR, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Server:
    """Answers by path; remembers what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, dict[str, list[str]], Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802 - the library's name
                place = urlsplit(self.path)
                query = parse_qs(place.query)
                outer.asked.append((place.path, query, self.headers))
                answer = next((each for start, each in outer.answers.items() if place.path.startswith(start)), None)
                code, body = answer(query, self.headers) if answer is not None else (404, {"error": "no such path"})
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                with contextlib.suppress(ConnectionError):  # one that does not wait has gone
                    self.send_response(code)
                    if code == 302:
                        self.send_header("Location", "/elsewhere")
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)

            def log_message(self, *given: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    for module in (electricity_maps, watttime, uk_carbon_intensity):
        monkeypatch.setattr(module, "BASE", made.base)
    for name, value in (("ELECTRICITY_MAPS_TOKEN", f" {TOKEN}\n"), ("WATTTIME_USER", USER),
                        ("WATTTIME_PASSWORD", PASSWORD), ("NO_PROXY", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.time", lambda: NOW)
    yield made
    made.http.shutdown()
    made.http.server_close()


def maps(server: Server, *, zone: str = "FR", past: Any = None) -> None:
    """Electricity Maps for one zone: 100, 110, ... g in the hours before, 50 now, 40, 30, ... to come."""
    def listed(key: str, hours: range, value: Callable[[int], float | None]) -> Answer:
        return lambda query, headers: (200, {"zone": zone, "temporalGranularity": "hourly", key: [
            {"zone": zone, "datetime": at(hour), "carbonIntensity": value(hour), "isEstimated": True}
            for hour in hours]})

    server.answers |= {
        "/v4/carbon-intensity/history": listed("history", range(-23, 0), lambda hour: 100 - 10 * (hour + 1)),
        "/v4/carbon-intensity/past-range": past or listed("data", range(-60, -23), lambda hour: 200),
        "/v4/carbon-intensity/latest": lambda query, headers: (
            200, {"zone": zone, "carbonIntensity": 50, "datetime": at(0), "emissionFactorType": "lifecycle"}),
        "/v4/carbon-intensity/forecast": listed("forecast", range(1, 25), lambda hour: 50 - 10 * hour if hour < 4 else
                                                300)}


def moer(server: Server, *, region: str = "CAISO_NORTH", units: str = "lbs_co2_per_mwh") -> None:
    """WattTime: 1,000 lb/MWh, falling to 500 an hour from now; a token for the right password."""
    basic = b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    def login(query: Any, headers: Any) -> tuple[int, Any]:
        return (200, {"token": "short-lived-token"}) if headers["Authorization"] == f"Basic {basic}" else (
            401, {"error": "no", "given": headers["Authorization"]})

    def listed(first: float, last: float) -> Answer:
        def answer(query: Any, headers: Any) -> tuple[int, Any]:
            if headers["Authorization"] != "Bearer short-lived-token":
                return 401, {"error": "bad token"}
            steps = range(round(first * 12), round(last * 12))
            return 200, {"data": [{"point_time": at(step / 12), "value": 1000 if step < 12 else 500}
                                  for step in steps],
                         "meta": {"region": region, "units": units, "signal_type": "co2_moer"}}
        return answer

    server.answers |= {"/login": login, "/v3/historical": listed(-2, 1 / 6), "/v3/forecast": listed(5 / 12, 24)}


# -------------------------------------------------------------------------------------------------------- what is asked


def test_electricity_maps_hours_are_averaged_from_start_to_end(server: Server) -> None:
    maps(server)
    grid = history("electricity_maps", "FR", NOW - 2 * HOUR, NOW)
    # 10:20 to 12:20: forty minutes at 110, an hour at 100, twenty minutes at 50
    assert grid.mean("FR", NOW - 2 * HOUR, NOW) == pytest.approx((40 * 110 + 60 * 100 + 20 * 50) / 120)
    assert grid.kind == "average" and [path for path, *_ in server.asked] == [
        "/v4/carbon-intensity/history", "/v4/carbon-intensity/latest"]
    for path, query, headers in server.asked:
        assert query["zone"] == ["FR"] and query["disableCallerLookup"] == ["true"], path
        assert headers["auth-token"] == TOKEN and headers["User-Agent"].startswith("llmops/")
        assert TOKEN not in str(query)


def test_older_hours_come_from_the_range_in_pieces(server: Server) -> None:
    maps(server, past=lambda query, headers: (200, {"zone": "FR", "data": [
        {"datetime": at(hour), "carbonIntensity": 200} for hour in range(-24 * 21, 0)]}))
    grid = history("electricity_maps", "FR", NOW - 20 * 24 * HOUR, NOW)
    ranges = [query for path, query, _ in server.asked if path.endswith("past-range")]
    assert len(ranges) == 3 and ranges[0]["start"] == ["2026-11-04T12:00:00Z"]
    assert ranges[0]["end"] == ranges[1]["start"] and ranges[-1]["end"] == ["2026-11-24T12:20:00Z"]
    assert grid.mean("FR", NOW - 20 * 24 * HOUR, NOW - HOUR) == pytest.approx(200)


def test_watttime_is_marginal_and_in_grams(server: Server) -> None:
    moer(server)
    grid = history("watttime", "CAISO_NORTH", NOW - HOUR, NOW)
    assert grid.kind == "marginal" and grid.mean("CAISO_NORTH", NOW - HOUR, NOW) == pytest.approx(453.59237)
    assert [path for path, *_ in server.asked] == ["/login", "/v3/historical"]
    assert "marginal" in grid.intensity("CAISO_NORTH", NOW - HOUR, NOW).method
    ahead = forecast("watttime", "CAISO_NORTH", 6.2, NOW)
    assert server.asked[-1][1]["horizon_hours"] == ["7"]
    assert ahead.mean("CAISO_NORTH", NOW, NOW + 60) == pytest.approx(453.59237)  # its first figure is of 12:25
    assert ahead.mean("CAISO_NORTH", NOW + 3 * HOUR, NOW + 4 * HOUR) == pytest.approx(453.59237 / 2)


def test_great_britain_is_half_hours_estimated_or_forecast_and_needs_no_key(server: Server, monkeypatch: Any) -> None:
    for name in ("ELECTRICITY_MAPS_TOKEN", "WATTTIME_USER", "WATTTIME_PASSWORD"):
        monkeypatch.delenv(name)
    server.answers["/intensity/"] = lambda query, headers: (200, {"data": [
        {"from": f"{at(half / 2)[:16]}Z", "to": f"{at(half / 2 + 0.5)[:16]}Z",
         "intensity": {"forecast": 90, "actual": 80 if half < 0 else None, "index": "low"}} for half in range(-4, 60)]})
    grid = history("uk_carbon_intensity", "GB", NOW - HOUR, NOW)
    assert grid.mean("GB", NOW - HOUR, NOW) == pytest.approx((40 * 80 + 20 * 90) / 60)
    assert server.asked[-1][0] == "/intensity/2026-11-24T11:00Z/2026-11-24T12:50Z"
    assert forecast("uk_carbon_intensity", "GB", 12, NOW).covers("GB")[1] == NOW - 1200 + 30 * HOUR
    assert server.asked[-1][0] == "/intensity/2026-11-24T12:20Z/fw48h"
    for ask in (lambda: history("uk_carbon_intensity", "FR", NOW - HOUR, NOW),
                lambda: forecast("uk_carbon_intensity", "GBR", 12, NOW)):
        with pytest.raises(LlmopsError, match="Great Britain alone.*expected GB"):
            ask()


# ------------------------------------------------------------------------------------------------------ what goes wrong


def fails(server: Server, said: str, name: str = "electricity_maps", zone: str = "FR") -> str:
    with pytest.raises(LlmopsError) as caught:
        history(name, zone, NOW - HOUR, NOW)
    text = "".join(map(str, (caught.value, caught.value.__cause__, caught.value.__context__)))
    assert said in str(caught.value), str(caught.value)
    for secret in (TOKEN, PASSWORD, "short-lived-token", b64encode(f"{USER}:{PASSWORD}".encode()).decode()):
        assert secret not in text
    return str(caught.value)


def test_no_key_says_which_variable(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setenv("ELECTRICITY_MAPS_TOKEN", "  ")
    fails(server, "no key; expected the environment variable ELECTRICITY_MAPS_TOKEN to be set")
    monkeypatch.delenv("WATTTIME_USER")
    monkeypatch.delenv("WATTTIME_PASSWORD")
    fails(server, "variables WATTTIME_USER and WATTTIME_PASSWORD", "watttime", "CAISO_NORTH")
    monkeypatch.setenv("ELECTRICITY_MAPS_TOKEN", f"{TOKEN}\nX-Other: 1")
    fails(server, "characters that no key has (not shown)")
    assert server.asked == []


@pytest.mark.parametrize(("code", "body", "said"), [
    (401, {"error": f"Invalid auth-token {TOKEN}"}, "refused (HTTP 401: {\"error\": \"Invalid auth-token (hidden)\"}"),
    (403, {"message": "zone not in plan"}, "a plan that has what was asked for, zone \"FR\" included"),
    (404, {"message": "No data"}, 'nothing for zone "FR" (HTTP 404'), (429, b"slow down", "too many requests"),
    (500, b"", "HTTP 500 (no text)"), (302, b"", "which is not followed, since the key would go along"),
    (200, b"<html>log in</html>", "no JSON object (<html>log in</html>)"), (200, [1], "no JSON object"),
    (200, {"zone": "FR"}, 'without "history"'),
    (200, {"zone": "US-CAL-CISO", "history": []}, 'asked for zone "FR", answered for "US-CAL-CISO"'),
    (200, {"zone": "FR", "history": [{"datetime": "noon", "carbonIntensity": 1}]}, "a time of 'noon'"),
    (200, {"zone": "FR", "history": [{"datetime": at(-1), "carbonIntensity": "low"}]}, "a figure of 'low'"),
    (200, {"zone": "FR", "history": [{"datetime": at(hour), "carbonIntensity": 4e4} for hour in (-2, -1, 0)]},
     "a figure of 40000 for FR"),
    (200, {"zone": "FR", "history": [{"datetime": at(0), "carbonIntensity": None}]}, "no figure for FR"),
    (200, {"zone": "FR", "history": [{"datetime": at(hour), "carbonIntensity": 10} for hour in (-20, 0)]},
     "knows nothing after 2026-11-23T16:00Z"),
    (200, {"zone": "FR", "history": [{"datetime": at(-9), "carbonIntensity": 10}]}, "knows nothing after")])
def test_every_answer_that_is_none_is_told(server: Server, code: int, body: Any, said: str) -> None:
    maps(server)
    server.answers["/v4/carbon-intensity/history"] = lambda query, headers: (code, body)
    if isinstance(body, dict) and len(body.get("history", ())) == 1 and "noon" not in str(body):
        server.answers["/v4/carbon-intensity/latest"] = lambda query, headers: (
            200, {"zone": "FR", "datetime": at(0), "carbonIntensity": None if "None" in str(body) else 10})
    fails(server, said)
    assert all(path != "/elsewhere" for path, *_ in server.asked)


def test_watttime_says_when_login_region_or_units_are_others(server: Server, monkeypatch: Any) -> None:
    moer(server, region="PJM_DC")
    fails(server, 'asked for co2_moer of "CAISO_NORTH" in lbs_co2_per_mwh, answered with co2_moer of "PJM_DC"',
          "watttime", "CAISO_NORTH")
    moer(server, units="g_per_kwh")
    fails(server, 'of "CAISO_NORTH" in g_per_kwh; expected what was asked for', "watttime", "CAISO_NORTH")
    monkeypatch.setenv("WATTTIME_USER", "someone else")
    moer(server)
    wrong = fails(server, "refused (HTTP 401", "watttime", "CAISO_NORTH")
    assert "WATTTIME_USER and WATTTIME_PASSWORD" in wrong and "(hidden)" in wrong


def test_no_network_and_no_patience(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(web, "TIMEOUT_S", 0.05)
    stop = threading.Event()

    def slow(query: Any, headers: Any) -> tuple[int, Any]:
        stop.wait(2)
        return 200, {}

    server.answers["/v4/"] = slow
    fails(server, "cannot be reached (timed out); waited at most 0.05 s")
    stop.set()
    monkeypatch.setattr(electricity_maps, "BASE", "http://127.0.0.1:9")
    fails(server, "cannot be reached (")
    with pytest.raises(LlmopsError, match="cannot be reached"):
        get("X", "http://no.such.host.invalid/", {}, {})


def test_a_late_figure_is_bridged_for_an_hour_and_no_longer() -> None:
    def covered(newest: float, until: float) -> Any:
        return from_figures("P", "FR", {NOW - 2 * HOUR: 10.0, newest: 20.0}, HOUR, "average", NOW - 2 * HOUR, until)

    assert covered(NOW - HOUR, NOW + HOUR).mean("FR", NOW, NOW + HOUR) == 20
    with pytest.raises(LlmopsError, match="tells of"):
        covered(NOW - HOUR, NOW + HOUR + 1)
    assert covered(NOW, NOW).mean("FR", NOW - 2 * HOUR, NOW) == 10  # the figure between is missing
    with pytest.raises(LlmopsError, match="knows nothing after"):
        covered(NOW + 300, NOW + HOUR)
    ahead = from_figures("P", "FR", {NOW + 300: 10.0}, HOUR, "average", NOW, None)
    assert ahead.covers("FR") == (NOW, NOW + 300 + HOUR)  # nothing is bridged where nothing has been yet
    with pytest.raises(LlmopsError, match="expected figures from"):
        from_figures("P", "FR", {NOW + HOUR + 60: 10.0}, HOUR, "average", NOW, None)


# ------------------------------------------------------------------------------------------------------- recipe and run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("providers"))


def write(place: Path, name: str = "p", **measure: Any) -> list[str]:
    path = place / f"{name}.yaml"
    path.write_text(json.dumps(recipe(W8, measure={**SMALL, **measure}, name=name)))
    return ["tune", str(path), "--runs", str(place / f"runs-{name}")]


@pytest.mark.parametrize(("measure", "said"), [
    ({"provider": "electricity_maps"}, "without a zone; expected one as it names them, as zone: FR"),
    ({"provider": "watttime", "zone": "FR", "intensity": "grid.csv"}, "expected one of them"),
    ({"provider": "uk_carbon_intensity", "zone": "FRA"}, "Great Britain alone; expected GB"),
    ({"provider": "electricity_map", "zone": "FR"}, "electricity_maps")])
def test_a_recipe_that_cannot_be_meant_is_refused_before_anything(place: Path, measure: Any, said: str,
                                                                 capsys: Any) -> None:
    path = write(place, "bad", **measure)[1]
    assert main(["validate", path]) == 2
    assert said in capsys.readouterr().err


def test_a_run_whose_provider_does_not_answer_is_not_begun(place: Path, server: Server, monkeypatch: Any, capsys: Any,
                                                           ) -> None:
    maps(server, zone="DE")
    call = write(place, "none", provider="electricity_maps", zone="FR")
    assert main(call) == 2
    assert 'asked for zone "FR", answered for "DE"' in capsys.readouterr().err
    monkeypatch.delenv("ELECTRICITY_MAPS_TOKEN")
    assert main(call) == 2
    assert "ELECTRICITY_MAPS_TOKEN to be set" in capsys.readouterr().err
    store = place / "runs-none" / "store"
    assert not store.exists() or list(store.iterdir()) == []


def test_the_row_names_provider_zone_time_and_kind_and_no_file_holds_the_key(place: Path, server: Server, capsys: Any,
                                                                            ) -> None:
    moer(server)
    call = write(place, "marginal", provider="watttime", zone="CAISO_NORTH")
    assert main([*call, "--json"]) == 0
    told = capsys.readouterr()
    row = next(row for row in json.loads(told.out) if row["identity"]["variant"] == "w8")
    assert row["carbon"]["grid"] == {"source": "watttime", "zone": "CAISO_NORTH", "valid_from": "2026-11-24T12:20Z",
                                     "valid_to": "2026-11-24T12:20Z", "kind": "marginal"}
    assert row["carbon"]["intensity"]["value"] == pytest.approx(453.59237)
    assert row["carbon"]["per_1k_tokens_g"]["value"] is not None
    secrets = [each.encode() for each in (PASSWORD, "short-lived-token", b64encode(f"{USER}:{PASSWORD}".encode()
                                                                                   ).decode())]
    files = [path for path in (place / "runs-marginal").rglob("*") if path.is_file()]
    assert any(path.name == "ledger.db" for path in files)
    assert not [path for path in files for secret in secrets if secret in path.read_bytes()]
    assert PASSWORD not in told.err


def test_a_provider_that_falls_silent_later_is_labelled_unknown(place: Path, server: Server) -> None:
    from llmops.recipe import parse_recipe

    maps(server)
    parsed = parse_recipe(recipe(W8, measure={**SMALL, "provider": "electricity_maps", "zone": "FR"}), base_dir=place)
    answers(parsed)
    server.answers.clear()
    found, source = known_grid(parsed, NOW - HOUR)
    assert found.value is None and 'nothing for zone "FR"' in found.method
    assert source == {"source": "electricity_maps", "zone": "FR", "valid_from": "2026-11-24T11:20Z",
                      "valid_to": "2026-11-24T12:20Z", "kind": "average"}


def test_without_a_provider_nothing_is_asked_and_the_row_says_what_it_stands_on(place: Path, server: Server) -> None:
    from llmops.recipe import parse_recipe

    (place / "hours.csv").write_text("utc,zone,g_per_kwh\n2026-11-24T11:00Z,FRA,60\n2026-11-24T12:00Z,FRA,40\n")
    for measure, expected in (({"zone": "FRA"}, ("CodeCarbon's table", "FRA", "average")),
                              ({}, ("CodeCarbon's table", "world", "average")),
                              ({"intensity": "hours.csv"}, ("hours.csv", "FRA", "not told"))):
        found, source = known_grid(parse_recipe(recipe(W8, measure={**SMALL, **measure}), base_dir=place), NOW - 600)
        assert found.value is not None and (source["source"], source["zone"], source["kind"]) == expected
    assert server.asked == []


# --------------------------------------------------------------------------------------------------------- green start


def test_a_green_start_by_a_providers_forecast(place: Path, server: Server, monkeypatch: Any, capsys: Any) -> None:
    import llmops.green

    maps(server)
    monkeypatch.setattr(llmops.green, "wait", lambda start: None)
    call = [*write(place, "green"), "--green", "--deadline", "6h", "--lasts", "1h", "--forecast", "electricity_maps"]
    assert main(call) == 2
    assert "needs a zone as Electricity Maps names them" in capsys.readouterr().err
    assert main([*call, "--zone", "FR", "--json"]) == 0
    told = capsys.readouterr()
    assert "at 2026-11-24T15:00Z" in told.err
    assert "20 gCO2e/kWh in FR by Electricity Maps, forecast (average)" in told.err
    kept = json.loads((place / "runs-green" / "green" / "start.json").read_text())
    assert kept["kind"] == "average" and kept["zone"] == "FR" and kept["now_g_per_kwh"] == pytest.approx(
        (40 * 50 + 20 * 40) / 60)
    assert next(query for path, query, _ in server.asked if path.endswith("forecast"))["horizonHours"] == ["6"]
    row = json.loads(told.out)[0]
    assert row["carbon"]["grid"]["source"] == "CodeCarbon's table"  # the forecast chose when, not what the row counts
    assert TOKEN not in told.err + told.out
    assert main([*write(place, "green"), "--zone", "FR"]) == 2
    assert "without --green" in capsys.readouterr().err


def test_a_plan_without_forecasts_says_so(place: Path, server: Server, capsys: Any) -> None:
    maps(server)
    server.answers["/v4/carbon-intensity/forecast"] = lambda query, headers: (403, {"message": "not in your plan"})
    call = write(place, "plan", provider="electricity_maps", zone="FR")
    assert main([*call, "--green", "--deadline", "6h"]) == 2
    assert "refused (HTTP 403" in (said := capsys.readouterr().err) and "not in your plan" in said


def test_the_names_are_those_of_the_recipe() -> None:
    from typing import get_args

    from llmops.measure.options import MeasureOptions
    from llmops.recipe.budget_checks import PROVIDER_ZONES

    names = get_args(get_args(MeasureOptions.model_fields["provider"].annotation)[0])
    assert list(names) == list(PROVIDERS) == list(PROVIDER_ZONES)
    for name, provider in PROVIDERS.items():
        module = {"electricity_maps": electricity_maps, "watttime": watttime,
                  "uk_carbon_intensity": uk_carbon_intensity}[name]
        assert provider.title == module.TITLE and provider.variables == getattr(module, "VARIABLES", ())
