"""How much of a page was measured: counts of figures by where they came from, and what no run of llmops measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmops.quantity import PROVENANCES, Quantity
from llmops.report.markup import Markup, tag
from llmops.report.reading import Row, figure, group, name_of
from llmops.report.sections import NOTHING, scrolled

__all__ = ["counted", "counts", "never", "protocol"]

Walk = Callable[[Row], Iterator[tuple[str, str, Quantity]]]
GIVEN = {"measured": "measured", "estimated": "estimated (~)", "constant": "taken as given", "null": "not known"}


def counts(rows: Iterable[Row], walk: Walk) -> dict[str, Counter[str]]:
    """{group of the row: how many of its figures are measured, estimated, constant, null}. walk: every figure of a row.
    """
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for name, _, quantity in walk(row):
            found.setdefault(name, Counter())[quantity.provenance if quantity.value is not None else "null"] += 1
    return found


def counted(rows: Sequence[Row], walk: Walk) -> Markup:
    """The counts as a table."""
    found = counts(rows, walk)
    head = tag("tr", tag("th", "figures of", scope="col"),
               [tag("th", GIVEN.get(each, each), scope="col", class_="num") for each in PROVENANCES])
    body = [tag("tr", tag("th", name, scope="row"), [tag("td", f"{many[each]:,}" if many[each] else "", class_="num")
                                                     for each in PROVENANCES]) for name, many in found.items()]
    if not body:
        return NOTHING
    table = tag("table", tag("caption", "How figures came about", class_="unseen"), tag("thead", head),
                tag("tbody", body), class_="plain")
    return tag("div", tag("h3", "How figures came about"), scrolled("How figures came about", table))


def protocol(rows: Sequence[Row]) -> list[str]:
    """How speed and energy were taken, from what the rows say of it."""
    workload: Mapping[str, Any] = next((group(row, "workload") for row in rows if group(row, "workload")), {})
    if not workload:
        return []
    lines = [f"Base and variant took turns: {workload.get('repeats', 'several')} pairs of blocks, in each pair in "
             f"random order (seed {workload.get('order_seed', 'unknown')}), after a warm-up. A ratio is the mean of "
             "the logarithms within pairs with its t interval; it is never the quotient of two averages.",
             f"Every request: {workload.get('prompt_tokens')} prompt tokens of fixed random ids, exactly "
             f"{workload.get('new_tokens')} new tokens, greedy, so that energy per token compares cost and not how "
             "much a model talks. Prefill and decoding were metered apart."]
    sensors = sorted({str(found) for row in rows if (found := group(row, "environment").get("sensor"))})
    if sensors:
        lines.append(f"Energy by {', '.join(sensors)}.")
    floors = [(name_of(row), batch, ratio) for row in rows for batch in group(row, "energy") if batch.isdigit()
              and (ratio := figure(row, "energy", batch, "aa_ratio")).ci95 is not None]
    lines += [f"Noise floor: {name} against itself at batch {batch} gave {ratio.value:.3f} "
              f"[{ratio.ci95[0]:.3f}, {ratio.ci95[1]:.3f}]; a smaller difference cannot be seen here."
              for name, batch, ratio in floors if ratio.ci95]
    return lines


def never(rows: Sequence[Row]) -> list[str]:
    """What this page cannot tell, whatever the run did."""
    lines = ["Energy of anything but the parts that the sensor sees: network, storage, cooling and the building (PUE) "
             "are in no figure.",
             "Serving as a server does it: batches that change over time, queues, prompts of natural length, sampling.",
             "Anything that no score above asks for: safety, bias, other languages, long contexts. A score holds for "
             "its data."]
    if not any(figure(row, "carbon", "embodied_g").value is not None for row in rows):
        lines.append("Carbon of making the hardware (embodied).")
    if not any(group(row, "quality", score, "slices") for row in rows for score in group(row, "quality")):
        lines.append("Whether one group of items lost more than others: no score was sliced (`slices:` of an "
                     "evaluation).")
    if all(figure(row, "energy", batch, "ratio_to_base").provenance != "measured"
           for row in rows for batch in group(row, "energy") if batch.isdigit()):
        lines.append("A saving of energy by a meter: no ratio of this run comes from one.")
    return lines
