import copy
import json

import pytest
from rich.console import Console
from tests.report.rows import EVIL, make_rows

from llmops.errors import LlmopsError
from llmops.quantity import Quantity
from llmops.report.compare import compare, compare_as_json, compare_table
from llmops.report.side import side_by_side

SCORE = "exact_match:test"


def cell(lines, figure, variant):
    return next(line for line in lines if line.figure == figure).cells[variant]


def printed(*args, **options):
    console = Console(width=220)
    with console.capture() as seen:
        console.print(compare_table(*args, **options))
    return seen.get()


def test_the_stored_paired_difference_is_used_and_the_parent_is_the_reference():
    lines = compare(make_rows(), ["tuned-w4", "tuned"])
    found = cell(lines, SCORE, "tuned-w4")
    assert list(lines[0].cells) == ["tuned", "tuned-w4"]
    assert found.difference.value == pytest.approx(-0.027) and found.difference.method.startswith("paired")
    assert found.better is False and cell(lines, SCORE, "tuned").difference is None


def test_without_items_the_difference_is_unpaired_and_says_so():
    found = cell(compare(make_rows(), ["tuned-w4", "student"]), SCORE, "student")
    assert found.difference.method.startswith("unpaired")
    rows = {row["identity"]["variant"]: row["quality"].get(SCORE) for row in make_rows() if "quality" in row}
    half = 1.959963984540054 * (rows["tuned-w4"]["stderr"] ** 2 + rows["student"]["stderr"] ** 2) ** 0.5
    assert found.difference.ci95 == pytest.approx((0.86 - 0.913 - half, 0.86 - 0.913 + half))
    assert "unpaired" in printed(make_rows(), ["tuned-w4", "student"])


def test_items_at_hand_are_paired_anew():
    asked = []

    def paired(row, reference, score_id):
        asked.append((row["identity"]["variant"], reference["identity"]["variant"], score_id))
        return {"delta": Quantity.measured(-0.05, "fraction", "paired anew", (-0.06, -0.04), 300)}

    found = cell(compare(make_rows(), ["tuned-w4", "student"], paired=paired), SCORE, "student")
    assert found.difference.method == "paired anew" and found.better is False
    assert ("student", "tuned-w4", SCORE) in asked


def test_other_items_are_refused_with_the_reason():
    def paired(row, reference, score_id):
        raise LlmopsError("the two scores are not of the same prompts")

    found = cell(compare(make_rows(), ["tuned-w4", "student"], paired=paired), SCORE, "student")
    assert found.difference is None and found.problem == "the two scores are not of the same prompts"


def test_another_protocol_workload_or_machine_is_not_comparable():
    rows = make_rows()
    rows[3]["quality"][SCORE]["protocol"]["max_new_tokens"] = 99
    rows[3]["workload"]["prompts_sha256"] = "00"
    lines = compare(rows, ["tuned", "tuned-w4"])
    assert "different protocol: max_new_tokens" in cell(lines, SCORE, "tuned-w4").problem
    assert "prompts_sha256" in cell(lines, "joules_per_token (batch 1)", "tuned-w4").problem
    assert cell(lines, "disk_bytes", "tuned-w4").difference.value == pytest.approx(5296250 / 16060000, rel=1e-3)
    text = printed(rows, ["tuned", "tuned-w4"])
    assert "not comparable (1)" in text and "(1) not comparable: different protocol" in text


def test_energy_meets_through_base_with_the_interval_of_both():
    lines = compare(make_rows(), ["tuned", "tuned-w4"])
    found = cell(lines, "joules_per_token (batch 1)", "tuned-w4").difference
    assert found.value == pytest.approx(0.041 / 0.0612)
    assert found.provenance == "estimated" and found.method.startswith("through base")
    one = found.ci95[1] / found.ci95[0]
    assert one == pytest.approx((1.05 / 0.95) ** 2 ** 0.5)  # two equal, independent log half-widths
    against_base = cell(compare(make_rows(), ["base", "tuned-w4"]), "joules_per_token (batch 1)", "tuned-w4")
    assert against_base.difference.ci95 == pytest.approx((0.041 / 0.061 * 0.95, 0.041 / 0.061 * 1.05))
    turned = cell(compare(make_rows(), ["tuned-w4", "base"], against="tuned-w4"), "joules_per_token (batch 1)", "base")
    assert turned.difference.ci95 == pytest.approx((1 / (0.041 / 0.061 * 1.05), 1 / (0.041 / 0.061 * 0.95)))


def test_better_follows_the_direction_of_the_figure():
    lines = compare(make_rows(), ["tuned", "tuned-w4", "wanda"])
    assert cell(lines, "decode_tokens_per_s (batch 1)", "tuned-w4").better is True
    assert cell(lines, "joules_per_token (batch 1)", "tuned-w4").better is True
    assert cell(lines, "perplexity:heldout", "wanda").better is False
    assert cell(lines, "disk_bytes", "tuned-w4").better is True and cell(lines, "disk_bytes", "wanda").better is None
    assert cell(lines, "joules_per_token (batch 1)", "wanda").better is None


def test_rows_of_two_runs_are_told_apart_by_the_runs_name():
    ours, theirs = make_rows()[:3], copy.deepcopy(make_rows()[:4])
    for row in theirs:
        row["identity"]["run"] = "older"
    both = ours + theirs
    lines = compare(both, ["demo/tuned", "older/tuned", "tuned-w4"])
    assert list(lines[0].cells) == ["demo/tuned", "older/tuned", "older/tuned-w4"]
    assert cell(lines, SCORE, "older/tuned").difference.method.startswith("unpaired")
    with pytest.raises(LlmopsError, match="unknown variant"):
        compare(both, ["tuned"])  # which of the two?


def test_zeros_that_save_nothing_are_marked_beside_others():
    rows = make_rows()
    assert "wanda 50% †" in printed(rows, ["wanda", "tuned-w4"])
    assert "no time saved" in printed(rows, ["wanda", "tuned"])
    assert "†" not in printed(rows, ["tuned", "tuned-w4"])
    page = side_by_side([row for row in rows if row["identity"]["variant"] in ("tuned", "wanda")])
    assert "wanda 50% †" in page and "no time saved" in page
    assert "†" not in side_by_side([row for row in rows if row["identity"]["variant"] in ("tuned", "tuned-w4")])


def test_names_that_are_not_there():
    with pytest.raises(LlmopsError, match='unknown variant "tuned-w5".*did you mean "tuned-w'):
        compare(make_rows(), ["tuned-w5"])
    with pytest.raises(LlmopsError, match="unknown variant"):
        compare(make_rows(), ["tuned"], against="nobody")
    with pytest.raises(LlmopsError, match="nothing to compare"):
        compare([])


def test_failed_and_empty_rows_are_shown_as_they_are():
    text = printed(make_rows(), ["tuned", "healed-w4", "half"])
    assert "failed: layer model.layers.3" in text
    assert printed([{}, {"identity": {"variant": "x"}}])
    rows = make_rows()
    rows[3]["identity"]["variant"] = EVIL + "[red]"
    assert EVIL + "[red]" in printed(rows, ["tuned", EVIL + "[red]"])


def test_json_says_the_same():
    body = json.loads(json.dumps(compare_as_json(make_rows(), ["tuned", "tuned-w4"]), allow_nan=False))
    assert body["against"] == "tuned" and body["variants"] == ["tuned", "tuned-w4"]
    first = body["figures"][0]
    assert first["figure"] == SCORE and first["kind"] == "delta"
    assert first["variants"]["tuned-w4"]["difference"]["value"] == pytest.approx(-0.027)
