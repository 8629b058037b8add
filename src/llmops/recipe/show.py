"""A plan for people: the tree of variants, what is done, and what the rest will take."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmops.quantity import Quantity
from llmops.recipe.plan import Plan, Stage

__all__ = ["bytes_in_words", "count_in_words", "render"]

_STYLES = {"done": "green", "to score": "yellow", "to build": "bold"}


def render(plan: Plan) -> RenderableType:
    """A table whose first column is the tree, a summary, and the reasons for what is not known."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("variant", "step", "state"):
        table.add_column(name, no_wrap=name != "step", overflow="fold")
    for name in ("parameters", "disk", "memory", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage, branch in _tree(plan):
        figures = stage.estimate
        table.add_row(Text(branch + stage.variant), Text(_step(stage)), Text(_state(stage), style=_STYLES[stage.state]),
                      count_in_words(figures.parameters), bytes_in_words(figures.disk_bytes),
                      bytes_in_words(figures.peak_memory_bytes), count_in_words(figures.tokens))
    build = sum(not stage.built for stage in plan.stages)
    score = sum(stage.scored_here and not stage.scored for stage in plan.stages)
    head = Text(f"{plan.recipe.name}: {len(plan.stages)} variants, {build} to build, {score} to score")
    foot = Text("Estimates from config.json and the recipe. Peak memory of a step and its tokens are upper bounds: training in "
                "32 bit, every row as long as max_length.", style="dim")
    unknown = dict.fromkeys(quantity.method for stage in plan.stages
                            for quantity in (stage.estimate.parameters,) if quantity.value is None)
    return Group(head, Text(""), table, Text(""), foot, *(Text(f"- not known: {why}", style="dim") for why in unknown))


def bytes_in_words(quantity: Quantity) -> str:
    """4337672 -> "4.3 MB"; "-" for what is not known."""
    if quantity.value is None:
        return "-"
    value = quantity.value
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def count_in_words(quantity: Quantity) -> str:
    """2170000 -> "2.17 M"; "-" for what is not known."""
    if quantity.value is None:
        return "-"
    value = quantity.value
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} G"


def _state(stage: Stage) -> str:
    return stage.state if stage.scored_here or stage.kind is None else f"{stage.state} (not scored)"


def _step(stage: Stage) -> str:
    return stage.describe().rsplit(" from ", 1)[0] if stage.kind and len(stage.parents) == 1 else (
        stage.describe().replace(f" from {stage.parents[0]}", "") if stage.parents else stage.describe())


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
