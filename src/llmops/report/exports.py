"""What variants became in other formats: who read each export back, and how far its logits were from the variant's.

What is shown was found by `llmops export` and lies beside the run (`exports.json`); the newest of a variant and format,
as long as its build is still the one that was exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmops.report.figures import number
from llmops.report.markup import Markup, tag
from llmops.report.reading import group, name_of
from llmops.report.sections import NOTHING, Page, scrolled

__all__ = ["section"]

_HEAD = ("Variant", "Format", "Read back by", "Largest logit difference", "Mean KL, nats", "MB", "Notes")


def section(page: Page, exported: Sequence[Mapping[str, Any]]) -> Markup:
    """A line for each variant and format."""
    keys = {name_of(row): (row, group(row, "identity").get("key")) for row in page.rows}
    newest = {(record["variant"], record["format"]): record for record in exported
              if record.get("variant") in keys and keys[record["variant"]][1] == record.get("key")}
    if not newest:
        return NOTHING
    lines = [tag("tr", tag("td", page.link(keys[name][0])), tag("td", to), tag("td", str(record["reader"])),
                 *(tag("td", number(record[figure]["value"])) for figure in ("max_logit_difference", "kl_mean")),
                 tag("td", number(record["bytes"]["value"] / 1e6)), tag("td", "; ".join(record["notes"])))
             for (name, to), record in sorted(newest.items())]
    note = "Each was read back from its files by another program, and its logits held against the variant's."
    table = tag("table", tag("thead", tag("tr", [tag("th", each, scope="col") for each in _HEAD])), tag("tbody", lines),
                class_="plain")
    return tag("section", tag("h2", "Exports", id="exports"), tag("p", note, class_="dim"), scrolled("Exports", table),
               aria_labelledby="exports")
