"""Budgets: read, refused when the plan needs more, stopped when reached, gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.runs import TUNED, recipe, workplace
from tests.twins import twin

from llmops import spending
from llmops.cli import main
from llmops.errors import BudgetReached, LlmopsError, RecipeError
from llmops.measure.budget import limits, noted
from llmops.measure.options import Budget
from llmops.planner import plan
from llmops.quantity import Quantity
from llmops.recipe import parse_recipe
from llmops.recipe.energy_estimate import BEST_FLOP_PER_J, BUILTIN_TOKENS_A_ROW, energy, likely_tokens, rest
from llmops.recipe.scoring_estimate import CHOICES, COMPARED_TOKENS, measuring_flops, scoring_tokens
from llmops.runner import run

DECLARED = {"sensor": "declared", "watts": 1000, "prompt_tokens": 8, "new_tokens": 2, "batch_sizes": [1], "repeats": 2}
W8 = {"w8": {"quantize": {"method": "rtn", "scheme": "w8a16"}}}
LONG = {"tuned": {"finetune": {**TUNED["finetune"], "max_steps": 24}}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("budget"))


def asked(place: Path, variants: Any = LONG, **more: Any) -> Any:
    return parse_recipe(recipe(variants, **{"measure": DECLARED, **more}), base_dir=place)


def test_the_tighter_bound_holds() -> None:
    grid = Quantity(400.0, "gCO2e/kWh", "constant", "grid")
    assert limits(Budget(energy_kwh=0.5), None) == (1.8e6, "budget.energy_kwh: 0.5")
    most, said = limits(Budget(energy_kwh=0.5, carbon_g=100.0), grid)
    assert most == pytest.approx(0.9e6) and "carbon_g: 100 (at 400" in said
    with pytest.raises(LlmopsError, match="intensity is not known: night"):
        limits(Budget(carbon_g=1.0), Quantity.null("gCO2e/kWh", "night"))


@pytest.mark.parametrize("budget, measure, said", [
    ({}, {}, "a budget needs energy_kwh or carbon_g"), ({"energy_kwh": 0}, {}, "above 0"),
    ({"carbon_g": 5}, {}, "no grid; expected measure.zone"), ({"energy_kwh": 1}, {"sensor": "none"}, "sensor: none"),
    ({"kwh": 1}, {}, "energy_kwh"), ({"carbon_g": 5}, {"zone": "FRX"}, 'zone "FRX" has no')])
def test_bad_budgets_are_refused(place: Path, budget: Any, measure: Any, said: str) -> None:
    with pytest.raises(RecipeError, match="expected|budget: {energy_kwh") as caught:
        asked(place, budget=budget, measure=measure)
    assert said in str(caught.value)


def test_a_plan_over_its_budget_is_refused_before_anything(place: Path, tmp_path: Path, capsys: Any) -> None:
    body = recipe(LONG, name="over", measure=DECLARED, budget={"energy_kwh": 1e-13})
    (place / "over.yaml").write_text(json.dumps(body))
    for command in ("plan", "tune"):
        assert main([command, str(place / "over.yaml"), "--runs", str(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert "budget.energy_kwh: 1e-13 is not enough" in told and "no machine exceeds" in told
    assert not (tmp_path / "store").exists() and main(["validate", str(place / "over.yaml")]) == 0


def test_the_estimate_is_work_times_the_rate_of_earlier_builds(place: Path, tmp_path: Path) -> None:
    made = plan(asked(place), runs=tmp_path)
    parameters = made.stage("tuned").estimate.parameters.value
    rows = likely_tokens(made.recipe, ["train"])
    assert parameters is not None and rows is not None and rows == pytest.approx(
        (place / "train.jsonl").stat().st_size / 4)
    work = 4 * parameters * 24 * 8 * rows / 64  # steps x rows of a batch
    floor = rest(made)
    assert floor.parts["building"] == pytest.approx(work / BEST_FLOP_PER_J, rel=1e-6)
    assert floor.total().method.startswith("at least") and floor.floors == ["scoring", "measuring", "tuned"]
    earlier = [{"transform": {"kind": "finetune", "method": method}, "building": {
        "energy_j": {"value": joules}, "flops": {"value": 1e9}}} for method, joules in (("lora", 5.0), ("full", 9.0))]
    assert rest(made, earlier).parts["building"] == pytest.approx(5e-9 * work, rel=1e-6)
    assert rest(made, earlier[1:]).parts["building"] == pytest.approx(9e-9 * work, rel=1e-6)  # another training


def test_scoring_and_measuring_are_part_of_the_estimate(place: Path, tmp_path: Path) -> None:
    made = plan(asked(place), runs=tmp_path)
    recipe_, parameters = made.recipe, made.stage("tuned").estimate.parameters.value
    assert parameters is not None
    data = [likely_tokens(recipe_, [name]) or 0.0 for name in ("test", "prose")]
    assert scoring_tokens(recipe_, "base", likely_tokens) == (sum(data), [])
    assert scoring_tokens(recipe_, "tuned", likely_tokens)[0] == sum(data) + 3 * COMPARED_TOKENS
    options = recipe_.measure
    assert options is not None
    # 2 (P + P_base) x repeats x batch x tokens
    assert measuring_flops(options, 10.0, 6.0) == 2 * 16 * 2 * 1 * (2 * 8 + 2)
    found = rest(made)
    assert found.parts["scoring"] == pytest.approx(
        2 * parameters * (2 * sum(data) + 3 * COMPARED_TOKENS) / BEST_FLOP_PER_J, rel=0.01)
    told = energy(made).method
    assert "building" in told and "scoring" in told and "measuring" in told
    earlier = [{"building": {"evaluate_energy_j": {"value": 3.0}, "evaluate_flops": {"value": 1e9},
                             "measure_energy_j": {"value": 7.0}, "measure_flops": {"value": 1e9}}}]
    known = rest(made, earlier)
    assert known.parts["scoring"] == pytest.approx(found.parts["scoring"] * BEST_FLOP_PER_J * 3e-9)
    assert known.parts["measuring"] == pytest.approx(found.parts["measuring"] * BEST_FLOP_PER_J * 7e-9)
    longer = plan(asked(place, measure={**DECLARED, "window_s": 2.0, "idle_s": 1.0}), runs=tmp_path)
    assert rest(longer).parts["measuring"] == 2 * 1000 * (8 * 2.0 + 2 * 1.0)  # variants x W x (windows + idle)


def test_scores_of_every_kind_have_likely_tokens(place: Path) -> None:
    text = {"data": "prose", "context": 64}
    body = recipe(W8, evaluate=[{"perplexity": {**text, "stride": 16}}, {"harness": {"tasks": ["everyday"]}}])
    found, without = scoring_tokens(parse_recipe(body, base_dir=place), "base", likely_tokens)
    assert found == pytest.approx(4 * (place / "prose.txt").stat().st_size / 4)
    assert without == ["harness:everyday (lm-eval brings its data)"]
    few = recipe(W8, evaluate=[{"perplexity": {**text, "max_tokens": 64}}])
    assert scoring_tokens(parse_recipe(few, base_dir=place), "base", likely_tokens)[0] == 64
    picks = recipe(W8, evaluate=[{"multiple_choice": {"data": "picks"}}])
    picks["data"]["picks"] = {"source": "builtin:choices", "samples": 10}
    found, _ = scoring_tokens(parse_recipe(picks, base_dir=place), "base", likely_tokens)
    assert found == 10 * BUILTIN_TOKENS_A_ROW * CHOICES


def test_a_harness_task_of_ones_own_is_counted(place: Path) -> None:
    folder = shutil.copytree(Path(__file__).parent.parent / "recipes" / "tasks", place / "tasks")
    body = recipe(W8, evaluate=[{"harness": {"tasks": ["everyday", "arc_easy"], "include": "tasks"}}])

    def tokens(**more: Any) -> float:
        body["evaluate"][0]["harness"].update(more)
        found, without = scoring_tokens(parse_recipe(body, base_dir=place), "base", likely_tokens)
        assert without == ["harness:arc_easy (lm-eval brings its data)"]
        return found

    rows = [json.loads(line) for line in (folder / "everyday.jsonl").read_text().splitlines()]
    _, tokenizer = twin("llama")
    truly = sum(len(tokenizer(f"Question: {row['question']}\nAnswer: {choice}").input_ids)
                for row in rows for choice in row["choices"])
    whole = tokens()
    assert 0.4 < whole / truly < 2.5
    assert tokens(limit=5) == pytest.approx(whole * 5 / len(rows))
    assert tokens(shots=2) == pytest.approx(3 * whole * 5 / len(rows))
    (folder / "everyday.yaml").write_text("task: everyday\nprocess: !function utils.f\n")
    with pytest.raises(AssertionError, match="everyday"):
        tokens()


def test_a_plan_that_only_scoring_makes_too_dear_is_refused(place: Path, tmp_path: Path, capsys: Any) -> None:
    body = recipe(W8, name="dear", measure={**DECLARED, "window_s": 60.0}, budget={"energy_kwh": 0.01})
    (place / "dear.yaml").write_text(json.dumps(body))
    assert main(["plan", str(place / "dear.yaml"), "--runs", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "is not enough" in said and "measuring 9.6e+05 J" in said
    assert main(["plan", str(place / "dear.yaml"), "--runs", str(tmp_path), "--set", "budget.energy_kwh=1"]) == 0
    assert "building" in (out := capsys.readouterr().out) and "scoring" in out and "measuring" in out


def test_rows_of_builtin_data_are_about_as_long_as_assumed() -> None:
    from llmops.data.options import Limits
    from llmops.data.render import encode
    from llmops.data.sources import load_rows
    from llmops.models.load import load

    made = parse_recipe({**recipe(W8, model="builtin:tiny", evaluate=[]), "data": {"d": {"source": "builtin:facts"}}})
    rows = load_rows("d", made.data, made.base_dir, 0)
    encoded = encode(rows, load("builtin:tiny")[1], max_length=512, limits=Limits()).examples
    mean = sum(len(each["input_ids"]) for each in encoded) / len(encoded)
    assert 0.5 < mean / BUILTIN_TOKENS_A_ROW < 2


def test_a_run_stops_at_its_budget_keeps_its_state_and_goes_on(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(spending, "EVERY_S", 0.0)
    calls: list[int] = []
    look = spending.Spending.check

    def check(self: Any) -> None:
        calls.append(1)
        if len(calls) == 20 and self.most_j < 1e9:  # in the middle of whatever is under way
            self.most_j = 0.0
        look(self)

    monkeypatch.setattr(spending.Spending, "check", check)
    small, large = (asked(place, evaluate=[], measure=DECLARED, budget={"energy_kwh": kwh}) for kwh in (0.25, 1000.0))
    with pytest.raises(BudgetReached, match="budget reached: .* of budget.energy_kwh: 0.25 are spent") as caught:
        run(small, runs=tmp_path)
    assert caught.value.exit_code == 4
    before = noted(tmp_path / "r" / "spent")
    assert before > 0
    result = run(large, runs=tmp_path)
    assert result.exit_code == 0 and noted(tmp_path / "r" / "spent") > before
    assert len(list((tmp_path / "r" / "spent").glob("attempt-*.json"))) == 2


def test_a_training_writes_a_checkpoint_before_it_stops(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(spending, "EVERY_S", 0.0)
    look = spending.Spending.check

    def check(self: Any) -> None:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 12 and self.most_j < 1e9:
            self.most_j = 0.0
        look(self)

    monkeypatch.setattr(spending.Spending, "check", check)
    body = {"tuned": {"score": False, **LONG["tuned"]}}
    with pytest.raises(BudgetReached):
        run(asked(place, body, evaluate=[], measure=None, budget={"energy_kwh": 0.25},
                  runtime={"checkpoint_s": 1e6}), runs=tmp_path)
    kept = [path.name for path in tmp_path.glob("store/*.work/checkpoints/step-*")]
    assert kept and int(kept[0].removeprefix("step-")) > 1  # beside the first, which is always written


def test_without_a_sensor_nothing_is_started(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from llmops.measure import sensors

    monkeypatch.setattr(sensors, "SENSORS", {})
    with pytest.raises(LlmopsError, match="energy cannot be known here"):
        run(asked(place, measure=None, budget={"energy_kwh": 1.0}), runs=tmp_path)
    assert not list((tmp_path / "store").glob("*"))


def test_a_sensor_that_dies_ends_the_run(tmp_path: Path, monkeypatch: Any, place: Path) -> None:
    from tests.measure.replay import ReplaySensor

    from llmops.measure.meter import Meter
    from llmops.store import Store

    readings = iter([{"cpu": 0.0}, {"cpu": 5.0}])
    meter = Meter(ReplaySensor(lambda: next(readings)))
    monkeypatch.setattr(spending, "BLIND_S", -1.0)
    made = plan(asked(place), runs=tmp_path)
    with pytest.raises(BudgetReached, match="energy is no longer known"), spending.Spending(
            made, Store(tmp_path), meter, Budget(energy_kwh=1.0), None) as spent:
        spent.check()
