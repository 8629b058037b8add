"""What a ledger row holds, read so that nothing has to be there.

Every group of a row may be missing or null. `figure` walks into it and always returns a Quantity; where nothing is
found it is null, and says whether the variant failed, was not scored, or was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmops.measure.intervals import LEAST_PAIRS
from llmops.quantity import PROVENANCES, Quantity

__all__ = [
    "COSTS",
    "Cost",
    "Row",
    "attempts",
    "batch_of",
    "batches",
    "comparable",
    "cost",
    "different_protocol",
    "different_sensor",
    "different_workload",
    "events",
    "figure",
    "goals_of",
    "group",
    "kind_of",
    "joules_per_trained_token",
    "looks",
    "loss_curve",
    "main_score",
    "merges",
    "metric",
    "name_of",
    "parent_of",
    "quantity",
    "rising",
    "saving",
    "score",
    "score_ids",
    "state_of",
    "status_text",
    "told_of_training",
    "trace",
    "training_marks",
    "tree",
    "versus"]

Row = Mapping[str, Any]
WORKLOAD = ("prompts_sha256", "prompt_tokens", "new_tokens")
MACHINE = ("device", "cpu", "gpu", "threads")


@dataclass(frozen=True)
class Cost:
    """A cost that variants are compared by. `path` leads to its Quantity; `*` in it stands for the batch size."""

    title: str
    path: tuple[str, ...]
    less_is_better: bool = True


COSTS: dict[str, Cost] = {
    "joules_per_token": Cost("energy per token", ("energy", "*", "joules_per_token")),
    "inter_token_ms": Cost("time per token", ("latency", "*", "inter_token_ms_p50")),
    "first_token_ms": Cost("time to first token", ("latency", "*", "first_token_ms_p50")),
    "disk_bytes": Cost("size on disk", ("size", "disk_bytes")),
    "weights_bytes": Cost("weights in memory", ("size", "weights_bytes")),
    "peak_memory_bytes": Cost("peak memory", ("size", "peak_memory_bytes")),
    "decode_tokens_per_s": Cost("decoding speed", ("latency", "*", "decode_tokens_per_s"), less_is_better=False),
}


# ------------------------------------------------------------------------------------------------------- plain fields


def group(row: Row, *path: str) -> dict[str, Any]:
    """The mapping at `path`, not to be changed; empty where there is none."""
    found: Any = dict(row)
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def name_of(row: Row) -> str:
    return str(group(row, "identity").get("variant") or "?")


def parent_of(row: Row) -> str | None:
    found = group(row, "identity").get("parent")
    return None if found is None else str(found)


def kind_of(row: Row) -> str:
    """finetune, prune, quantize, distill, or "base" for the model itself."""
    return str(group(row, "transform").get("kind") or "base")


def state_of(row: Row) -> str:
    """ok, broken, failed or skipped; "unknown" for a row without a status."""
    return str(group(row, "status").get("state") or "unknown")


def status_text(row: Row) -> str:
    """`failed: why`, or plain `ok`."""
    reason = group(row, "status").get("reason")
    return f"{state_of(row)}: {reason}" if reason else state_of(row)


def events(row: Row) -> list[str]:
    found = group(row, "log").get("events")
    return [str(event) for event in found] if isinstance(found, Sequence) and not isinstance(found, str) else []


def loss_curve(row: Row) -> list[tuple[float, float]]:
    """(step, loss) pairs of the training that made the variant; empty when nothing was trained."""
    return _pairs(group(row, "building").get("loss"))


def looks(row: Row) -> list[tuple[float, float]]:
    """(step, held-out loss) pairs; empty where nothing was held out."""
    return _pairs(group(row, "building").get("looks"))


def trace(row: Row, name: str) -> list[tuple[float, float]]:
    """(step, value) pairs of learning_rate, tokens or energy_j along the training."""
    return _pairs(group(row, "building", "trace").get(name))


def _pairs(found: Any) -> list[tuple[float, float]]:
    pairs = (pair for pair in found if isinstance(pair, list | tuple) and len(pair) == 2) \
        if isinstance(found, list | tuple) else ()
    return [(float(x), float(y)) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]


#: letter on the chart -> the event of the loop that is meant; the group is the step, or several
MARKED = {"R": re.compile(r"went on from the checkpoint of step (\d+(?:, then \d+)*)"),
          "M": re.compile(r"memory ran out at (?:the look after )?step (\d+)"),
          "S": re.compile(r"stopped early at step (\d+)"), "B": re.compile(r"kept the weights of step (\d+)")}
FOUND_RATE = "from a range test"


def training_marks(row: Row) -> list[tuple[float, str, str]]:
    """(step, letter, event) of what happened on the way: Resumed, out of Memory, Stopped, Best weights kept."""
    found = [(float(step), letter, event) for event in events(row) for letter, pattern in MARKED.items()
             if (match := pattern.match(event)) for step in re.findall(r"\d+", match[1])]
    return sorted(found)


def told_of_training(row: Row) -> list[str]:
    """The events that say how a training went: the learning rate found, resumed, out of memory, stopped and why."""
    return [event for event in events(row) if FOUND_RATE in event or any(p.match(event) for p in MARKED.values())]


def attempts(row: Row) -> int | None:
    """How many times the build was begun; None where the row does not say."""
    found = group(row, "building").get("attempts")
    return len(found) if isinstance(found, list) and found else None


def merges(row: Row) -> list[dict[str, Any]]:
    """The ways in which an adapter could be merged, each measured: target, kl_mean, kl_max, chosen."""
    found = group(row, "building").get("merge")
    return [dict(each) for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def joules_per_trained_token(row: Row) -> Quantity:
    """Energy of the build for every token that ran through the model in training."""
    energy, tokens = figure(row, "building", "energy_j"), figure(row, "building", "tokens")
    if not loss_curve(row):
        return Quantity.null("J/token", "nothing was trained")
    if energy.value is None or not tokens.value:
        return Quantity.null("J/token", energy.method if energy.value is None else "no token was counted")
    return Quantity(energy.value / tokens.value, "J/token", energy.provenance,
                    f"energy of the build / tokens run through the model; {energy.method}")


def goals_of(row: Row) -> list[dict[str, Any]]:
    """The judged goals of `verdict`."""
    return [dict(goal) for goal in group(row, "verdict").get("goals") or [] if isinstance(goal, Mapping)]


# --------------------------------------------------------------------------------------------------------- quantities


def quantity(body: Any, missing: str) -> Quantity:
    """The Quantity in `body`, or a null whose reason is `missing`. A damaged one is null too, and says so."""
    if not isinstance(body, Mapping):
        return Quantity.null("", missing)
    value, unit, method = body.get("value"), str(body.get("unit") or ""), str(body.get("method") or "")
    if value is None:
        return Quantity.null(unit, method or missing)
    if isinstance(value, bool) or not isinstance(value, int | float) or body.get("provenance") not in PROVENANCES[:3]:
        given = f"{value!r} with provenance {body.get('provenance')!r}"
        return Quantity.null(unit, f"the row holds {given}, which is no figure")
    ends, n = body.get("ci95"), body.get("n")
    pair = [float(end) for end in ends if isinstance(end, int | float)] if isinstance(ends, list | tuple) else []
    return Quantity(value, unit, body["provenance"], method, (pair[0], pair[1]) if len(pair) == 2 else None,
                    n if isinstance(n, int) else None)


def figure(row: Row, *path: str) -> Quantity:
    """The Quantity at `path`, as figure(row, "size", "disk_bytes"); null with a reason where there is none."""
    missing = "not measured in this run" if state_of(row) == "ok" else f"the variant is {status_text(row)}"
    return quantity(group(row, *path[:-1]).get(path[-1]), missing)


def batches(rows: Iterable[Row]) -> list[str]:
    """The batch sizes that were measured, smallest first."""
    found = {batch for row in rows for part in ("energy", "latency") for batch in group(row, part) if batch.isdigit()}
    return sorted(found, key=int)


def batch_of(rows: Iterable[Row]) -> str:
    """The smallest batch size that was measured, "1" when none was."""
    return next(iter(batches(rows)), "1")


def cost(row: Row, name: str, batch: str) -> Quantity:
    """One of COSTS."""
    return figure(row, *(batch if key == "*" else key for key in COSTS[name].path))


def saving(row: Row, batch: str) -> str:
    """What the energy ratio to base shows: "saves", "costs more", "no saving shown", "too few repeats" or
    "unmeasured"."""
    ratio = figure(row, "energy", batch, "ratio_to_base")
    if ratio.value is None:
        return "unmeasured"
    if ratio.n is not None and ratio.n < LEAST_PAIRS:
        return "too few repeats"
    if ratio.ci95 is not None and ratio.ci95[0] > 1:
        return "costs more"
    stated = group(row, "energy", batch).get("saving")
    if stated == "shown" and ratio.value < 1 and (ratio.ci95 is None or ratio.ci95[1] < 1):
        return "saves"
    return "unmeasured" if stated == "unmeasured" else "no saving shown"


# -------------------------------------------------------------------------------------------------------------- scores


def score_ids(rows: Iterable[Row]) -> list[str]:
    """Every score any row has, in the order of their first appearance."""
    return list(dict.fromkeys(str(each) for row in rows for each in group(row, "quality")))


def main_score(rows: Sequence[Row]) -> str | None:
    """The score that the goals name first; without goals the first one."""
    known = score_ids(rows)
    for row in rows:
        for wanted in group(row, "goals", "quality"):
            found = next((each for each in known if each == wanted or each.partition(":")[0] == wanted), None)
            if found:
                return found
    return known[0] if known else None


def score(row: Row, score_id: str) -> Quantity:
    return figure(row, "quality", score_id, "value")


def metric(row: Row, score_id: str) -> str:
    return str(group(row, "quality", score_id).get("metric") or score_id.partition(":")[0])


def rising(rows: Iterable[Row], score_id: str) -> bool:
    """Whether more is better."""
    return all(group(row, "quality", score_id).get("higher_is_better", True) is not False for row in rows)


def versus(row: Row, score_id: str, other: str) -> dict[str, Any]:
    """The stored paired comparison with "parent", "base", or a variant by its name; empty when there is none."""
    found = group(row, "quality", score_id, "versus")
    if isinstance(found.get(other), Mapping):
        return dict(found[other])
    for label, body in found.items():
        named = body.get("variant") if isinstance(body, Mapping) else None
        if other in (named, label.removeprefix("variant ")) or (label == "parent" and named is None
                                                                 and other == parent_of(row)):
            return dict(body) if isinstance(body, Mapping) else {}
    return {}


def different_protocol(row: Row, other: Row, score_id: str) -> str | None:
    """Why two rows' scores cannot be compared, or None. Items themselves are compared when they are paired."""
    from llmops.evaluate.statistics import INCIDENTAL  # numpy stands behind it

    a, b = group(row, "quality", score_id), group(other, "quality", score_id)
    if not a or not b:
        return f"{score_id} is not scored in {name_of(other if a else row)}"
    one, two = group(a, "protocol"), group(b, "protocol")
    differing = sorted(key for key in {*one, *two} - INCIDENTAL if one.get(key) != two.get(key))
    if differing:
        key = differing[0]
        return f"different protocol: {key} is {one.get(key)!r} here and {two.get(key)!r} there"
    if a.get("n") != b.get("n"):
        return f"different items: {a.get('n')} here and {b.get('n')} there"
    if (asked := a.get("items_sha256")) and (theirs := b.get("items_sha256")) and asked != theirs:
        return "different items: other questions, or asked in other words"
    return None


