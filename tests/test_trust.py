"""A small run judged, explained and promoted: the gate, champions, changed answers, what a killed scoring leaves."""

import json
import shutil
import sqlite3
from contextlib import closing
from xml.etree import ElementTree

import pytest
from tests.runs import NAMES, TUNED, recipe, workplace

from llmops import evaluate
from llmops.champions import champions, promote
from llmops.cli import main
from llmops.errors import LlmopsError
from llmops.evaluate.statistics import paired
from llmops.explain import explain, lines
from llmops.gate import gate
from llmops.ledger import Ledger
from llmops.pairing import stored_score
from llmops.recipe import parse_recipe
from llmops.report.verdict import drop_words
from llmops.runner import run

PICKS = "multiple_choice:picks"
VARIANTS = {"tuned": TUNED, "w8": {"from": "tuned", "quantize": {"method": "rtn", "scheme": "w8a16"}},
            "w2": {"from": "tuned", "quantize": {"method": "rtn", "scheme": "w2a16", "group_size": 32}}}


def write_picks(folder, count=64, word="stay"):
    rows = [{"question": f"Where does {name} {number} {word}?", "choices": ["town", "lake", "river", "bridge"],
             "answer": (number + place) % 4, "topic": "even" if place % 2 else "odd", "person": name}
            for number in range(count // 16) for place, name in enumerate(NAMES)]
    (folder / "picks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))


def trust(place, runs, variants=None, name="r", goals=None, **score):
    body = recipe(variants or VARIANTS, name=name, goals=goals or {
        PICKS: {"noninferior": 0.2, "max_gap": 0.5, "against": "tuned"}, "prefer": "weights_bytes"})
    body["data"]["picks"] = {"source": "picks.jsonl"}
    body["evaluate"] = [{"multiple_choice": {"data": "picks", "slices": ["topic"], **score}},
                        {"perplexity": {"data": "prose", "context": 64}}]
    return run(parse_recipe(body, base_dir=place), runs=runs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = workplace(tmp_path_factory.mktemp("place"))
    write_picks(place)
    runs = tmp_path_factory.mktemp("runs")
    return place, runs, trust(place, runs)


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "runs", symlinks=True)
    return finished[0], tmp_path / "runs"


def call(capsys, *words):
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_rows_hold_groups_and_comparisons_by_group(finished):
    _, runs, result = finished
    rows = {each["identity"]["variant"]: each for each in result.rows}
    body = rows["w2"]["quality"][PICKS]
    assert {group: each["n"] for group, each in body["slices"]["topic"].items()} == {"even": 32, "odd": 32}
    versus = body["versus"]["parent"]
    assert versus["variant"] == "tuned" and versus["slices"]["topic"]["worst"] in ("even", "odd")
    assert sum(each["lost"] for each in versus["slices"]["topic"]["groups"].values()) == versus["lost"]
    ledger = Ledger(runs / "ledger.db")
    items = ledger.items(rows["w2"]["row_id"], PICKS)
    assert {item["detail"]["groups"]["topic"] for item in items} == {"even", "odd"}
    assert all({"expected", "correct", "loglikelihoods"} <= set(item["detail"]) for item in items)
    sides = [stored_score(ledger, rows[name], PICKS) for name in ("w2", "tuned")]
    again = paired(*sides, 0)
    assert again["delta"].as_dict() == versus["delta"] and again["p"] == versus["p"]
    assert ledger.audit() == [] and "Groups" in (runs / "r" / "report.html").read_text()


def test_the_gate_has_three_exit_codes_and_writes_junit(finished, tmp_path, capsys):
    _, runs, result = finished
    code, out, _ = call(capsys, "gate", "r", "w8", "--runs", runs, "--junit", tmp_path / "ci" / "gate.xml")
    assert code == 0 and out.splitlines()[-2] == "passed: w8: every goal is met"
    assert out.splitlines()[-1] == f"ledger: {Ledger(runs / 'ledger.db').head()}"
    suite = ElementTree.parse(tmp_path / "ci" / "gate.xml").getroot()[0]
    assert [case.get("classname") for case in suite.iter("testcase")] == ["r.w8", "r.w8"]
    assert suite.get("failures") == "0" and suite.find("properties/property").get("value") == out.split()[-1]
    code, out, _ = call(capsys, "gate", "r", "w2", "--goal", "disk_bytes: {max: 1}", "--runs", runs, "--json")
    found = json.loads(out)
    assert code == 1 and not found["passed"]
    assert [case["state"] for case in found["cases"] if case["goal"].startswith("disk_bytes")] == ["failed"]
    assert call(capsys, "gate", "r", "w9", "--runs", runs)[0] == 2
    winner = gate(str(runs), "r")
    assert winner.winner == result.winner
    assert {case.state for case in winner.cases if case.variant == winner.winner} == {"passed"}


@pytest.mark.parametrize("goal, message", [
    ("joules_per_token: {max: 1}", "nobody computed it: not measured in this run"),
    ("exact_match: {min: 0.5}", "nobody computed exact_match: unknown score or cost"),
    ("multiple_choice: {min: much}", "min: Input should be a valid number"),
    ("multiple_choice: {against: tuned}", "bounds nothing"),
    ("multiple_choice: {max_drop: 0.1, against: tuend}", 'did you mean "tuned"'),
    ("multiple_choice", "is no goal"),
    ("perplexity: {max_gap: 0.1}", "nobody computed it: perplexity:prose was scored without groups"),
])
def test_a_gate_on_what_nobody_computed_is_refused(finished, goal, message):
    with pytest.raises(LlmopsError, match=message):
        gate(str(finished[1]), "r", [], [goal])


def test_a_goal_against_another_variant_is_paired_from_the_items(finished):
    found = gate(str(finished[1]), "r", ["w2"], ["multiple_choice: {noninferior: 0.9, against: w8}"])
    [case] = [case for case in found.cases if "against w8" in case.goal and "noninferior" in case.goal]
    assert case.state == "passed" and "drop" in case.detail


def test_a_run_that_has_not_ended_is_not_judged(copied):
    (copied[1] / "r" / "result.json").unlink()
    with pytest.raises(LlmopsError, match="run r has not ended"):
        gate(str(copied[1]), "r")


def test_a_tampered_ledger_judges_and_promotes_nothing(copied, capsys):
    _, runs = copied
    with closing(sqlite3.connect(runs / "ledger.db")) as db:
        db.execute("UPDATE rows SET body = replace(body, '\"multiple_choice\"', '\"multiple_choicE\"') WHERE id = 3")
        db.commit()
    for words in (("gate", "r"), ("promote", "r", "w8")):
        code, _, err = call(capsys, *words, "--runs", runs)
        assert code == 2 and "was tampered with: row 3 (r/w8): was changed" in err
    for words in (("compare", "r"), ("report", "r")):  # what shows figures shows them, and says so
        code, _, err = call(capsys, *words, "--runs", runs)
        assert code == 0 and "WARNING: the ledger was tampered with: row 3 (r/w8): was changed" in err
    assert "was tampered with" in (runs / "r" / "report.html").read_text(encoding="utf-8")


def test_a_sound_ledger_is_shown_without_a_word(finished, capsys):
    assert "tampered" not in call(capsys, "compare", "r", "--runs", finished[1])[2]


def test_champion_and_challenger(copied, capsys):
    place, runs = copied
    at = ("--runs", runs)
    assert call(capsys, "champions", *at)[1] == "no variant was promoted yet\n"
    code, out, _ = call(capsys, "promote", "r", "tuned", "--why", "the first", *at)
    assert code == 0 and "no champion yet" in out
    code, out, _ = call(capsys, "promote", "r", "w8", "--why", "smaller", *at)
    assert code == 0 and "non-inferior" in out and "saving shown: weights_bytes" in out
    assert (runs / "_champions" / "champion").resolve().name == Ledger(runs / "ledger.db").row(
        champions(str(runs))[0]["row_id"])["identity"]["key"]
    code, _, err = call(capsys, "promote", "r", "w8", *at)
    assert code == 2 and "r/w8 is the build that is champion already (promoted as r/w8)" in err
    code, out, _ = call(capsys, "promote", "r", "tuned", *at)  # the champion is smaller
    assert code == 1 and "no saving shown in weights_bytes" in out and champions(str(runs))[0]["variant"] == "w8"
    code, out, _ = call(capsys, "promote", "r", "tuned", "--force", "--why", "rollback", *at)
    assert code == 0 and "by force" in out
    history = champions(str(runs), history=True)
    assert [(each["variant"], each["why"], each["forced"]) for each in history] == [
        ("tuned", "the first", False), ("w8", "smaller", False), ("tuned", "rollback", True)]
    assert history[2]["against"] and history[2]["replaces"] == history[1]["id"]
    assert Ledger(runs / "ledger.db").audit() == []
    with pytest.raises(LlmopsError, match='unknown champion "prod"'):
        champions(str(runs), "prod")


def test_a_champion_of_another_run_is_compared_by_its_items_or_not_at_all(copied, tmp_path):
    place, runs = copied
    promote(str(runs), "r", "tuned")
    later = trust(place, runs, {"tuned": TUNED, "w4": {"from": "tuned", "quantize": {
        "method": "rtn", "scheme": "w4a16", "group_size": 32}}}, name="later")
    found = promote(str(runs), "later", "w4", margin=0.9)
    assert found.champion == "r/tuned" and found.scores[PICKS]["n"] == 64
    assert "--margin 0.9 is not used" in found.lines()[0] and found.scores[PICKS]["margin"] == 0.2
    assert later.rows[0]["identity"]["run"] == "later"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(place, elsewhere)
    write_picks(elsewhere, word="work")
    trust(elsewhere, runs, {"tuned": TUNED}, name="other")
    with pytest.raises(LlmopsError, match="cannot be compared: .*not of the same prompts"):
        promote(str(runs), "other", "tuned")
    forced = promote(str(runs), "other", "tuned", force=True)
    assert forced.promoted and forced.forced and "not comparable" in forced.against[0]


def test_no_margin_no_promotion(copied):
    place, runs = copied
    trust(place, runs, name="plain", goals={"prefer": "weights_bytes"})
    promote(str(runs), "plain", "tuned")
    with pytest.raises(LlmopsError, match="no margin says how much worse"):
        promote(str(runs), "plain", "w8")
    with pytest.raises(LlmopsError, match="--margin -1"):
        promote(str(runs), "plain", "w8", margin=-1)
    with pytest.raises(LlmopsError, match='unknown cost "bytes"'):
        promote(str(runs), "plain", "w8", margin=0.5, saving="bytes")
    assert promote(str(runs), "plain", "w8", margin=0.5, saving="disk_bytes").promoted


def test_explained_items_tokens_and_layers(copied, capsys):
    place, runs = copied
    found = explain(str(runs), "r", "w2", items=5)
    body = found["scores"][PICKS]
    row = {each["identity"]["variant"]: each for each in Ledger(runs / "ledger.db").rows("r")}["w2"]
    assert body["changed"] >= row["quality"][PICKS]["versus"]["parent"]["changed_answers"] > 0
    assert len(body["items"]) == 5 and body["items"][0]["question"].startswith("Where does")
    item = body["items"][0]
    assert item["answer"] != item["answer_before"] and item["groups"]["topic"] in ("even", "odd")
    assert "".join(token["token"] for token in item["tokens"]).strip() == item["answer_before"]
    layers = found["layers"]
    assert layers["score"] == PICKS and layers["whole"]["kl"] > 0
    assert {(each["block"], each["kind"]) for each in layers["swaps"]} == {
        (block, kind) for block in range(4) for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(each["kl"] > 0 for each in layers["swaps"])
    text = "\n".join(lines(found))
    assert "block 0 down" in text and "█" in text and "changed" in text
    page = (runs / "r" / "report.html").read_text()
    assert 'id="why"' in page and "what each layer does alone, w2 against tuned" in page
    assert explain(str(runs), "r", "w2", items=5)["layers"] == layers
    assert call(capsys, "explain", "r", "w2", "--items", 1, "--runs", runs, "-q")[0] == 0


def test_what_cannot_be_explained_says_why(copied):
    place, runs = copied
    for words, message in ((("base",), "has no parent"), (("w8", "w8"), "nothing differs"),
                           (("w9",), "unknown variant"), (("w8", "w9"), "unknown variant")):
        with pytest.raises(LlmopsError, match=message):
            explain(str(runs), "r", *words)
    origin = runs / "r" / "origin.json"
    body = json.loads(origin.read_text())
    moved = runs / "moved"
    shutil.copytree(place, moved)
    write_picks(moved, word="work")
    origin.write_text(json.dumps({**body, "base_dir": str(moved)}))
    with pytest.raises(LlmopsError, match="the data are not those that were scored"):
        explain(str(runs), "r", "w2")
    origin.unlink()
    with pytest.raises(LlmopsError, match="run `llmops tune` with its recipe again"):
        explain(str(runs), "r", "w2")


def test_a_scoring_that_was_killed_goes_on_after_the_scores_that_are_there(finished, tmp_path, monkeypatch):
    place, runs, _ = finished
    shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    calls, real = [], dict(evaluate.EVALUATORS)

    def counted(metric, fail):
        def evaluator(*args, **options):
            calls.append(metric)
            if fail:
                raise KeyboardInterrupt
            return real[metric](*args, **options)
        return evaluator

    monkeypatch.setitem(evaluate.EVALUATORS, "multiple_choice", counted("multiple_choice", False))
    monkeypatch.setitem(evaluate.EVALUATORS, "perplexity", counted("perplexity", True))
    with pytest.raises(KeyboardInterrupt):
        trust(place, tmp_path / "runs", {"tuned": TUNED}, name="again", length_normalized=True)
    assert calls == ["multiple_choice", "perplexity"] and len(list((tmp_path / "runs" / "scoring").iterdir())) == 1
    monkeypatch.setitem(evaluate.EVALUATORS, "perplexity", counted("perplexity", False))
    result = trust(place, tmp_path / "runs", {"tuned": TUNED}, name="again", length_normalized=True)
    assert calls[2:] == ["perplexity", "multiple_choice", "perplexity"]  # of base, then both of tuned
    assert not list((tmp_path / "runs" / "scoring").iterdir())
    assert "kept from an earlier try" in result.rows[0]["building"]["evaluate_energy_j"]["method"]
    fresh = trust(place, tmp_path / "fresh", {"tuned": TUNED}, name="again", length_normalized=True)
    for kept, one in zip(result.rows, fresh.rows, strict=True):
        assert kept["quality"] == one["quality"]


@pytest.mark.parametrize("drop, worst, said", [
    (0.02, 0.05, "drop 0.02; at most 0.05 with 95% confidence"), (0.0, 0.05, "no drop; a drop of at most 0.05 with "
                                                                            "95% confidence"),
    (-0.0, None, "no drop"), (-0.02, 0.01, "gain 0.02; a drop of at most 0.01 with 95% confidence"),
    (-0.05, -0.02, "gain 0.05; a gain of at least 0.02 with 95% confidence"), (0.3, None, "drop 0.3")])
def test_a_gain_is_no_negative_drop(drop, worst, said):
    assert drop_words(drop, worst) == said
