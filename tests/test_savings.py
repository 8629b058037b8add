"""What a challenger is promoted by: measured energy, speed, bytes; and what nothing is promoted by."""

import copy
import shutil

import pytest
from tests.report.rows import make_rows
from tests.runs import recipe, workplace

from llmops.champions import promote
from llmops.cli import main
from llmops.errors import LlmopsError
from llmops.ledger import Ledger
from llmops.measure.cost import break_even
from llmops.measure.summary import _verdict
from llmops.quantity import Quantity
from llmops.recipe import parse_recipe
from llmops.report.compare import compare
from llmops.report.reading import saving
from llmops.runner import run
from llmops.savings import savings


def measured(row, joules, speed=1.0, *, n=5, provenance="measured", batches=("1",)):
    """The row as if its joules and speed over base had been measured so, within 2 %."""
    def ratio(value):
        return Quantity(value, "ratio", provenance, "interleaved pairs", (value * 0.98, value * 1.02), n).as_dict()

    def figure(value, unit):
        return Quantity(value, unit, provenance, "a counter", (value * 0.99, value * 1.01), n).as_dict()

    given = dict(zip(batches, joules if isinstance(joules, tuple) else (joules,), strict=True))
    row = copy.deepcopy(row)
    row["energy"] = {batch: {"joules_per_token": figure(0.1 * each, "J/token"), "ratio_to_base": ratio(each),
                             "saving": "shown" if each < 0.98 else "not shown"} for batch, each in given.items()}
    row["latency"] = {batch: {"decode_tokens_per_s": figure(100 * speed, "tokens/s"),
                              "speed_ratio_to_base": ratio(speed)} for batch in batches}
    row["environment"] = {**(row.get("environment") or {}), "sensor": "nvml", "sensor_provenance": "measured"}
    row["workload"] = {"prompt_tokens": 8, "new_tokens": 8, "prompts_sha256": "aa"}
    return row


@pytest.fixture
def pair():
    rows = {row["identity"]["variant"]: row for row in make_rows()}
    return rows["tuned-w4"], rows["tuned"]


def judged(mine, theirs, wanted="joules_per_token", batch=None):
    return {each.figure: each for each in savings(mine, theirs, wanted, batch)}


def test_energy_and_decode_latency_meet_through_base(pair):
    one, two = measured(pair[0], 0.6, 1.5), measured(pair[1], 0.9, 1.2)
    found = judged(one, two)["joules_per_token (batch 1)"]
    assert found.better and found.ratio.value == pytest.approx(0.6 / 0.9) and found.ratio.ci95[1] < 1
    slow = judged(one, two, "decode_latency")["decode_latency (batch 1)"]
    assert slow.better and slow.ratio.value == pytest.approx(1.2 / 1.5) and slow.ratio.ci95[1] < 1
    assert slow.ratio.ci95[0] < slow.ratio.value < slow.ratio.ci95[1]
    assert judged(two, one)["joules_per_token (batch 1)"].better is False
    assert judged(one, measured(pair[1], 0.61))["joules_per_token (batch 1)"].better is None  # within the interval


@pytest.mark.parametrize("change, said", [
    ({"provenance": "estimated"}, "joules per token are estimated, not measured"),
    ({"provenance": "constant"}, "joules per token are constant, not measured"),
    ({"n": 4}, "4 repeats, too few: not shown; expected at least 5")])
def test_estimates_and_few_repeats_show_nothing(pair, change, said):
    found = judged(measured(pair[0], 0.5, **change), measured(pair[1], 0.9))["joules_per_token (batch 1)"]
    assert found.better is None and said in found.problem


@pytest.mark.parametrize("group, key, value, said", [
    ("environment", "gpu", ["other"], "different environment: gpu"),
    ("environment", "sensor", "rapl", "different sensor: 'nvml' here and 'rapl' there"),
    ("environment", "gpus", [{"power_limit_w": 300.0}], "different power limit"),
    ("workload", "prompts_sha256", "bb", "different workload: prompts_sha256")])
def test_another_machine_sensor_or_workload_is_not_compared(pair, group, key, value, said):
    one, two = measured(pair[0], 0.5), measured(pair[1], 0.9)
    one["environment"]["gpus"] = [{"power_limit_w": 700.0}]
    one["environment"]["gpu"] = ["card"]
    two["environment"] |= {"gpus": [{"power_limit_w": 700.0}], "gpu": ["card"]}
    assert judged(one, two)["joules_per_token (batch 1)"].better
    two[group][key] = value
    found = judged(one, two)["joules_per_token (batch 1)"]
    assert found.better is None and said in found.problem and said in found.told()


