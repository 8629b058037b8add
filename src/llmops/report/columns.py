"""The columns that the table and the page share: what each one reads from a row, and how it is told.

A cell carries its text, a value to sort by, where the figure came from, and a tone. `keep` orders the columns by what
can be spared when the line is short: 0 is never dropped, the highest goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from llmops.quantity import Quantity
from llmops.report.figures import NONE, number, show, told
from llmops.report.reading import (
    Row,
    batch_of,
    figure,
    group,
    main_score,
    name_of,
    quantity,
    rising,
    saving,
    score,
    score_ids,
    versus,
)
from llmops.report.words import marked, what

__all__ = ["Cell", "Column", "Tone", "columns", "score_titles"]

Tone = Literal["", "good", "bad", "dim", "strong"]
SHORT = {"exact_match": "exact match", "perplexity": "ppl", "multiple_choice": "choices",
         "preference_accuracy": "preferences"}
ARROWS = {"saves": "↓", "costs more": "↑", "no saving shown": "=", "too few repeats": "=", "unmeasured": ""}


@dataclass(frozen=True)
class Cell:
    """text as shown; value to sort by (None sorts last); tip: where it came from."""

    text: str
    value: float | str | None = None
    tip: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Column:
    """`title` heads the table, `long` says it in full; `compact` and `wide`: which of the two tables it stands in."""

    id: str
    title: str
    long: str
    cell: Callable[[Row], Cell]
    keep: int = 5
    compact: bool = True
    wide: bool = True
    right: bool = True


def score_titles(ids: Sequence[str]) -> dict[str, str]:
    """Short headings: the metric alone where only one score has it, else the whole id."""
    metrics = [each.partition(":")[0] for each in ids]
    return {each: SHORT.get(metric, metric) if metrics.count(metric) == 1 else each
            for each, metric in zip(ids, metrics, strict=True)}


def columns(rows: Sequence[Row]) -> list[Column]:
    """All columns after the variant's name, in order; the caller takes the compact ones or the wide ones."""
    batch = batch_of(rows)
    return [_what(), *_scores(rows), *_sizes(), *_speed(batch), *_energy(batch), *_building()]


def _what() -> Column:
    def cell(row: Row) -> Cell:
        zeros = group(row, "transform").get("sparsity_saves")
        chain = group(row, "transform").get("chain") or []
        tip = " -> ".join(map(str, chain)) + (f"; zeros: {zeros}" if zeros else "")
        return Cell(marked(row), what(row), tip)

    return Column("what", "what", "the last step", cell, keep=1, right=False)


def _scores(rows: Sequence[Row]) -> list[Column]:
    ids, main, found = score_ids(rows), main_score(rows), list[Column]()
    for score_id, title in score_titles(ids).items():
        first, up = score_id == main, rising(rows, score_id)
        better = "" if up else " (less is better)"
        plain, whole = _figure(partial(_score, score_id)), _figure(partial(_score, score_id), with_interval=True)
        if not first:
            found.append(Column(score_id, title, f"{score_id}{better}", plain, keep=3, wide=False))
        found += [
            Column(f"{score_id} ci", title, f"{score_id} with its 95% interval{better}", whole, keep=0, compact=first),
            Column(f"{score_id} parent", "Δ parent", f"{score_id}: difference from the parent, paired, 95% interval",
                   _delta(score_id, "parent", up), keep=1, compact=first),
            Column(f"{score_id} base", "Δ base", f"{score_id}: difference from base, paired, 95% interval",
                   _delta(score_id, "base", up), compact=False)]
    return found


def _score(score_id: str, row: Row) -> Quantity:
    return score(row, score_id)


def _sizes() -> list[Column]:
    return [
        Column("bits", "bits", "bits per weight resident in memory, scales and embeddings included",
               _plain("size", "bits_per_weight", unit=False), keep=7),
        Column("disk", "disk", "bytes on disk", _plain("size", "disk_bytes"), keep=2),
        Column("weights", "weights", "bytes of the weights resident in memory", _plain("size", "weights_bytes"),
               keep=9),
        Column("kv", "kv/token", "bytes of keys and values that the cache holds for a token, over all layers",
               _plain("size", "kv_bytes_per_token"), compact=False),
        Column("memory", "peak mem", "peak memory while measuring", _plain("size", "peak_memory_bytes"),
               compact=False)]


