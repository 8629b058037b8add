"""A ledger that was touched is found, and what was touched is named."""

import json
import sqlite3
from contextlib import closing

import pytest
from tests.test_ledger import row

from llmops.chain import GENESIS, forged
from llmops.cli import main
from llmops.ledger import MIGRATIONS, Ledger


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "ledger.db")
    for name in "abc":
        made.append(row(name), {"exact_match:test": [{"id": name, "score": 1.0}]})
    made.promote("champion", 2, {"why": "smaller"})
    return made


def change(ledger, *statements):
    with closing(sqlite3.connect(ledger.path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def test_a_ledger_as_it_was_written_is_sound(ledger):
    links = ledger.links()
    assert ledger.audit() == [] and ledger.head() == links[-1].hash
    assert [(link.kind, link.subject) for link in links] == [("row", 1), ("row", 2), ("row", 3), ("promotion", 1)]
    assert [link.previous for link in links] == [GENESIS, *(link.hash for link in links[:-1])]
    [champion] = ledger.promotions("champion")
    assert champion["why"] == "smaller" and champion["row_id"] == 2 and "@" in champion["who"] and champion["utc"]


@pytest.mark.parametrize("statements, message", [
    (["UPDATE rows SET body = replace(body, '1.0', '0.9') WHERE id = 2"], "row 2 (r/b): was changed after it was"),
    (["UPDATE rows SET variant = 'z' WHERE id = 2"], "row 2 (r/z): was changed"),
    (["UPDATE items SET body = '[]' WHERE row_id = 1"], "row 1 (r/a): was changed"),
    (["DELETE FROM items WHERE row_id = 3"], "row 3 (r/c): was changed"),
    (["DELETE FROM rows WHERE id = 2"], "row 2: was removed"),
    (["INSERT INTO rows SELECT 9, run, 'd', key, score_key, state, utc, body FROM rows WHERE id = 1"],
     "row 9 (r/d): was written past the chain"),
    (["UPDATE promotions SET body = replace(body, 'smaller', 'bigger')"], "promotion 1: was changed"),
    (["UPDATE promotions SET row_id = 3"], "promotion 1: was changed"),
    (["DELETE FROM promotions"], "promotion 1: was removed"),
    (["UPDATE chain SET who = 'nobody' WHERE number = 2"], "link 2 (row 2, "),
    (["DELETE FROM chain WHERE number = 2", "DELETE FROM rows WHERE id = 2"], "links 2 to 2 are missing"),
    (["UPDATE chain SET digest = 'x' WHERE number = 3"], "its hash is not that of its fields"),
    (["DELETE FROM chain WHERE number = 4"], "promotion 1: was written past the chain"),
])
def test_what_was_touched_is_named(ledger, statements, message, capsys):
    change(ledger, *statements)
    found = ledger.audit()
    assert any(message in line for line in found), found
    assert main(["audit", "--runs", str(ledger.path.parent)]) == 1
    assert message in capsys.readouterr().out


def test_a_link_that_was_forged_with_its_hash_breaks_the_next_one(ledger):
    link = ledger.links()[1]
    made = forged(2, link.utc, "nobody", "row", 2, link.digest, link.previous)
    change(ledger, f"UPDATE chain SET who = 'nobody', hash = '{made}' WHERE number = 2")
    assert any("link 3" in line and "does not follow" in line for line in ledger.audit())


def test_an_end_that_was_cut_off_shows_by_a_hash_kept_elsewhere(ledger, capsys):
    head, runs = ledger.head(), str(ledger.path.parent)
    assert main(["audit", "--runs", runs, "--expect", head]) == 0
    change(ledger, "DELETE FROM chain WHERE number = 4", "DELETE FROM promotions")
    assert ledger.audit() == []
    assert main(["audit", "--runs", runs, "--expect", head, "--json"]) == 1
    assert "is not in the chain" in json.loads(capsys.readouterr().out.split("\n", 2)[2])["problems"][0]


def test_a_ledger_from_before_the_chain_is_taken_in_as_it_stands(tmp_path, monkeypatch):
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as db:
        for apply in MIGRATIONS[:2]:
            apply(db)
        db.execute("PRAGMA user_version = 2")
        db.execute("INSERT INTO rows VALUES (1, 'r', 'a', 'k', 's', 'ok', '2026Z', ?)", (json.dumps(row("a")),))
        db.commit()
    ledger = Ledger(path)
    assert ledger.audit() == [] and [link.subject for link in ledger.links()] == [1]
    assert "when the chain began" in ledger.links()[0].who
    ledger.append(row("b"))
    assert ledger.audit() == [] and len(ledger.links()) == 2


def test_without_a_ledger_there_is_nothing_to_audit(tmp_path, capsys):
    assert main(["audit", "--runs", str(tmp_path)]) == 2
    assert "no ledger in" in capsys.readouterr().err and not (tmp_path / "ledger.db").exists()
