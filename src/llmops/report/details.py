"""The lower half of the page: every figure of every variant with its provenance, how it was measured, what was not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmops.quantity import Quantity
from llmops.report import provenance
from llmops.report.figures import interval, number, show
from llmops.report.markdown import pairs
from llmops.report.markup import Markup, tag
from llmops.report.reading import (
    Row,
    attempts,
    batch_of,
    events,
    figure,
    group,
    joules_per_trained_token,
    name_of,
    quantity,
    state_of,
    status_text,
)
from llmops.report.sections import NOTHING, Page
from llmops.report.words import what

__all__ = ["environment", "every_figure", "logged", "method", "nulls", "quantities"]

GROUPS = ("quality", "tokens", "size", "latency", "energy", "building", "carbon", "parity")
ESTIMATE = ("Energy marked ~ is estimated, not measured. Where the method names a model of the machine's power or "
            "declared watts, it follows time and load: such an estimate cannot show a saving that is not a saving of "
            "time.")


def quantities(row: Row) -> Iterator[tuple[str, str, Quantity]]:
    """(group, path within it, figure) of every Quantity of a row, however deep it lies."""
    for name in GROUPS:
        yield from ((name, path, found) for path, found in _walk(group(row, name), ()))


def _walk(body: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Quantity]]:
    for key, value in body.items():
        if isinstance(value, Mapping) and "provenance" in value and "unit" in value:
            yield " · ".join([*path, str(key)]), quantity(value, "no reason is given")
        elif isinstance(value, Mapping) and key not in ("protocol", "data", "data_sha256"):
            yield from _walk(value, (*path, str(key)))


def every_figure(page: Page) -> Markup:
    """One fold a variant: what it is, how it was made, and all its figures."""
    return tag("section", tag("h2", "Every figure and where it came from", id="details"),
               [_variant(page, row) for row in page.rows], aria_labelledby="details")


def _variant(page: Page, row: Row) -> Markup:
    transform, identity = group(row, "transform"), group(row, "identity")
    built, spent = group(row, "building"), joules_per_trained_token(row)
    facts = {"state": status_text(row), "made by": " → ".join(map(str, transform.get("chain") or [])) or "as it came",
             "options": _json(transform.get("options")), "stored as": transform.get("storage_dtype"),
             "computes in": transform.get("compute_dtype"), "kernel": transform.get("kernel"),
             "keys and values": transform.get("kv_cache"),
             "zeros": transform.get("sparsity_saves"), "teacher": identity.get("teacher"), "key": identity.get("key"),
             "data": _json(built.get("data_sha256")), "rows": _json(built.get("data")), "attempts": attempts(row),
             "training": show(spent) + " for each token" if spent.value is not None else None,
             "reloaded": _parity(row),
             "notes": "; ".join(events(row))}
    listed = [tag("div", tag("dt", key), tag("dd", str(value))) for key, value in facts.items() if value]
    head = tag("tr", [tag("th", each, scope="col")
                      for each in ("group", "figure", "value", "95% interval", "n", "provenance")])
    body = [tag("tr", tag("td", name, class_="dim"), tag("th", path, scope="row"), _values(found))
            for name, path, found in quantities(row)]
    table = tag("div", tag("table", tag("thead", head), tag("tbody", body), class_="plain figures"), class_="scroll",
                role="region", aria_label=f"Figures of {name_of(row)}", tabindex=0) if body else NOTHING
    return tag("details", tag("summary", tag("b", name_of(row)), " ", tag("span", what(row), class_="dim"), " ",
                              page.badge(row)), tag("dl", listed, class_="facts"), table, id=page.id(row))


def _values(found: Quantity) -> list[Markup]:
    ends = found.ci95
    return [tag("td", show(found), class_="num"),
            tag("td", interval(*ends, decimals=_fine(ends)) if ends else "", class_="num"),
            tag("td", "" if found.n is None else f"{found.n:,}", class_="num"),
            tag("td", tag("span", found.provenance, class_=f"badge {found.provenance}"), " ", found.method)]


def _fine(ends: tuple[float, float]) -> int:
    """Decimals that tell the two ends apart, in the figure's own unit."""
    return next((places for places in range(7) if abs(ends[1] - ends[0]) >= 30 * 10.0 ** -places), 7)


def _parity(row: Row) -> str:
    checks = [each for each in group(row, "parity").get("checks") or [] if isinstance(each, Mapping)]
    return "; ".join(f"{'✓' if each.get('ok') else '✗'} {each.get('name')}: {each.get('detail')}" for each in checks)


def _json(body: Any) -> str:
    return json.dumps(body, ensure_ascii=False, default=str) if body else ""


# -------------------------------------------------------------------------------------------------------------- method


