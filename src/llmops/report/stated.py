"""What only people can say of a run's models: what they are for, what not, known limits, the licence. As the recipe's
`card` states it; what it leaves out is said to be stated by nobody, since no figure can stand in for it."""

from __future__ import annotations

from llmops.report.markup import Markup, tag
from llmops.report.reading import group
from llmops.report.sections import NOTHING, Page

__all__ = ["section"]

STATED = {"intended_use": "What the models are for", "out_of_scope": "What they are not for",
          "limitations": "Known limits", "license": "Licence"}


def section(page: Page) -> Markup:
    """Four facts, or that they were not stated."""
    said = next((found for row in reversed(page.rows) if (found := group(row, "card"))), {})
    facts = []
    for key, title in STATED.items():
        value = said.get(key)
        told = tag("ul", [tag("li", str(each)) for each in value]) if isinstance(value, list) and value else \
            str(value) if value else tag("span", f"stated by nobody (card.{key} in the recipe)", class_="dim")
        facts.append(tag("div", tag("dt", title), tag("dd", told)))
    return tag("section", tag("h2", "Intended use", id="use"), tag("dl", facts, class_="facts"),
               aria_labelledby="use") if page.rows else NOTHING
