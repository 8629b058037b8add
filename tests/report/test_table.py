import json
import subprocess
import sys

import pytest
from rich.console import Console
from tests.report.rows import EVIL, make_rows, many, null

from llmops.report.table import failures, goal_lines, rows_as_json, table


def shown(rows, columns=140, **options):
    console = Console(width=columns)
    with console.capture() as seen:
        console.print(table(rows, **options))
    return seen.get()


def line_of(text, name):
    return next(line for line in text.splitlines() if f" {name} " in line)


@pytest.mark.parametrize("width", [100, 120, 140, 160])
def test_the_compact_table_fits_and_cuts_nothing(width):
    text = shown(make_rows(), width, width=width)
    assert max(map(len, text.splitlines())) <= width
    body = text.split("★ the winner")[0]
    assert "…" not in body
    for name in ("base", "tuned-w4", "healed-w4", "student"):
        assert line_of(body, name)
    assert "91.3% [88.1, 94.5]" in body


def test_children_stand_under_their_parent_indented():
    lines = shown(make_rows()).splitlines()
    order = [next(i for i, line in enumerate(lines) if f"└ {name} " in line) for name in ("tuned", "wanda", "healed")]
    assert order == sorted(order)
    assert lines[order[2]].index("└") > lines[order[1]].index("└") > lines[order[0]].index("└")


def test_scores_have_intervals_deltas_and_estimates_their_mark():
    line = line_of(shown(make_rows()), "tuned-w4")
    assert line.split()[0] == "★*" and "91.3% [88.1, 94.5]" in line and "-2.7 [-4.7, -0.7]" in line
    assert "~41.0 mJ" in line and "~0.672 ↓" in line and "5.30 MB" in line
    assert "~1.18 ↑" in line_of(shown(make_rows()), "tuned-w3")
    assert "~1.00 =" in line_of(shown(make_rows()), "tuned ")


def test_wide_has_every_column_with_its_interval():
    text = shown(make_rows(), 400, wide=True)
    line = line_of(text, "tuned-w4")
    assert "…" not in text.split("★ the winner")[0]
    for piece in ("6.50 [6.24, 6.76]", "~0.672 [0.639, 0.706] saves", "5.04 MB", "~38.1 MB", "821 ms", "~207 k"):
        assert piece in line
    assert "~1.18 [1.12, 1.24] costs more" in text


def test_the_legend_explains_only_what_occurs():
    text = " ".join(shown(make_rows()).split())
    assert "~ estimated, not measured" in text and "† zeros in dense tensors: no time saved" in text
    assert "* on the Pareto line of exact_match:test against joules_per_token" in text
    assert "simulated" not in text
    plain = make_rows()[:1]
    assert "†" not in shown(plain)
    plain[0]["transform"]["simulated"] = True
    assert "simulated: compression is imitated" in " ".join(shown(plain).split())


def test_a_figure_that_nobody_has_is_a_dash_with_its_reason_beneath():
    rows = make_rows()
    for row in rows:
        for batch in ("1", "8"):
            if "energy" in row:
                row["energy"][batch]["joules_per_token"] = null("J/token", "no sensor; estimates were not asked for")
                row["energy"][batch]["ratio_to_base"] = null("ratio", "no sensor; estimates were not asked for")
    text = shown(rows)
    assert "no sensor; estimates were not asked for" in " ".join(text.split())
    assert "~41" not in text and " 0 J" not in text


def test_states_and_reasons():
    rows = make_rows()
    assert failures(rows)[0].startswith("tuned-w2 broken: not what was built")
    assert failures(rows)[1].startswith("healed-w4 failed: layer")
    assert line_of(shown(rows), "healed-w4").split()[0] == "failed"
    rows[5]["status"]["reason"] = "x" * 1000
    assert 400 < len(failures(rows)[0]) < 520  # what to do is said last, and is not cut off


def test_goals_are_told_in_words():
    lines = goal_lines(make_rows())
    assert lines[0] == "winner: tuned-w4"
    assert "missed: exact_match:test max_drop 0.03 against tuned" in lines[1] and "tuned-w3 (drop 0.330)" in lines[1]
    none = [{**row, "verdict": {**row["verdict"], "winner": False}} for row in make_rows()]
    assert goal_lines(none)[0] == "no variant meets every goal"
    assert goal_lines([{}]) == []


@pytest.mark.parametrize("gone", ["identity", "status", "transform", "size", "latency", "energy", "building", "quality",
                                  "carbon", "verdict", "environment", "workload", "parity", "tokens", "log", "goals"])
def test_any_group_may_be_missing_or_null(gone):
    for rows in ([{key: value for key, value in row.items() if key != gone} for row in make_rows()],
                 [{**row, gone: None} for row in make_rows()]):
        assert shown(rows) and shown(rows, 400, wide=True)


def test_no_rows_and_empty_rows():
    assert "variant" in shown([])
    assert "?" in shown([{}])


def test_names_are_text_not_console_markup():
    rows = make_rows()
    rows[3]["identity"]["variant"] = "[red]x[/red]"
    rows[4]["identity"]["variant"] = EVIL
    text = shown(rows, 200, width=200)
    assert "[red]x[/red]" in text and EVIL in text


def test_json_is_stable_and_whole():
    rows = make_rows()
    text = rows_as_json(rows)
    assert text == rows_as_json([dict(reversed(row.items())) for row in make_rows()])
    assert [row["identity"]["variant"] for row in json.loads(text)][:3] == ["base", "tuned", "tuned-w8"]
    rows[1]["size"]["disk_bytes"]["value"] = float("nan")
    assert json.loads(rows_as_json(rows))[1]["size"]["disk_bytes"]["value"] is None


def test_a_hundred_variants():
    assert sum("rtn w4a16" in line for line in shown(many(100)).splitlines()) == 90


def test_the_room_imports_nothing_heavy():
    code = ("import sys; import llmops.report.table, llmops.report.html, llmops.report.card, llmops.report.compare; "
            "print([name for name in ('torch', 'transformers', 'numpy', 'scipy', 'rich') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.strip() == "[]"