def different_workload(row: Row, other: Row) -> str | None:
    """Why two rows' speed and energy cannot be compared (other prompts, another machine), or None."""
    for part, keys in (("workload", WORKLOAD), ("environment", MACHINE)):
        one, two = group(row, part), group(other, part)
        key = next((key for key in keys if key in one and key in two and one[key] != two[key]), None)
        if key is not None:
            return f"different {part}: {key} is {one[key]!r} here and {two[key]!r} there"
    return None


def different_sensor(row: Row, other: Row) -> str | None:
    """Why two rows' energy cannot be compared though the work was the same (another sensor, hence other parts of the
    machine seen, or another power limit), or None."""
    for key in ("sensor", "sensor_provenance"):
        one, two = (group(each, "environment").get(key) for each in (row, other))
        if one is not None and two is not None and one != two:
            return f"different {key.replace('_', ' ')}: {one!r} here and {two!r} there"
    limits = [[device.get("power_limit_w") for device in group(each, "environment").get("gpus") or []]
              for each in (row, other)]
    if all(limits) and limits[0] != limits[1]:
        return f"different power limit: {limits[0]} W here and {limits[1]} W there"
    return None


def comparable(rows: Sequence[Row], score_id: str) -> list[Row]:
    """The rows scored by the same protocol on as many items as the first that has the score."""
    first = next((row for row in rows if group(row, "quality", score_id)), None)
    return [] if first is None else [row for row in rows if different_protocol(row, first, score_id) is None]


# ---------------------------------------------------------------------------------------------------------------- tree


def tree(rows: Iterable[Row]) -> list[tuple[int, Row]]:
    """(depth, row), children after their parent, siblings in the order given. A lost parent makes a row a root."""
    ordered = list(rows)
    known = {name_of(row) for row in ordered}
    children: dict[str | None, list[Row]] = {}
    for row in ordered:
        parent = parent_of(row)
        children.setdefault(parent if parent in known and parent != name_of(row) else None, []).append(row)
    found: list[tuple[int, Row]] = []
    seen: set[int] = set()
    open_rows = [(0, row) for row in reversed(children.get(None, []))]
    while open_rows:
        depth, row = open_rows.pop()
        if id(row) not in seen:
            seen.add(id(row))
            found.append((depth, row))
            open_rows += [(depth + 1, child) for child in reversed(children.get(name_of(row), []))]
    return found + [(0, row) for row in ordered if id(row) not in seen]  # a cycle cannot hide a row
