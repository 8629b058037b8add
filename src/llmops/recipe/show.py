"""A plan for people: the tree of variants, what is done, and what the rest will take.

Plain text, aligned by hand: `llmops plan` has to answer at once, and the import of a table library would take as long
as the plan itself.
"""

from __future__ import annotations

from llmops.quantity import Quantity
from llmops.recipe.plan import Plan, Stage

__all__ = ["bytes_in_words", "count_in_words", "render"]

_HEAD = ("variant", "step", "state", "parameters", "disk", "memory", "tokens")
_NUMBERS = 4  # the last columns, set to the right
_COLOURS = {"done": "32", "to score": "33", "to build": "1"}


def render(plan: Plan, *, colour: bool = False) -> str:
    """The plan as a table whose first column is the tree, with a summary and the reasons for what is not known.

    colour: with the escape codes of a terminal.
    """
    rows = [(stage, _cells(stage, branch)) for stage, branch in _tree(plan)]
    widths = [max(len(cells[column]) for cells in (_HEAD, *(cells for _, cells in rows)))
              for column in range(len(_HEAD))]
    build = sum(not stage.built for stage in plan.stages)
    score = sum(stage.scored_here and not stage.scored for stage in plan.stages)
    lines = [f"{plan.recipe.name}: {len(plan.stages)} variants, {build} to build, {score} to score", "",
             _tint(_line(_HEAD, widths), "2", colour)]
    for stage, cells in rows:
        lines.append(_line(cells, widths, _COLOURS[stage.state] if colour else None))
    notes = ["Estimates from config.json and the recipe. Memory (the peak of the step) and tokens are upper bounds:",
             "training in 32 bit, every row as long as max_length."]
    notes += [f"Not known: {why}" for why in dict.fromkeys(
        stage.estimate.parameters.method for stage in plan.stages if stage.estimate.parameters.value is None)]
    said = [_tint(line, "33" if line.startswith("WARNING") else "2", colour) for line in plan.advice]
    return "\n".join([*lines, "", *said, *(_tint(note, "2", colour) for note in notes)])


def bytes_in_words(quantity: Quantity) -> str:
    """4337672 -> "4.34 MB"; "-" for what is not known."""
    return _scaled(quantity, (" B", " kB", " MB", " GB", " TB"))


def count_in_words(quantity: Quantity) -> str:
    """2170000 -> "2.17 M"; "-" for what is not known."""
    return _scaled(quantity, ("", " k", " M", " G", " T"))


def _scaled(quantity: Quantity, units: tuple[str, ...]) -> str:
    if quantity.value is None:
        return "-"
    value, unit = quantity.value, 0
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g}{units[unit]}"


def _cells(stage: Stage, branch: str) -> tuple[str, ...]:
    figures = stage.estimate
    state = stage.state if stage.scored_here else f"{stage.state} (not scored)"
    step = stage.describe().replace(f" from {stage.parents[0]}", "", 1) if stage.parents else stage.describe()
    return (branch + stage.variant, step, state, count_in_words(figures.parameters), bytes_in_words(figures.disk_bytes),
            bytes_in_words(figures.peak_memory_bytes), count_in_words(figures.tokens))


def _line(cells: tuple[str, ...], widths: list[int], tint: str | None = None) -> str:
    left = len(cells) - _NUMBERS
    padded = [cell.ljust(width) if column < left else cell.rjust(width)
              for column, (cell, width) in enumerate(zip(cells, widths, strict=True))]
    if tint is not None:
        padded[left - 1] = _tint(padded[left - 1], tint, True)
    return "  ".join(padded).rstrip()


def _tint(text: str, code: str, wanted: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if wanted else text


def _tree(plan: Plan) -> list[tuple[Stage, str]]:
    """Stages depth first, each with the lines drawn before its name."""
    children: dict[str, list[Stage]] = {stage.variant: [] for stage in plan.stages}
    for stage in plan.stages:
        if stage.parents:
            children[stage.parents[0]].append(stage)
    drawn: list[tuple[Stage, str]] = []

    def draw(stage: Stage, lead: str, branch: str) -> None:
        drawn.append((stage, lead + branch))
        inner = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        below = children[stage.variant]
        for position, child in enumerate(below):
            draw(child, inner, "└─ " if position == len(below) - 1 else "├─ ")

    draw(plan.stages[0], "", "")
    return drawn
