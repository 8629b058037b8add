"""report.html and the pages of `llmops ui` in a headless Chromium; skipped where there is none.

axe-core runs where
LLMOPS_AXE names its axe.min.js (an npm package), in a world of its own: the page's policy stays in force.
"""

import copy
import json
import os
import threading

import pytest
from tests.report.chromium import CHROMIUM, Browser
from tests.report.rows import make_rows, many
from tests.report.test_margins import EXPLAINED
from tests.report.test_trainings import trained

from llmops.ledger import Ledger
from llmops.report.html import write_html
from llmops.ui.server import server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
SHOWS = {"report": "charts", "explained": "why", "list": "rows", "comparison": "side"}
SCRIPT = """
JSON.stringify({wide: document.documentElement.scrollWidth, sections: document.querySelectorAll("main section").length})
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_html(make_rows(), tmp_path_factory.mktemp("page") / "report.html", title="demo", log=["a line"])


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_it_opens_without_a_word_and_nothing_is_wider_than_the_screen(browser, place, width, dark):
    del browser.said[:]
    browser.open(place, width, dark)
    found = json.loads(browser.run(SCRIPT))
    assert found["wide"] <= width and found["sections"] >= 10 and browser.said == []


CUT = """
JSON.stringify([...document.querySelectorAll("svg text")].filter(each => {
  const text = each.getBoundingClientRect(), picture = each.ownerSVGElement.getBoundingClientRect();
  return text.left < picture.left - 1 || text.right > picture.right + 1 || text.top < picture.top - 1
    || text.bottom > picture.bottom + 1;
}).map(each => each.textContent))
"""


def test_no_word_leaves_its_picture(browser, pages, tmp_path):
    rows, row = trained()
    row["building"]["trace"]["learning_rate"] = [[step, 1e-3 * step / 121] for step in range(1, 122)]
    row["energy"]["8"]["joules_per_token"]["ci95"] = [1e-3, 10.0]  # a bar to the edge, and its name beyond it
    for place in (write_html(rows, tmp_path / "trained.html", title="t"), pages["explained"]):
        browser.open(place)
        browser.run("document.querySelectorAll('.chart').forEach(e => e.classList.add('on')); "
                    "document.querySelectorAll('details').forEach(e => { e.open = true; })")
        assert json.loads(browser.run(CUT)) == []


def test_charts_switch_tables_sort_and_filter(browser, place):
    browser.open(place)
    shown = "[...document.querySelectorAll('.chart')].filter(e => e.offsetParent).map(e => e.dataset.cost).join()"
    assert browser.run(shown) == "joules_per_token"
    browser.run("document.querySelector('input[value=disk_bytes]').click()")
    assert browser.run(shown) == "disk_bytes"
    sizes = "[...document.querySelectorAll('.chart')].filter(e => e.offsetParent).map(e => e.dataset.batch).join()"
    fold = "document.querySelector('input[name=batch]').closest('fieldset').disabled"
    assert browser.run(fold)  # bytes are the same at every batch size
    browser.run("document.querySelector('input[value=joules_per_token]').click()")
    assert browser.run(sizes) == "1" and not browser.run(fold)
    browser.run("document.querySelector('input[name=batch]:checked').focus()")
    browser.keys("ArrowRight")
    assert browser.run(shown) == "joules_per_token" and browser.run(sizes) == "8"
    assert "batch 8" in browser.run("document.querySelector('.chart.on .title').textContent")
    browser.run("document.querySelector('input[value=inter_token_ms]').click()")
    assert browser.run(sizes) == "8"  # the size stays when the cost changes
    first = "document.querySelector('#rows tbody tr:not([hidden]) .name').dataset.v"
    assert browser.run(first) == "base"
    browser.run("[...document.querySelectorAll('#rows thead button')].find(e => e.textContent == 'variant').click()")
    assert browser.run(first) == "wanda"
    browser.run("(() => { const e = document.getElementById('filter'); e.value = 'tuned-w'; "
                "e.dispatchEvent(new Event('input')); })()")
    assert browser.run("document.getElementById('count').textContent") == "4 of 12"


def test_provenance_is_told_to_who_has_no_mouse(browser, place):
    browser.open(place)
    browser.run("document.querySelector('#rows tbody .name a').focus()")
    browser.keys("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight")
    assert browser.run("document.activeElement.tagName") == "TD"
    told = browser.run("document.getElementById('bubble').hidden ? '' : document.getElementById('bubble').textContent")
    assert "95% interval" in told or "measured" in told
    browser.keys("Escape")
    assert browser.run("document.getElementById('bubble').hidden")
    browser.run("document.querySelector('#spending').closest('section').querySelector('tbody td[title]').click()")
    assert "CodeCarbon model" in browser.run("document.getElementById('bubble').textContent")


def test_it_prints_with_its_folds_open(browser, place):
    browser.open(place)
    opened = "document.querySelectorAll('details[open]').length"
    browser.run("window.seen = -1; addEventListener('beforeprint', () => setTimeout(() => {}, 0)); "
                f"addEventListener('beforeprint', () => {{ window.seen = {opened}; }})")
    browser.call("Emulation.setDeviceMetricsOverride", width=1032, height=800, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert json.loads(browser.run(SCRIPT))["wide"] <= 1032  # A4 across, less its margins
    browser.call("Emulation.setEmulatedMedia", media="")
    assert len(browser.call("Page.printToPDF", preferCSSPageSize=True)["data"]) > 50_000
    assert browser.run("window.seen") >= 12 and browser.run(opened) == 0


def test_paper_gets_no_book(browser, tmp_path):
    """Folds of ten thousand figures stay closed; those that come first, and are short, are opened."""
    rows = make_rows()
    for row in rows:
        row["quality"] = {f"{score}{place}": body for place in range(12)
                          for score, body in (row.get("quality") or {}).items()}
    browser.open(write_html(rows, tmp_path / "book.html", title="book"))
    browser.run("window.seen = []; addEventListener('beforeprint', () => { window.seen = "
                "[...document.querySelectorAll('details[open] tr')].length; })")
    browser.call("Page.printToPDF", preferCSSPageSize=True)
    assert 100 < browser.run("window.seen") <= 600


def test_a_hundred_variants_open(browser, tmp_path):
    del browser.said[:]
    browser.open(write_html(many(100), tmp_path / "many.html", title="many"))
    assert browser.run("document.querySelectorAll('#rows tbody tr').length") == 100 and browser.said == []


@pytest.fixture(scope="module")
def pages(place, tmp_path_factory):
    """The kinds of pages: a report, one that was explained, and the list and comparison that `llmops ui` serves."""
    folder = tmp_path_factory.mktemp("pages")
    explained = copy.deepcopy(EXPLAINED)
    rows = make_rows()
    explained |= {"variant": "tuned-w4", "against": "tuned", "keys": [
        next(row["identity"]["key"] for row in rows if row["identity"]["variant"] == name)
        for name in ("tuned-w4", "tuned")]}
    token = {"token": "lake", "kl": 0.3, "p": 0.9, "q": 0.1, "delta_logp": -2.2, "says": "lake", "says_variant": "town"}
    for body in explained["scores"].values():
        body["items"][0]["choices"] = [{"choice": "lake", "delta_logp": -2.2, "tokens": [token]},
                                       {"choice": "town", "delta_logp": 0.7, "tokens": [token]}]
    ledger = Ledger(folder / "ledger.db")
    for run in ("demo", "other"):
        for row in make_rows():
            ledger.append({**row, "identity": {**row["identity"], "run": run}})
    with server(str(folder), "127.0.0.1", 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        at = f"http://127.0.0.1:{serving.server_address[1]}"
        yield {"report": place, "list": f"{at}/", "comparison": f"{at}/compare?v=demo/tuned&v=other/tuned-w4",
               "explained": write_html(rows, folder / "explained.html", title="demo", explained=[explained])}
        serving.shutdown()
        thread.join()


@pytest.mark.skipif("LLMOPS_AXE" not in os.environ, reason="LLMOPS_AXE does not name axe.min.js")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["report", "explained", "list", "comparison"])
def test_axe_finds_nothing(browser, pages, name, dark, width):
    del browser.said[:]
    browser.open(pages[name], width, dark)
    assert browser.run(f"document.getElementById('{SHOWS[name]}') !== null")  # the page that was meant, not an error's
    assert json.loads(browser.run(SCRIPT))["wide"] <= width and browser.said == []
    browser.run("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    frame = browser.call("Page.getFrameTree")["frameTree"]["frame"]["id"]
    world = browser.call("Page.createIsolatedWorld", frameId=frame)["executionContextId"]
    with open(os.environ["LLMOPS_AXE"], encoding="utf-8") as file:
        browser.run(file.read(), contextId=world)
    found = browser.run("axe.run().then(found => JSON.stringify(found.violations.map(each => [each.id, "
                        "each.nodes.slice(0, 3).map(node => node.html)])))", contextId=world)
    assert json.loads(found) == []
