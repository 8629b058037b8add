"""The ledger: append-only, whole or absent, safe for two first uses at once."""

import json
import sqlite3
import subprocess
import sys

import pytest

from llmops.errors import StoreError
from llmops.ledger import Ledger


def row(variant: str, run: str = "r", score_key: str = "s", state: str = "ok") -> dict:
    return {"identity": {"run": run, "variant": variant, "key": "k" + variant, "score_key": score_key, "utc": "2026Z"},
            "status": {"state": state, "reason": None}, "quality": {"exact_match:test": {"value": 1.0}}}


def test_newest_row_of_each_variant_and_the_whole_history(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    first = ledger.append(row("a"))
    ledger.append(row("b"))
    second = ledger.append(row("a", state="failed"))
    assert [found["row_id"] for found in ledger.rows("r")] == [2, second]
    assert [found["row_id"] for found in ledger.history("r", "a")] == [first, second]
    assert ledger.rows("other") == []


def test_items_come_back_as_written_and_belong_to_their_row(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    items = [{"id": "x", "score": 1.0, "answer": "ü \u2028"}, {"id": "y", "score": 0.0, "answer": ""}]
    number = ledger.append(row("a"), {"exact_match:test": items})
    again = ledger.append(row("a"), {})
    assert ledger.items(number, "exact_match:test") == items
    assert ledger.items(again, "exact_match:test") == []


def test_find_ignores_rows_that_failed(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.append(row("a", score_key="same", state="failed"))
    assert ledger.find("same") is None
    number = ledger.append(row("a", run="other", score_key="same"))
    assert ledger.find("same")["row_id"] == number


def test_a_row_that_cannot_be_written_leaves_no_half(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    with pytest.raises((TypeError, ValueError)):
        ledger.append(row("a"), {"exact_match:test": [{"bad": float("nan")}]})
    assert ledger.history() == []


def test_four_first_uses_at_once_lose_nothing(tmp_path):
    script = ("import json, sys; from llmops.ledger import Ledger\n"
              "ledger = Ledger(sys.argv[1])\n"
              "for i in range(20): ledger.append(json.loads(sys.argv[2]))\n")
    workers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "ledger.db"), json.dumps(row(f"v{n}"))])
               for n in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    assert len(Ledger(tmp_path / "ledger.db").history()) == 80


def test_a_newer_ledger_is_refused_and_a_file_that_is_none(tmp_path):
    Ledger(tmp_path / "ledger.db")
    db = sqlite3.connect(tmp_path / "ledger.db")
    db.execute("PRAGMA user_version = 99")
    db.commit()
    db.close()
    with pytest.raises(StoreError, match="version 99"):
        Ledger(tmp_path / "ledger.db")
    (tmp_path / "no.db").write_text("not a database, but long enough to be mistaken for one" * 20)
    with pytest.raises(StoreError, match="cannot be opened"):
        Ledger(tmp_path / "no.db")


def test_export_is_one_json_line_a_row(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.append(row("a"))
    ledger.append(row("b"))
    assert ledger.export(tmp_path / "rows.jsonl") == 2
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["identity"]["variant"] for line in lines] == ["a", "b"]
