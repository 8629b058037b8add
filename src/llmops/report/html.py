"""report.html: one file that needs no network, no server and no script to be read.

Style and script are files of this package, put into the page whole; a content security policy allows those two by
their hash and nothing else, so even a name that slipped through the escaping could load or run nothing. The script
only adds comfort: switching charts, sorting, filtering, arrow keys in the table. Charts are hand-made SVG (see
`charts`): a plotting library would make the page 4.5 MB.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import uuid
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from llmops.errors import StoreError
from llmops.report import (
    bits,
    breakeven,
    building,
    details,
    exports,
    fronts,
    sections,
    slices,
    spending,
    stated,
    teaching,
    why,
)
from llmops.report.markup import Markup, raw, tag
from llmops.report.reading import Row, group, state_of
from llmops.report.sections import Page

__all__ = ["page", "shell", "write_html"]

CONTENTS = {
    "side": "Side by side",
    "outcome": "Outcome",
    "tree": "Variants",
    "charts": "Worth and cost",
    "table": "Table",
    "slices": "Groups",
    "why": "Changed answers",
    "breakeven": "Break-even",
    "spending": "Energy",
    "building": "Building",
    "teaching": "Teachers",
    "loss": "Loss",
    "bits": "Bits by layer",
    "exports": "Exports",
    "use": "Intended use",
    "method": "Method",
    "environment": "Environment",
    "details": "Every figure",
    "log": "Log"}


def write_html(rows: Sequence[Row], path: str | Path, *, title: str, log: Sequence[str] | None = None,
               explained: Sequence[Mapping[str, Any]] = (), exported: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write the page of `rows` to `path`, whole or not at all; returns the path.

    title: of the page, usually the run's name. log: lines to show at its end. explained: what `llmops explain` found;
    exported: the records of `llmops export`. Raises StoreError when the file cannot be written.
    """
    place = Path(path)
    scratch = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(page(rows, title=title, log=log, explained=explained, exported=exported), encoding="utf-8")
        scratch.replace(place)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise StoreError(f"{place}: the report cannot be written ({error}); expected a folder that can be written to, "
                         "with room left; name another place with --runs") from error
    return place


def page(rows: Sequence[Row], *, title: str, log: Sequence[str] | None = None,
         explained: Sequence[Mapping[str, Any]] = (), exported: Sequence[Mapping[str, Any]] = (),
         before: Markup = sections.NOTHING, home: str | None = None) -> str:
    """The page as text. before: a section ahead of all others; home: where a server has its list of runs."""
    seen = Page(rows)
    body = [sections.outcome(seen), sections.family(seen), fronts.charted(seen), sections.tabled(seen),
            slices.section(seen), why.section(seen, explained), breakeven.section(seen), spending.section(seen),
            building.building(seen), teaching.teaching(seen), building.curves(seen), bits.bits(seen),
            exports.section(seen, exported), stated.section(seen), details.method(seen), details.environment(seen),
            details.every_figure(seen), details.logged(log or [])] if rows else [
        tag("section", tag("h2", "Outcome", id="outcome"), tag("p", "The ledger holds no row of this run yet."))]
    return shell(title, _subtitle(rows), [before, *body], footer=_footer(rows), home=home)


def shell(title: str, subtitle: str, body: Sequence[Markup], *, footer: str = "llmops", home: str | None = None) -> str:
    """A whole page around its sections: head, contents, style and script. home: a link ahead of the contents, and forms
    may then be sent to where the page came from."""
    found = [anchor for anchor in CONTENTS if any(f'id="{anchor}"' in part for part in body)]
    links = [tag("a", "All runs", href=home)] if home else []
    links += [tag("a", CONTENTS[anchor], href=f"#{anchor}") for anchor in found]
    contents = tag("nav", links, aria_label="Contents") if links else sections.NOTHING
    skip = found[0] if found else "main"
    whole = tag("html", _head(title, served=home is not None), tag(
        "body", tag("a", "Skip to the content", href=f"#{skip}", class_="skip"),
        tag("header", tag("h1", title), tag("p", subtitle), contents), tag("main", body, id="main"),
        tag("footer", tag("p", footer)), tag("div", id="bubble", role="tooltip", hidden=True),
        tag("script", raw(_asset("report.js")))), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def _head(title: str, *, served: bool = False) -> Markup:
    style, script = _asset("report.css"), _asset("report.js")
    policy = (f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
              f"form-action '{'self' if served else 'none'}'")
    return tag("head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=policy),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("meta", name="color-scheme", content="light dark"), tag("title", f"{title} · llmops"),
               tag("style", raw(style)))


def _asset(name: str) -> str:
    return resources.files("llmops.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _subtitle(rows: Sequence[Row]) -> str:
    identity = next((found for row in rows if (found := group(row, "identity"))), {})
    states = [state_of(row) for row in rows]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    model = str(identity.get("base_model") or "unknown model")
    revision = f" @ {identity['revision']}" if identity.get("revision") else ""
    return f"{model}{revision}; {len(rows)} variants ({counted or 'none'}); seed {identity.get('seed', 'unknown')}"


def _footer(rows: Sequence[Row]) -> str:
    identity = next((found for row in reversed(rows) if (found := group(row, "identity"))), {})
    parts = [f"llmops {identity.get('llmops', '')}".strip(), f"recipe {str(identity.get('recipe_sha256') or '')[:12]}",
             f"run {identity.get('run_id', '')}", f"last row {identity.get('utc', '')}"]
    return " · ".join(part for part in parts if not part.endswith(" "))
