"""Every page of `llmops ui` over a ledger of two runs, asked as a browser asks."""

import copy
import http.client
import threading
import urllib.parse

import pytest
from tests.report.rows import EVIL, make_rows
from tests.report.test_html import Reader

from llmops.cli import main
from llmops.errors import LlmopsError
from llmops.ledger import Ledger
from llmops.store import Store
from llmops.ui.pages import comparison, listing, run_page
from llmops.ui.server import answer, server


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    ledger = Ledger(folder / "ledger.db")
    demo = ("base", "tuned", "tuned-w4", "tuned-w2", "healed-w4", "wanda")
    for run, names in (("demo", demo), ("other", ("base", "tuned"))):
        for row in make_rows():
            if row["identity"]["variant"] in names:
                row = copy.deepcopy(row)
                row["identity"]["run"] = run
                if run == "other" and "quality" in row:
                    row["quality"]["perplexity:heldout"]["protocol"]["stride"] = 7
                ledger.append(row)
    return Store(folder)


@pytest.fixture(scope="module")
def port(store):
    with server(str(store.runs), "127.0.0.1", 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield serving.server_address[1]
        serving.shutdown()
        thread.join()


def ask(port, path, method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={"Host": host} if host else {})
        found = connection.getresponse()
        return found.status, found.read().decode(), found.headers
    finally:
        connection.close()


def test_the_list_has_every_variant_of_every_run_and_its_filters(store):
    reader = Reader(listing(store))
    lines = [each for each in reader.all("tr") if "data-run" in each]
    assert len(lines) == 8 and {each["data-run"] for each in lines} == {"demo", "other"}
    assert {each["data-state"] for each in lines} == {"ok", "broken", "failed"}
    boxes = [each["value"] for each in reader.all("input") if each.get("name") == "v"]
    assert "demo/tuned-w4" in boxes and "other/base" in boxes
    assert {"by-run", "by-state", "won", "filter"} <= {each["id"] for _, each in reader.elements if "id" in each}
    assert sum(each["data-won"] == "1" for each in lines) >= 1
    assert "wanda 50% †" in listing(store) and "no time saved" in listing(store)


def test_a_run_is_its_report_and_names_the_way_back(store):
    text = run_page(store, "demo")
    assert "wins by the recipe" in text and 'href="/"' in text and "form-action &#x27;self&#x27;" in text
    with pytest.raises(LlmopsError, match='unknown run "demmo".*demo'):
        run_page(store, "demmo")


def test_two_runs_stand_side_by_side_with_what_cannot_be_compared(store):
    reader = Reader(comparison(store, ["demo/tuned", "demo/tuned-w4", "other/tuned"]))
    words = reader.words
    assert "Side by side" in words and "other/tuned" in words
    assert "not comparable: different protocol: stride" in words
    assert "-2.7 pp [-4.7, -0.7]" in words  # the stored paired difference, under the new names
    ids = [each["id"] for _, each in reader.elements if "id" in each]
    assert len(ids) == len(set(ids))
    assert "wins by" not in words  # nobody wins among rows of two runs
    assert "3 variants of 2 runs" in words
    whole = Reader(comparison(store, ["other"])).words
    assert "other/base" in whole


@pytest.mark.parametrize(("wanted", "said"), [([], "0 rows"), (["demo/tuned"], "1 rows"), (["demo/tunde"], "tuned"),
                                              (["nope/x"], 'unknown run "nope"')])
def test_what_cannot_be_compared_is_said(store, wanted, said):
    with pytest.raises(LlmopsError, match=said):
        comparison(store, wanted)


def test_pages_over_http(store, port):
    before = {path.name: path.stat().st_size for path in store.runs.rglob("*") if path.suffix == ".db"}
    status, text, headers = ask(port, "/")
    assert status == 200 and "demo" in text and headers["X-Content-Type-Options"] == "nosniff"
    status, text, _ = ask(port, "/run/demo")
    assert status == 200 and text.startswith("<!DOCTYPE html>")
    assert ask(port, "/compare?v=demo%2Ftuned&v=other%2Ftuned")[0] == 200
    assert ask(port, "/run/demo", "HEAD")[:2] == (200, "")
    assert {path.name: path.stat().st_size for path in store.runs.rglob("*") if path.suffix == ".db"} == before


@pytest.mark.parametrize(("path", "method", "host", "status"), [
    ("/run/demmo", "GET", None, 404), ("/../ledger.db", "GET", None, 404), ("/run/..%2Fledger.db", "GET", None, 404),
    ("/compare?v=demo/tuned", "GET", None, 404), ("/", "POST", None, 501), ("/", "DELETE", None, 501),
    ("/", "GET", "evil.example", 403), ("/", "GET", "localhost", 200),
    (f"/run/{urllib.parse.quote(EVIL)}", "GET", None, 404)])
def test_what_is_refused(port, path, method, host, status):
    found, text, _ = ask(port, path, method, host)
    assert found == status and EVIL not in text


def test_a_store_without_a_run_says_so(tmp_path):
    status, text = answer(Store(tmp_path), "/")
    assert status == 200 and "holds no run yet" in text
    assert list(tmp_path.iterdir()) == []  # looking writes nothing


def test_a_place_to_listen_that_cannot_be(port, capsys):
    assert main(["ui", "--port", str(port)]) == 2
    assert "cannot be listened on" in capsys.readouterr().err
    assert main(["ui", "--host", "0.0.0.0"]) == 2
    assert "could then read every run" in capsys.readouterr().err
    assert main(["ui", "--port", "99999"]) == 2
