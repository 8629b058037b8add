"""How long report.html of a run with many variants takes to open in Chromium, and how large it is.

    python benchmarks/bench_report.py [--variants 100] [--repeats 7] [--json FILE]

The rows are those of the tests: twelve kinds of variants and numbered copies with figures of their own, since a run of
a hundred real variants would measure the machine that made it, not the page. The page is opened from disk in a fresh
tab, the HTTP cache off. Two times are read from the browser itself: `load` (navigation to the end of the load event:
parsed, styled, the script run) and `painted` (to the end of the second animation frame after it, when layout and paint
of what is on the screen are done). Medians with all values beside them; a busy machine makes them longer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from _runner.machine import about, said
from _runner.results import Results, parser

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PAINTED = """
new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => {
  const [entry] = performance.getEntriesByType("navigation");
  done(JSON.stringify({load: entry.loadEventEnd, painted: performance.now()}));
})))
"""


def main() -> None:
    from tests.report.chromium import CHROMIUM, Browser
    from tests.report.rows import many

    from llmops.report.html import write_html

    options = parser(__doc__)
    options.add_argument("--variants", type=int, default=100)
    options.add_argument("--repeats", type=int, default=7)
    asked = options.parse_args()
    if CHROMIUM is None:
        sys.exit("no Chromium on this machine; expected `chromium` or `google-chrome` on the PATH")
    record = about(asked, ("plotly",))
    results = Results(asked.out, {**record, "variants": asked.variants})
    times: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = write_html(many(asked.variants), Path(folder) / "report.html", title="many")
        browser = Browser(str(Path(folder) / "profile"))
        try:
            browser.call("Network.setCacheDisabled", cacheDisabled=True)
            for _ in range(asked.repeats):
                times.append(opened(browser, place))
                results.keep(**{f"{name}_ms": [round(each[name], 1) for each in times] for name in times[0]})
            found = {"browser": browser.call("Browser.getVersion")["product"], "bytes": place.stat().st_size,
                     "elements": browser.run("document.querySelectorAll('*').length"),
                     **{f"{name}_ms_median": round(median(each[name] for each in times), 1) for name in times[0]}}
        finally:
            browser.close()
    print(said(record), json.dumps(found, indent=1), sep="\n")
    results.end(**found)


def opened(browser: Any, place: Path) -> dict[str, float]:
    """Times in ms of one navigation, from a blank page."""
    browser.call("Page.navigate", url="about:blank")
    browser.open(place)
    return dict(json.loads(browser.run(PAINTED)))


if __name__ == "__main__":
    main()
