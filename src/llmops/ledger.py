"""The ledger: append-only rows in SQLite, one for every scored variant, and the items behind every score.

A row is one JSON document (the groups are in docs/ledger.md); SQLite gives it atomic appends, concurrent readers (WAL)
and a place for the per-item results, which paired statistics need and a table of means throws away. Nothing is ever
updated or deleted: a variant that was scored twice has two rows, and `rows()` gives the newest. The schema changes
only by numbered migrations, applied inside one transaction by whoever opens the file first.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from llmops.errors import StoreError

__all__ = ["SCHEMA", "Ledger"]

SCHEMA = 1  # of the row document
Migration = Callable[[sqlite3.Connection], None]
MIGRATIONS: list[Migration] = []


def migration(apply: Migration) -> Migration:
    """Append a migration; its number is its place in the list, and never changes."""
    MIGRATIONS.append(apply)
    return apply


@migration
def _rows(db: sqlite3.Connection) -> None:
    db.execute("""CREATE TABLE rows (id INTEGER PRIMARY KEY, run TEXT NOT NULL, variant TEXT NOT NULL,
                  key TEXT NOT NULL, score_key TEXT, state TEXT NOT NULL, utc TEXT NOT NULL, body TEXT NOT NULL)""")
    db.execute("CREATE INDEX rows_by_variant ON rows (run, variant, id)")
    db.execute("CREATE INDEX rows_by_score ON rows (score_key)")


@migration
def _items(db: sqlite3.Connection) -> None:
    db.execute("""CREATE TABLE items (row_id INTEGER NOT NULL REFERENCES rows (id), score TEXT NOT NULL,
                  body TEXT NOT NULL, PRIMARY KEY (row_id, score))""")


class Ledger:
    """`Ledger("runs/ledger.db")` opens the file, creating and migrating it as needed.

    Raises StoreError when the file cannot be opened, is not a ledger, or was written by a newer version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._connect() as db:
                _migrate(db, self.path)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path}: the ledger cannot be opened ({error}); expected a SQLite file written by "
                             "llmops in a folder that can be written to; name another place with --runs") from error

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            yield db

    def append(self, row: Mapping[str, Any], items: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> int:
        """Write one row, and the items of its scores ({score id: [item, ...]}), in one transaction. Returns its id."""
        identity = row["identity"]
        values = (identity["run"], identity["variant"], identity["key"], identity.get("score_key"),
                  row["status"]["state"], identity["utc"], _dump(row))
        try:
            with self._connect() as db:
                db.execute("BEGIN IMMEDIATE")
                cursor = db.execute("INSERT INTO rows (run, variant, key, score_key, state, utc, body) "
                                    "VALUES (?, ?, ?, ?, ?, ?, ?)", values)
                row_id = int(cursor.lastrowid or 0)
                db.executemany("INSERT INTO items (row_id, score, body) VALUES (?, ?, ?)",
                               [(row_id, score, _dump(list(each))) for score, each in (items or {}).items()])
                db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path}: a row could not be written ({error}); free some disk, or name another "
                             "place with --runs; everything built so far is kept") from error
        return row_id

    def rows(self, run: str | None = None) -> list[dict[str, Any]]:
        """The newest row of every (run, variant), oldest first; each carries its `row_id`."""
        newest = "SELECT MAX(id) FROM rows GROUP BY run, variant"
        return self._select(f"SELECT id, body FROM rows WHERE id IN ({newest}) AND (? IS NULL OR run = ?) ORDER BY id",
                            (run, run))

    def history(self, run: str | None = None, variant: str | None = None) -> list[dict[str, Any]]:
        """Every row ever written, oldest first."""
        return self._select("SELECT id, body FROM rows WHERE (? IS NULL OR run = ?) AND (? IS NULL OR variant = ?) "
                            "ORDER BY id", (run, run, variant, variant))

    def find(self, score_key: str) -> dict[str, Any] | None:
        """The newest row that holds exactly these scores of exactly this build, from whatever run."""
        found = self._select("SELECT id, body FROM rows WHERE score_key = ? AND state IN ('ok', 'broken') "
                             "ORDER BY id DESC LIMIT 1", (score_key,))
        return found[0] if found else None

    def items(self, row_id: int, score: str) -> list[dict[str, Any]]:
        """The per-item results behind one score of one row."""
        with self._connect() as db:
            found = db.execute("SELECT body FROM items WHERE row_id = ? AND score = ?", (row_id, score)).fetchone()
        return list(json.loads(found["body"])) if found else []

    def runs(self) -> list[str]:
        """Names of the runs, most recently written last."""
        with self._connect() as db:
            found = db.execute("SELECT run, MAX(id) AS last FROM rows GROUP BY run ORDER BY last")
            return [row["run"] for row in found]

    def export(self, path: str | Path, run: str | None = None) -> int:
        """Write the newest rows as JSON lines; returns how many."""
        rows = self.rows(run)
        Path(path).write_text("".join(_dump(row) + "\n" for row in rows), encoding="utf-8")
        return len(rows)

    def _select(self, query: str, values: Iterable[Any]) -> list[dict[str, Any]]:
        with self._connect() as db:
            found = db.execute(query, tuple(values)).fetchall()
        return [{**json.loads(row["body"]), "row_id": row["id"]} for row in found]


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    if _version(db) < len(MIGRATIONS):
        db.execute("BEGIN IMMEDIATE")  # two first uses at once: the second finds the work done
        for number in range(_version(db), len(MIGRATIONS)):
            MIGRATIONS[number](db)
            db.execute(f"PRAGMA user_version = {number + 1}")
        db.execute("COMMIT")
    if _version(db) > len(MIGRATIONS):
        raise StoreError(f"{path}: the ledger has version {_version(db)}, this llmops knows {len(MIGRATIONS)}; "
                         "install the newer llmops, or name another place with --runs")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _dump(body: Any) -> str:
    return json.dumps(body, ensure_ascii=False, sort_keys=True, allow_nan=False)
