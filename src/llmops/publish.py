"""What a run came to, and the pages and files that show it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmops.compare import labelled
from llmops.explain import explained
from llmops.export import exported
from llmops.ledger import Ledger
from llmops.report.verdict import judge
from llmops.store import Store, replace_file

__all__ = ["Result", "publish"]


@dataclass
class Result:
    """What a run came to. `rows`: one a variant, in the order of the plan, verdicts included."""

    name: str
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Variants that failed, were skipped, or are broken."""
        return [row["identity"]["variant"] for row in self.rows if row["status"]["state"] != "ok"]

    @property
    def winner(self) -> str | None:
        return next((row["identity"]["variant"] for row in self.rows if row["verdict"].get("winner")), None)

    @property
    def exit_code(self) -> int:
        """0 done, 1 no variant meets the goals, 3 a step failed."""
        if self.failed:
            return 3
        return 1 if any(row["goals"] for row in self.rows) and self.winner is None else 0


def publish(name: str, store: Store, ledger: Ledger, variants: Sequence[str] | None = None) -> Result:
    """Judge a run's rows and write its page, its `result.json`, and a card into every variant's folder."""
    from llmops.report import card, html

    rows = {row["identity"]["variant"]: row for row in ledger.rows(name)}
    ordered = labelled(judge([rows[variant] for variant in variants or rows if variant in rows]), ledger)
    folder = store.folder(name)
    html.write_html(ordered, folder / "report.html", title=name, explained=explained(folder),
                    exported=exported(folder))
    replace_file(folder / "result.json", json.dumps(ordered, indent=1, sort_keys=True, ensure_ascii=False))
    for row in ordered:
        build = store.build(row["identity"]["key"])
        if build.is_dir():
            store.link(name, row["identity"]["variant"], row["identity"]["key"])
            replace_file(build / "README.md", card.card(row, ordered))
        for entry in row["building"].get("shared") or []:
            if entry["what"].startswith("data "):
                store.link_written(name, entry["what"].removeprefix("data "), entry["key"])
    return Result(name, folder, ordered)