def test_what_nobody_measured_says_so(pair):
    one, two = ({**row, "energy": {}, "latency": {}} for row in pair)
    found = judged(one, two)["joules_per_token"]
    assert found.better is None and "not measured" in found.problem
    other = judged(measured(pair[0], 0.5), two)["joules_per_token (batch 1)"]
    assert "not known of the champion" in other.problem
    first = judged(*(measured(row, 0.9) | {"latency": {"1": {"first_token_ms_p50": Quantity.measured(
        3.0, "ms", "clock").as_dict()}}} for row in pair), "first_token_ms")["first_token_ms (batch 1)"]
    assert first.better is None and "no interval" in first.problem


def test_few_repeats_are_no_verdict_anywhere(pair):
    few = Quantity.measured(0.5, "ratio", "pairs", (0.4, 0.6), 4)
    assert _verdict(few) == "not shown" and _verdict(Quantity.measured(0.5, "ratio", "pairs", (0.4, 0.6), 5)) == "shown"
    tokens = break_even(Quantity.measured(1.0, "J", "m"), Quantity.measured(1.0, "J/token", "m"), few)
    assert tokens.value is None and "of 4 repeats, at least 5" in tokens.method
    for joules in (0.5, 1.5):
        row = measured(pair[0], joules, joules, n=4)
        assert saving(row, "1") == "too few repeats"
        lines = compare([row, measured(pair[1], 1.0, n=4)], ["tuned-w4", "tuned"])
        shown = {line.figure: line.cells["tuned-w4"].better for line in lines if line.figure.endswith("(batch 1)")}
        assert shown["joules_per_token (batch 1)"] is shown["decode_tokens_per_s (batch 1)"] is None


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    place = workplace(tmp_path_factory.mktemp("place"))
    runs = tmp_path_factory.mktemp("runs")
    body = recipe({"w8": {"quantize": {"method": "rtn", "scheme": "w8a16"}}},
                  goals={"exact_match": {"noninferior": 0.9}})
    body["evaluate"] = body["evaluate"][:1]
    run(parse_recipe(body, base_dir=place), runs=runs)
    return runs


@pytest.fixture
def energies(scored, tmp_path):
    """A ledger to which runs of rows with such energies can be added."""
    shutil.copytree(scored, tmp_path / "runs", symlinks=True)
    ledger = Ledger(tmp_path / "runs" / "ledger.db")
    rows = {row["identity"]["variant"]: row for row in ledger.rows("r")}

    def add(name, variant, *args, **more):
        row = measured(rows[variant], *args, **more)
        row["identity"] = {**row["identity"], "run": name, "key": f"{name}-{variant}"}
        items = {score: ledger.items(rows[variant]["row_id"], score) for score in row["quality"]}
        row.pop("row_id")
        ledger.append(row, items)
    return tmp_path / "runs", add


def test_promoted_on_non_inferior_accuracy_and_measured_joules(energies, capsys):
    runs, add = energies
    add("one", "base", 1.0)
    add("two", "w8", (0.7, 0.8), 1.0, batches=("1", "8"))
    add("mixed", "w8", (1.3, 0.8), 1.0, batches=("1", "8"))
    promote(str(runs), "one", "base")
    assert main(["promote", "two", "w8", "--saving", "joules_per_token", "--runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert "non-inferior" in out and "saving shown: joules_per_token (batch 1) x 0.7" in out
    kept = Ledger(runs / "ledger.db").promotions("champion")[-1]
    assert kept["savings"]["joules_per_token (batch 1)"]["ratio"]["ci95"][1] < 1
    add("one-more", "base", (1.0, 1.0), batches=("1", "8"))
    promote(str(runs), "one-more", "base", force=True)
    found = promote(str(runs), "mixed", "w8", saving="joules_per_token")
    assert not found.promoted and "it costs more: joules_per_token (batch 1) x 1.3" in found.against[0]
    assert promote(str(runs), "mixed", "w8", saving="joules_per_token", batch=8).promoted


def test_not_promoted_on_energy_that_nobody_measured(energies):
    runs, add = energies
    add("one", "base", 1.0)
    add("guessed", "w8", 0.5, provenance="estimated")
    promote(str(runs), "one", "base")
    found = promote(str(runs), "guessed", "w8", saving="joules_per_token")
    assert not found.promoted and "not measured" in found.against[0] and "decode_latency" in found.against[0]
    assert not promote(str(runs), "r", "w8", saving="joules_per_token").promoted
    assert promote(str(runs), "guessed", "w8", saving="disk_bytes").promoted
    with pytest.raises(LlmopsError, match="which no batch size changes"):
        promote(str(runs), "guessed", "w8", saving="disk_bytes", batch=8)