def _speed(batch: str) -> list[Column]:
    return [
        Column("speed", "tok/s", f"tokens decoded a second, batch {batch}",
               _plain("latency", batch, "decode_tokens_per_s", unit=False), keep=3),
        Column("first", "ttft ms", f"median time to the first token in ms, batch {batch}",
               _plain("latency", batch, "first_token_ms_p50", unit=False), keep=8)]


def _energy(batch: str) -> list[Column]:
    def ratio(row: Row, *, wide: bool) -> Cell:
        found, verdict = figure(row, "energy", batch, "ratio_to_base"), saving(row, batch)
        text = show(found, with_interval=wide, unit=False)
        said = (verdict if wide else ARROWS[verdict]) if found.value is not None else ""
        tone: Tone = {"saves": "good", "costs more": "bad"}.get(verdict, "dim")  # type: ignore[assignment]
        return Cell(f"{text} {said}".strip(), found.value, f"{verdict}; {told(found)}", tone)

    long = f"energy per token divided by that of base, batch {batch}: "
    return [
        Column("energy", "J/token", f"energy per output token, batch {batch}", _joules(batch), keep=2),
        Column("ratio", "J/base", f"{long}↓ saves, ↑ costs more, = no saving shown", lambda row: ratio(row, wide=False),
               keep=2, wide=False),
        Column("ratio ci", "J/base", f"{long}with its 95% interval", lambda row: ratio(row, wide=True), compact=False)]


def _joules(batch: str) -> Callable[[Row], Cell]:
    plain = _plain("energy", batch, "joules_per_token")

    def cell(row: Row) -> Cell:
        found = plain(row)
        return Cell(found.text.removesuffix("/token"), found.value, found.tip, found.tone)

    return cell


def _building() -> list[Column]:
    return [
        Column("built", "build", "energy of building this variant, without its ancestors",
               _plain("building", "energy_j"), keep=4),
        Column("built s", "build time", "time of building this variant", _plain("building", "wall_s"), compact=False),
        Column("break even", "break-even", "output tokens after which the energy of building it and its ancestors is "
               "won back", _plain("building", "break_even_tokens"), compact=False)]


# --------------------------------------------------------------------------------------------------------------- cells


def _plain(*path: str, unit: bool = True) -> Callable[[Row], Cell]:
    return _figure(lambda row: figure(row, *path), unit=unit)


def _figure(read: Callable[[Row], Quantity], *, with_interval: bool = False,
            unit: bool = True) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        found = read(row)
        return Cell(show(found, with_interval=with_interval, unit=unit), found.value, told(found),
                    "dim" if found.value is None else "")

    return cell


def _delta(score_id: str, other: str, up: bool) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        body = versus(row, score_id, other)
        if not body:
            reason = ("there is none to compare with" if name_of(row) == "base"
                      else f"no comparison with {other} is in the row")
            return Cell(NONE, None, reason, "dim")
        found = quantity(body.get("delta"), "the comparison holds no difference")
        return Cell(show(found, with_interval=True, difference=True, unit=False), found.value, _flips(body, found),
                    _tone(found, body.get("p"), up))

    return cell


def _tone(delta: Quantity, p: Any, up: bool) -> Tone:
    """good or bad only where the interval leaves 0 out, and the test (exact for right and wrong) agrees."""
    agrees = not isinstance(p, int | float) or p <= 0.05
    if delta.value is None or delta.ci95 is None or delta.ci95[0] <= 0 <= delta.ci95[1] or not agrees:
        return "dim" if delta.value is None else ""
    return "good" if (delta.value > 0) == up else "bad"


def _flips(body: dict[str, Any], delta: Quantity) -> str:
    parts = [told(delta)]
    if body.get("variant"):
        parts.insert(0, f"against {body['variant']}")
    if body.get("gained") is not None and body.get("lost") is not None:
        parts.append(f"{body['gained']} items won, {body['lost']} lost")
    if body.get("changed_answers") is not None:
        parts.append(f"{body['changed_answers']} answers changed")
    if isinstance(body.get("mcnemar_p"), int | float):
        parts.append(f"McNemar p = {number(body['mcnemar_p'])}")
    return "; ".join(parts)