def method(page: Page) -> Markup:
    """How scores and costs were taken, and the nulls with their reasons."""
    protocols = {score_id: body.get("protocol") for row in page.rows for score_id, body in group(row, "quality").items()
                 if isinstance(body, Mapping)}
    parts = [tag("p", "Every variant was saved, reloaded from disk, checked against what was in memory, and scored as "
                      "reloaded. Differences are paired: the same items, answered by both. Intervals are 95% "
                      "intervals.")]
    if protocols:
        parts.append(_listed("Scores", {key: _plain(value) for key, value in protocols.items()}))
    workload = next((found for row in page.rows if (found := group(row, "workload"))), {})
    if workload:
        parts.append(_listed("Speed, memory and energy", {"workload": _plain(workload)}))
        parts.append(tag("ul", [tag("li", line) for line in provenance.protocol(page.rows)]))
    guessed = (found.provenance == "estimated" for row in page.rows for name, _, found in quantities(row)
               if name == "energy")
    if any(guessed):
        parts.append(tag("p", ESTIMATE))
    if any(group(row, "transform").get("sparsity_saves") for row in page.rows):
        parts.append(tag("p", "Zeros in dense tensors save no time and no memory; on disk they save bytes only when "
                              "the file is compressed."))
    parts.append(provenance.counted(page.rows, quantities))
    missing = nulls(page.rows)
    parts.append(tag("h3", "What was not measured, and why"))
    parts.append(tag("ul", [tag("li", tag("b", name), f": {reason} ({_who(who, page.rows)})") for (name, reason), who
                            in missing.items()]) if missing else tag("p", "Every figure of every variant is there."))
    parts.append(tag("h3", "What no figure here tells"))
    parts.append(tag("ul", [tag("li", line) for line in provenance.never(page.rows)]))
    return tag("section", tag("h2", "Method", id="method"), parts, aria_labelledby="method")


def nulls(rows: Sequence[Row]) -> dict[tuple[str, str], list[str]]:
    """(figure, reason) -> the variants that lack it; those that were not scored, or not built, are there too."""
    found: dict[tuple[str, str], list[str]] = {}
    batch = batch_of(rows)
    for row in rows:
        if state_of(row) not in ("ok", "broken"):
            found.setdefault(("everything", status_text(row)), []).append(name_of(row))
            continue
        root = not group(row, "transform").get("kind")  # the model as it came is not built, nor compared with itself
        lacking = [(path, each.method) for name, path, each in quantities(row)
                   if each.value is None and not (root and (name == "building" or path.endswith("_to_base")))]
        why = "the recipe has no `measure:`" if group(row, "quality") else "the variant was not scored"
        lacking += [(f"all of {name}", why if name != "quality" else "the variant was not scored")
                    for name in ("quality", "latency", "energy") if not group(row, name)]
        if group(row, "energy") and not group(row, "energy", batch):
            lacking.append(("energy", figure(row, "energy", batch, "joules_per_token").method))
        for name, reason in lacking:
            label = name.split(" · ")[-1].replace("_", " ")
            who = found.setdefault((label, reason or "no reason is given"), [])
            if name_of(row) not in who:
                who.append(name_of(row))
    return found


def _who(who: Sequence[str], rows: Sequence[Row]) -> str:
    scored = {name_of(row) for row in rows if group(row, "quality")}
    if len(who) > 2 and set(who) >= scored:
        return "all variants" if len(who) == len(rows) else "every variant that was scored"
    return ", ".join(who) if len(who) <= 8 else f"{', '.join(who[:8])} and {len(who) - 8} more"


def _listed(title: str, entries: Mapping[str, str]) -> Markup:
    return Markup(tag("h3", title) + tag("dl", [tag("div", tag("dt", key), tag("dd", value)) for key, value
                                                in entries.items()], class_="facts"))


def _plain(body: Any) -> str:
    """A flat mapping as `key value, key value`."""
    if not isinstance(body, Mapping):
        return str(body)
    return ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in body.items()
                     if value is not None and key not in TOLD_ELSEWHERE)


TOLD_ELSEWHERE = ("beside", "conditions")  # of a workload: warnings of each row; what drifted, in the ledger


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(_short, value))
    if isinstance(value, float):
        return number(value)
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


# --------------------------------------------------------------------------------------------------------- environment


def environment(page: Page) -> Markup:
    """The machine, once for every set of variants that saw the same one."""
    seen: list[tuple[dict[str, Any], list[str]]] = []
    for row in page.rows:
        facts = {key: value for key, value in group(row, "environment").items() if key not in VOLATILE}
        if not facts:
            continue
        same = next((who for known, who in seen if known == facts), None)
        if same is not None:
            same.append(name_of(row))
        else:
            seen.append((facts, [name_of(row)]))
    if not seen:
        return NOTHING
    parts = [_listed("All variants" if len(seen) == 1 else ", ".join(who),
                     {key: _value(value) for key, value in facts.items() if value not in (None, [], {}, "")})
             for facts, who in seen]
    warning = tag("p", "The variants were measured in different environments: speed and energy are compared only "
                       "within one.", class_="verdict bad") if len(seen) > 1 else NOTHING
    return tag("section", tag("h2", "Environment", id="environment"), warning, parts, aria_labelledby="environment")


VOLATILE = {"load_average_1m", "gpus"}  # differ from one variant to the next on the same machine


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return pairs(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def logged(lines: Sequence[str]) -> Markup:
    """The run's log, folded."""
    if not lines:
        return NOTHING
    folded = tag("details", tag("summary", f"{len(lines):,} lines"), tag("pre", "\n".join(lines), tabindex=0))
    return tag("section", tag("h2", "Log", id="log"), folded, aria_labelledby="log")
