"""What teachers did for their students: who paid what, and what several of them share."""

from __future__ import annotations

from typing import Any

from llmops.report.figures import show, told
from llmops.report.markup import Markup, tag
from llmops.report.reading import Row, figure, group, name_of, quantity
from llmops.report.sections import NOTHING, Page, scrolled

__all__ = ["shared_words", "teaching"]

_HOW = {"live": "beside the student", "offline": "from signals on disk", "on_policy": "on the student's own answers"}


def teaching(page: Page) -> Markup:
    """A line a student, and below it each folder that students share, once."""
    rows = [row for row in page.rows if group(row, "building", "teaching") or group(row, "building").get("shared")]
    if not rows:
        return NOTHING
    titles = ("student", "teacher", "taught", "the teacher's energy", "own energy, the teacher's part included",
              "has paid for itself after")
    head = tag("tr", [tag("th", title, scope="col") for title in titles])
    body = [tag("tr", tag("th", page.link(row), scope="row"), tag("td", _teacher(row)), tag("td", _how(row)),
                [tag("td", show(found), class_="num", title=told(found)) for found in
                 (figure(row, "building", name) for name in ("teacher_energy_j", "energy_j",
                                                             "break_even_to_teacher_tokens"))])
            for row in rows]
    note = ("A teacher beside its student is charged by its share of the time; what it left on disk is split equally "
            "among the builds that read it. Paid for itself: output tokens after which a student has saved, against "
            "its teacher, what it took to make it out of it.")
    return tag("section", tag("h2", "Teachers and students", id="teaching"),
               scrolled("Teachers and students", tag("table", tag("thead", head), tag("tbody", body), class_="plain")),
               tag("ul", [tag("li", line) for line in _folders(rows)]), tag("p", note, class_="dim"),
               aria_labelledby="teaching")


def _teacher(row: Row) -> str:
    wrote = next((entry["teacher"] for entry in group(row, "building").get("shared") or [] if "teacher" in entry),
                 "(wrote its data)")
    return str(group(row, "building", "teaching").get("variant") or wrote)


def _how(row: Row) -> str:
    how = group(row, "building", "teaching").get("how")
    return _HOW.get(str(how), "by what it wrote")


def _folders(rows: list[Row]) -> list[str]:
    """Each shared folder with its size, its cost and who of the page used it."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for row in rows:
        for entry in group(row, "building").get("shared") or []:
            found.setdefault(str(entry["key"]), (entry, []))[1].append(name_of(row))
    return [f"{shared_words(entry)}; {show(quantity(entry['energy_j'], 'J'))} in all; used by {', '.join(who)}"
            for entry, who in found.values()]


def shared_words(entry: dict[str, Any]) -> str:
    """What a shared folder holds: "signals 3085c528885d: 12,000 tokens, top 32 and the rest, 110 bytes a token"."""
    words = [f"{entry['what']} {str(entry['key'])[:12]}: "]
    if "k" in entry:
        words.append(f"{entry['tokens']:,} trained tokens, top {entry['k']} and the rest as {entry['dtype']}, "
                     f"{entry['bytes_per_token']} bytes a token, ")
    if "counts" in entry:
        counts = entry["counts"]
        words.append(f"{counts['kept']:,} rows kept of {counts['written']:,} answers to {counts['prompts']:,} "
                     "prompts, ")
    if "answers" in entry:
        words.append(f"{entry['answers']:,} answers, ")
    return "".join([*words, f"{entry['bytes']:,} bytes"])
