"""The ledger: append-only rows in SQLite, one for every scored variant, and the items behind every score.

A row is one JSON document (the groups are in docs/ledger.md); SQLite gives it atomic appends, concurrent readers (WAL)
and a place for the per-item results, which paired statistics need and a table of means throws away. Nothing is ever
updated or deleted: a variant that was scored twice has two rows, and `rows()` gives the newest. The schema changes
only by numbered migrations, applied inside one transaction by whoever opens the file first.

Rows with their items, and promotions (which variant was made champion, by whom and why), are links of one chain of
hashes, written in the same transaction (`chain.py`); `audit` finds what was changed, removed or put in past it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmops.chain import Link, broken, digest, link_of
from llmops.errors import StoreError

__all__ = ["SCHEMA", "Ledger", "whoami"]

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


@migration
def _chain(db: sqlite3.Connection) -> None:
    """Rows that are there already are taken in as they stand: what was done to them before, nobody can tell."""
    db.execute("""CREATE TABLE promotions (id INTEGER PRIMARY KEY, name TEXT NOT NULL, row_id INTEGER NOT NULL
                  REFERENCES rows (id), body TEXT NOT NULL)""")
    db.execute("""CREATE TABLE chain (number INTEGER PRIMARY KEY, utc TEXT NOT NULL, who TEXT NOT NULL,
                  kind TEXT NOT NULL, subject INTEGER NOT NULL, digest TEXT NOT NULL, previous TEXT NOT NULL,
                  hash TEXT NOT NULL)""")
    for (row_id,) in db.execute("SELECT id FROM rows ORDER BY id").fetchall():
        _record(db, "row", row_id, f"{whoami()}, when the chain began")


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
                _record(db, "row", row_id, whoami())
                db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path}: a row could not be written ({error}); free some disk, or name another "
                             "place with --runs; everything built so far is kept") from error
        return row_id

    def promote(self, name: str, row_id: int, body: Mapping[str, Any]) -> tuple[int, str]:
        """Record that the row's variant is the champion `name` from now on. Returns (id, hash of its link).

        body: why, and what it was compared with; who and when are added. Raises StoreError.
        """
        try:
            with self._connect() as db:
                db.execute("BEGIN IMMEDIATE")
                content = {**body, "who": whoami(), "utc": _now()}
                cursor = db.execute("INSERT INTO promotions (name, row_id, body) VALUES (?, ?, ?)",
                                    (name, row_id, _dump(content)))
                number = int(cursor.lastrowid or 0)
                link = _record(db, "promotion", number, whoami())
                db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path}: the promotion could not be written ({error}); free some disk, or mend the "
                             "rights of the folder; nothing was promoted") from error
        return number, link.hash

    def promotions(self, name: str | None = None) -> list[dict[str, Any]]:
        """Every promotion, oldest first: {"id", "name", "row_id", "who", "utc", "why", ...}."""
        with self._connect() as db:
            found = db.execute("SELECT id, name, row_id, body FROM promotions WHERE ? IS NULL OR name = ? ORDER BY id",
                               (name, name)).fetchall()
        return [{**json.loads(each["body"]), "id": each["id"], "name": each["name"], "row_id": each["row_id"]}
                for each in found]

    def row(self, row_id: int) -> dict[str, Any] | None:
        """One row by its id."""
        found = self._select("SELECT id, body FROM rows WHERE id = ?", (row_id,))
        return found[0] if found else None

    def audit(self) -> list[str]:
        """What is wrong with the chain and with what it records, in words; empty when nothing is.

        Raises StoreError when the file cannot be read as a database any more.
        """
        try:
            with self._connect() as db:
                links = [Link(**dict(each)) for each in db.execute("SELECT * FROM chain ORDER BY number")]
                contents = {("row", int(each["id"])): _content(db, "row", int(each["id"]))
                            for each in db.execute("SELECT id FROM rows ORDER BY id").fetchall()}
                contents |= {("promotion", int(each["id"])): _content(db, "promotion", int(each["id"]))
                             for each in db.execute("SELECT id FROM promotions ORDER BY id").fetchall()}
                stray = [each[0] for each in db.execute("SELECT DISTINCT row_id FROM items WHERE row_id NOT IN "
                                                        "(SELECT id FROM rows) ORDER BY row_id")]
                named = {("row", int(each["id"])): f"row {each['id']} ({each['run']}/{each['variant']})" for each in
                         db.execute("SELECT id, run, variant FROM rows")}
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: cannot be audited ({error}); expected a whole SQLite file; restore it from "
                             "a copy") from error
        told = [*broken(links, contents), *(f"items of row {number}: their row was removed" for number in stray)]
        return [_with_name(line, named) for line in told]

    def tampered(self) -> str | None:
        """The first of what `audit` finds, as "was tampered with: ..."; None for a sound ledger."""
        found = self.audit()
        if not found:
            return None
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        return f"was tampered with: {'; '.join(found[:3])}{more}"

    def head(self) -> str | None:
        """The newest hash of the chain; None for an empty ledger."""
        with self._connect() as db:
            link = _last(db)
        return link.hash if link is not None else None

    def links(self) -> list[Link]:
        """The whole chain, oldest first."""
        with self._connect() as db:
            return [Link(**dict(each)) for each in db.execute("SELECT * FROM chain ORDER BY number")]

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


def _last(db: sqlite3.Connection) -> Link | None:
    found = db.execute("SELECT number, utc, who, kind, subject, digest, previous, hash FROM chain "
                       "ORDER BY number DESC LIMIT 1").fetchone()
    return Link(*found) if found else None


def _record(db: sqlite3.Connection, kind: str, subject: int, who: str) -> Link:
    """Add the link of a record that this transaction has written."""
    link = link_of(_last(db), _now(), who, kind, subject, _content(db, kind, subject))
    db.execute("INSERT INTO chain VALUES (?, ?, ?, ?, ?, ?, ?, ?)", tuple(link.as_dict().values()))
    return link


def _content(db: sqlite3.Connection, kind: str, subject: int) -> str:
    """Digest of a record as it stands: every column of it, and of a row its items too."""
    if kind == "promotion":
        name, row_id, body = db.execute("SELECT name, row_id, body FROM promotions WHERE id = ?", (subject,)).fetchone()
        return digest(str(name), str(row_id), str(body))
    row = db.execute("SELECT run, variant, key, score_key, state, utc, body FROM rows WHERE id = ?",
                     (subject,)).fetchone()
    items = db.execute("SELECT score, body FROM items WHERE row_id = ? ORDER BY score", (subject,)).fetchall()
    return digest(*(str(each) for each in row), *(str(each) for item in items for each in item))


def _with_name(line: str, named: Mapping[tuple[str, int], str]) -> str:
    head, _, rest = line.partition(":")
    kind, _, number = head.partition(" ")
    return f"{named[kind, int(number)]}:{rest}" if number.isdecimal() and (kind, int(number)) in named else line


def whoami() -> str:
    """`user@host`, or what of it is known."""
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container without the user's name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _dump(body: Any) -> str:
    return json.dumps(body, ensure_ascii=False, sort_keys=True, allow_nan=False)
