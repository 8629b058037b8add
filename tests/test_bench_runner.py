"""What all scripts of benchmarks/ share: the record, the file, turns and ratios, contenders in their own process."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from benchmarks._runner import contender, machine, results, tables, turns

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SUBJECTS = sorted([*BENCHMARKS.glob("bench_*.py"), BENCHMARKS / "gpu.py", BENCHMARKS / "kill_test.py"])

ECHO = '''
import sys
sys.path.insert(0, {here!r})
from _runner.worker import Clock, Mouth, serve

mouth = Mouth()
print("chatter that is no answer")
clock = Clock()


def answer(question):
    clock.start()
    kept = bytearray(question["mib"] << 20)
    kept[::4096] = b"x" * len(kept[::4096])
    if question["mib"] == 13:
        raise ValueError("unlucky\\nand more")
    if question["mib"] == 99:
        raise SystemExit(3)
    return {{**clock.stop(), "name": sys.argv[1], "case": sys.argv[2]}}


serve(mouth, ["json", *([] if sys.argv[1] != "lame" else ["no_such_module_here"])], answer)
'''


# ------------------------------------------------------------------------------------------------------------- record


def test_the_record_says_when_where_and_how_and_no_place_of_whoever_ran_it(tmp_path: Path) -> None:
    asked = argparse.Namespace(out=tmp_path / "r.json", text=Path("texts"), against=[Path("old/peers.json")], runs=3)
    words = ["/home/someone/benchmarks/bench_x.py", "--out", str(tmp_path / "r.json"), "--text", "texts", "--peer",
             "/opt/venv/bin/python", "--against", "old/peers.json", "--runs", "3", "--cache=/tmp/there", "--bits=4"]
    found = machine.about(asked, ("numpy", "no-such-package"), threads=2, words=words,
                          named={"old/peers.json": "peers.json"})
    assert found["command"] == ("python benchmarks/bench_x.py --out PATH --text PATH --peer PATH --against peers.json "
                                "--runs 3 --cache=PATH --bits=4")
    assert set(found["versions"]) == {"numpy"} and found["cpus"] >= 1 and found["cpu_model"] and found["threads"] == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\d, .*2 thread\(s\).*numpy [\d.]+", machine.said(found))


def test_versions_of_another_python_are_asked_of_it() -> None:
    assert set(machine.versions_there(sys.executable, {"numpy": "numpy", "no_such_module": "x"})) == {"numpy"}


def test_the_file_is_whole_after_every_step_and_keeps_what_was_found(tmp_path: Path, monkeypatch: Any) -> None:
    file = results.Results(tmp_path / "deep" / "r.json", {"date": "today"})
    file.keep(lines=[1])
    assert json.loads(file.path.read_text()) == {"date": "today", "lines": [1], "minutes": 0.0}  # type: ignore[union-attr]
    with pytest.raises(TypeError):
        file.keep(lines=[object()])
    file.body["lines"] = [1]
    assert json.loads(file.path.read_text())["lines"] == [1]  # type: ignore[union-attr]
    monkeypatch.setattr(Path, "replace", lambda *given: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        file.keep(lines=[1, 2])
    assert json.loads(file.path.read_text())["lines"] == [1]  # type: ignore[union-attr]
    results.Results(None, {}).end(lines=[])  # nowhere to write is no error


def test_a_second_run_of_a_day_takes_a_name_that_is_free(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        place = results.free("prune-2026-11-24", tmp_path)
        results.write(place, {})
        names.append(place.name)
    assert names == ["prune-2026-11-24.json", "prune-2026-11-24-2.json", "prune-2026-11-24-3.json"]
    for script in SUBJECTS:
        assert "asked.out or" not in script.read_text(encoding="utf-8").replace("asked.out or free(", ""), script.name


# -------------------------------------------------------------------------------------------------------------- turns


def test_every_second_turn_goes_backwards() -> None:
    assert [name for _, name in turns.in_turn("abc", 3)] == list("abccbaabc")


def test_times_are_those_of_the_calls_and_the_number_goes_up() -> None:
    now = [0.0]
    seen: list[tuple[str, int]] = []

    def takes(name: str, seconds: float) -> Any:
        def call(number: int) -> None:
            seen.append((name, number))
            now[0] += seconds
        return call

    calls = {"a": takes("a", 1.0), "b": takes("b", 3.0)}
    times = turns.timed(calls, turns=2, seconds=30.0, each=2, clock=lambda: now[0])
    assert times == {"a": [1.0] * 8, "b": [3.0] * 8}  # four turns of eight seconds reach thirty
    assert seen[:2] == [("a", 0), ("b", 0)]  # warming up
    assert seen[2:10] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("b", 3), ("a", 2), ("a", 3)]
    assert len(turns.timed(calls, turns=3, clock=lambda: now[0])["a"]) == 3


def test_a_machine_that_slows_down_does_not_move_the_ratio() -> None:
    slow = count()

    def clocked(factor: float) -> list[float]:
        return [factor * (1 + next(slow)) for _ in range(6)]

    base = clocked(1.0)
    slow = count()
    found = turns.ratio(clocked(1.5), base)
    assert found["ratio"] == pytest.approx(1.5) and found["ci95"] == pytest.approx([1.5, 1.5]) and found["n"] == 6
    assert turns.shown(found) == "1.50 (1.50 to 1.50)"
    noisy = turns.ratio([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    half = 4.302652729 * math.log(2) / math.sqrt(3)
    assert noisy["ci95"] == pytest.approx([2 * math.exp(-half), 2 * math.exp(half)]) and noisy["median"] == 2.0
    assert turns.ratio([2.0], [1.0])["ci95"] is None and turns.shown(turns.ratio([2.0], [1.0])) == "2.00"


# ---------------------------------------------------------------------------------------------------------- contenders


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: Any) -> Path:
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(here=str(BENCHMARKS)))
    return script


def test_a_contender_answers_fails_and_ends_and_none_of_it_stops_the_others(echo: Path, tmp_path: Path) -> None:
    one = contender.Contender("one", str(echo), {"seed": 1}, sys.executable, tmp_path / "logs")
    assert one.failed == "" and one.first == {"ready": True}
    small, large = (one.ask(mib=mib) for mib in (1, 64))
    assert large["peak_bytes"] - small["peak_bytes"] > 50 << 20  # each counts from its own start
    assert small["name"] == "one" and json.loads(small["case"]) == {"seed": 1} and small["seconds"] >= 0
    assert one.ask(mib=13) == {"failed": "ValueError: unlucky"}
    assert "chatter" in one.log.read_text() and "and more" in one.log.read_text()
    assert one.ask(mib=99) == {"failed": "its process ended; see one.log"} == one.ask(mib=1)
    one.end()


def test_a_contender_that_cannot_import_says_what_is_missing(echo: Path, tmp_path: Path) -> None:
    lame = contender.Contender("lame", str(echo), {}, sys.executable, tmp_path)
    assert lame.failed == "ModuleNotFoundError: No module named 'no_such_module_here'"
    lame.process.wait()
    assert lame.ask(mib=1) == {"failed": lame.failed}
    lame.end()


def test_a_script_that_is_told_once_and_fails_shows_its_end(tmp_path: Path) -> None:
    script = tmp_path / "once.py"
    script.write_text("import sys\nprint('noise')\nprint([1, 2])\nsys.exit(sys.argv[1:] == ['bad'] and 'so bad')\n")
    assert contender.told_once(script, ["good"]) == [1, 2]
    with pytest.raises(SystemExit, match="(?s)once.py bad failed.*so bad"):
        contender.told_once(script, ["bad"])


def test_a_table_is_markdown() -> None:
    assert tables.table(["a", "b"], [["x", "1"]], "lr") == "| a | b |\n|-|-:|\n| x | 1 |"


# ------------------------------------------------------------------------------------------------------- every script


def test_every_script_is_on_the_page_and_over_the_runner() -> None:
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for script in SUBJECTS:
        assert f"`{script.name}`" in page, f"{script.name} has no line in benchmarks/README.md"
        assert re.search(r"from (benchmarks\.)?_runner", script.read_text(encoding="utf-8")), script.name
    for named in re.findall(r"\(results/([^)]+)\)", page):
        assert (BENCHMARKS / "results" / named).is_file(), named


def test_the_runner_needs_no_package_but_for_intervals() -> None:
    """gpu.py runs where there is torch and Triton alone, and a worker in a peer's Python."""
    script = ("import sys; before = set(sys.modules); "
              "from _runner import contender, machine, results, tables, turns, worker; "
              "new = {n.partition('.')[0] for n in set(sys.modules) - before}; "
              "print(sorted(new - set(sys.stdlib_module_names) - {'_runner'}))")
    done = subprocess.run([sys.executable, "-c", script], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
