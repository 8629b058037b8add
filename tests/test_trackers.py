"""report_to: what a recipe says, who is told what, and that nobody who is told can stop a run."""

import glob
import json
import struct
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from tests.runs import TUNED, recipe, workplace

import llmops
from llmops import trackers
from llmops.build.trace import KEPT, MOST, Trace
from llmops.errors import LlmopsError, RecipeError
from llmops.progress import Watcher
from llmops.recipe import parse_recipe
from llmops.recipe.plan import make_plan
from llmops.trackers import METRICS, PACKAGES, TRACKERS, Told, check_trackers, sinks, summary_of

VARIANTS = {"tuned": TUNED, "w8": {"from": "tuned", "quantize": {"method": "rtn", "scheme": "w8a16"}}}
FIGURES = {"loss": 2.5, "grad_norm": 0.7, "learning_rate": 1e-3, "tokens_per_s": 900.0, "tokens": 64.0, "energy_j": 3.0,
           "joules_per_token": 3 / 64}
ROW = {"quality": {"exact_match:test": {"value": {"value": 0.75}}, "perplexity:prose": {"value": {"value": None}}},
       "building": {"energy_j": {"value": 12.0}, "tokens": {"value": 640}}, "size": {"disk_bytes": {"value": 10}},
       "energy": {"1": {"joules_per_token": {"value": 0.5}}, "idle_watts": {"value": None}}, "latency": {}}
SUMMARY = {"score/exact_match/test": 0.75, "cost/building_joules": 12.0, "cost/building_tokens": 640.0,
           "cost/disk_bytes": 10.0, "cost/joules_per_token/batch_1": 0.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("place"))


def parsed(place, **more):
    return parse_recipe(recipe(VARIANTS, **more), base_dir=place)


def stage(variant="tuned", kind="finetune"):
    return SimpleNamespace(variant=variant, kind=kind, key="ab" * 32)


class Notes(Watcher):
    def __init__(self):
        super().__init__(quiet=True)
        self.notes, self.steps = [], []

    def note(self, text):
        self.notes.append(text)

    def log(self, step, figures):
        self.steps.append(step)


class Fake:
    """A tracker that remembers; it raises where it is asked to."""

    def __init__(self, raises=None):
        self.raises, self.runs, self.told, self.ended = raises, [], [], []

    def __call__(self, run):
        self._may_raise("open")
        self.runs.append(run)
        return Told(self.log, lambda figures: self.log("summary", figures), self.close)

    def log(self, step, figures):
        self._may_raise(step)
        self.told.append((step, dict(figures)))

    def close(self, ok):
        self._may_raise("close")
        self.ended.append(ok)

    def _may_raise(self, at):
        if self.raises == at:
            raise OSError("the network\nis gone")


@pytest.fixture
def fakes(monkeypatch):
    """Two trackers in the places of two real ones."""
    found = {"tensorboard": Fake(), "trackio": Fake()}
    for name, fake in found.items():
        monkeypatch.setitem(TRACKERS, name, fake)
        monkeypatch.setitem(PACKAGES, name, ("json",))
    return found


# ------------------------------------------------------------------------------------------------------- the recipe


def test_a_recipe_names_trackers_and_where_they_write(place):
    found = parsed(place, report_to=["wandb", "tensorboard", "wandb"], tracking={"project": "p", "folder": "there"})
    assert found.report_to == ("wandb", "tensorboard") and found.tracking.project == "p"
    assert parsed(place).report_to == () and parsed(place, report_to=None).tracking.folder is None


@pytest.mark.parametrize("more, phrases", [
    ({"report_to": ["tensorbord"]}, ['unknown tracker "tensorbord"', "mlflow", 'did you mean "tensorboard"']),
    ({"report_to": "wandb"}, ["expected a list", "write [wandb]"]),
    ({"report_to": [3]}, ["unknown tracker 3"]),
    ({"tracking": {"projekt": "x"}}, ['unknown key "projekt"', 'did you mean "project"']),
    ({"tracking": {"project": 3}}, ["tracking.project", "given 3"]),
    ({"tracking": {"api_key": "x"}}, ["names a secret"])])
def test_what_is_wrong_is_said(place, more, phrases):
    with pytest.raises(RecipeError) as error:
        parsed(place, **more)
    for phrase in phrases:
        assert phrase in str(error.value)


def test_trackers_are_in_no_key(place, tmp_path):
    def keys(**more):
        plan = make_plan(parsed(place, **more), tmp_path, [])
        return [(each.key, each.score_key) for each in plan.stages]

    assert keys() == keys(report_to=["mlflow"], tracking={"project": "other"})


def test_a_missing_package_stops_the_run_before_anything_is_done(place, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(LlmopsError, match=r'names wandb, and the package wandb is not installed.*llmops\[wandb\]'):
        llmops.run(parsed(place, report_to=["wandb"]), runs=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("store/*"))
    check_trackers(parsed(place))  # none named: nothing is missing


# ------------------------------------------------------------------------------------------------------ who is told


def test_a_run_tells_every_step_then_scores_and_costs(place, tmp_path, fakes):
    result = llmops.run(parsed(place, report_to=["tensorboard"]), runs=tmp_path / "runs")
    fake = fakes["tensorboard"]
    assert [run.name for run in fake.runs] == ["r/tuned"] and fake.ended == [True]  # quantizing is no training
    run, row = fake.runs[0], result.rows[1]
    assert run.key == row["identity"]["key"] and run.folder == tmp_path / "runs" / "r" / "tracking"
    assert run.config["rank"] == 4 and run.config["parent"] == "base" and run.project == "r"
    *steps, (last, summary) = fake.told
    assert [step for step, _ in steps] == [1, 2, 3, 4] and last == "summary"
    assert [[step, seen["train/loss"]] for step, seen in steps] == row["building"]["loss"]
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second"} <= set(steps[0][1])
    assert set(steps[0][1]) <= set(METRICS.values())
    assert summary["score/exact_match/test"] == row["quality"]["exact_match:test"]["value"]["value"]
    assert summary["cost/disk_bytes"] == row["size"]["disk_bytes"]["value"]
    assert [step for step, _ in row["building"]["trace"]["learning_rate"]] == [1, 2, 3, 4]
    assert len(row["building"]["attempts"]) == 1
    llmops.run(parsed(place, report_to=["tensorboard"]), runs=tmp_path / "runs")
    assert len(fake.runs) == 1  # all done: nobody is told again


@pytest.mark.parametrize("at", ["open", 2, "summary", "close"])
def test_a_tracker_that_raises_is_let_go_with_a_note(place, tmp_path, fakes, at):
    fakes["tensorboard"].raises = at
    watcher = Notes()
    with sinks(parsed(place, report_to=["tensorboard", "trackio"]), stage(), watcher, tmp_path) as told:
        for step in (1, 2, 3):
            told.log(step, FIGURES)
        told.summary(ROW)
    assert watcher.steps == [1, 2, 3]
    assert watcher.notes == ["  tensorboard is told nothing more: OSError: the network"]
    assert [step for step, _ in fakes["trackio"].told] == [1, 2, 3, "summary"] and fakes["trackio"].ended == [True]
    heard = {"open": 0, 2: 1, "summary": 3, "close": 4}[at]
    assert len(fakes["tensorboard"].told) == heard and not fakes["tensorboard"].ended


def test_a_training_that_fails_is_closed_as_failed(place, tmp_path, fakes):
    with pytest.raises(ValueError), sinks(parsed(place, report_to=["trackio"]), stage(), Notes(), tmp_path) as told:
        told.log(1, FIGURES)
        raise ValueError
    assert fakes["trackio"].ended == [False]


def test_the_summary_holds_what_is_known():
    assert summary_of(ROW) == SUMMARY and summary_of({}) == {}


def test_a_folder_of_ones_own_is_beside_the_recipe(place, tmp_path, fakes):
    with sinks(parsed(place, report_to=["trackio"], tracking={"folder": "there"}), stage(), Notes(), tmp_path):
        pass
    assert fakes["trackio"].runs[0].folder == place / "there"


# ------------------------------------------------------------------------------------------------- the real ones


def told_for_real(name, place, folder, steps=(1, 2, 3), **more):
    watcher = Notes()
    with sinks(parsed(place, report_to=[name], **more), stage(), watcher, folder) as told:
        for step in steps:
            told.log(step, {**FIGURES, "loss": 10.0 - step, **({"held_out_loss": 4.0} if step == 2 else {})})
        told.summary(ROW)
    assert watcher.notes == []


def needs(name):
    lost = [package for package in PACKAGES[name] if find_spec(package) is None]
    if lost:
        pytest.skip(f"{lost[0]} is not installed")


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_it_back_also_after_going_on(place, tmp_path):
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told_for_real("tensorboard", place, tmp_path)
    told_for_real("tensorboard", place, tmp_path, steps=(3, 4))  # went on from the checkpoint of step 2
    told_for_real("tensorboard", place, tmp_path, steps=())  # built already, scored again: purges nothing
    events = EventAccumulator(str(tmp_path / "tracking" / "tensorboard" / "tuned"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(1, 9), (2, 8), (3, 7), (4, 6)]
    assert [(each.step, each.value) for each in events.Scalars("eval/loss")] == [(2, 4)]
    assert events.Scalars("score/exact_match/test")[-1].value == 0.75
    assert set(events.Tags()["scalars"]) == {*METRICS.values(), *SUMMARY}


@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_it_back_in_one_run_also_after_going_on(place, tmp_path, monkeypatch):
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    told_for_real("mlflow", place, tmp_path, tracking={"project": "mine"})
    told_for_real("mlflow", place, tmp_path, steps=(4,), tracking={"project": "mine"})
    client = MlflowClient(f"sqlite:///{tmp_path / 'tracking' / 'mlflow.db'}")
    run, = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "r/tuned" and run.info.status == "FINISHED" and run.data.params["rank"] == "4"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(1, 9), (2, 8), (3, 7), (4, 6)]
    assert run.data.metrics["score/exact_match/test"] == 0.75 and run.data.metrics["eval/loss"] == 4.0


@pytest.mark.filterwarnings("ignore")
def test_trackio_reads_it_back_and_prints_nothing(place, tmp_path, monkeypatch, capsys):
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    told_for_real("trackio", place, tmp_path)
    from trackio.sqlite_storage import SQLiteStorage

    assert capsys.readouterr().out == ""
    logs = SQLiteStorage.get_logs("r", "r/tuned")
    assert [(each["step"], each["train/loss"]) for each in logs if "train/loss" in each] == [(1, 9), (2, 8), (3, 7)]
    assert logs[-1]["score/exact_match/test"] == 0.75


def wandb_records(data, at=7):
    """The records of a .wandb file: blocks of 32 KiB, each piece with checksum (4), length (2) and kind (1)."""
    part = b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4:at + 7])
        part, at = part + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield part
            part = b""


def named(item):
    return "/".join(item.nested_key) or item.key


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_an_offline_run(place, tmp_path, monkeypatch, capfd):
    needs("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    told_for_real("wandb", place, tmp_path)
    from wandb.proto import wandb_internal_pb2

    file, = glob.glob(str(tmp_path / "tracking" / "wandb" / "offline-run-*" / "*.wandb"))
    records, give_up = [], time.monotonic() + 30
    while not any(each.HasField("exit") for each in records) and time.monotonic() < give_up:
        time.sleep(0.05)  # another process writes the file
        with open(file, "rb") as stream:
            records = [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(stream.read())]
    run, = (each.run for each in records if each.HasField("run"))
    steps = [{named(item): item.value_json for item in each.history.item} for each in records
             if each.HasField("history")]
    summary = {named(item): item.value_json for each in records for item in each.summary.update}
    assert run.display_name == "r/tuned" and run.project == "r"
    assert [(each["_step"], json.loads(each["train/loss"])) for each in steps] == [("1", 9), ("2", 8), ("3", 7)]
    assert json.loads(summary["score/exact_match/test"]) == 0.75
    assert capfd.readouterr().out == ""


# ----------------------------------------------------------------------------------------------------------- the trace


def test_a_trace_stays_short_keeps_both_ends_and_passes_on(tmp_path):
    heard = []
    trace = Trace(tmp_path / "trace.json", lambda step, figures: heard.append(step))
    for step in range(1, 5001):
        trace.log(step, {"energy_j": 2.0 * step, "learning_rate": 0.1, "loss": 1.0})
    found = trace.as_dict()
    assert set(found) == {"energy_j", "learning_rate"} and set(found) < set(KEPT)
    assert len(found["energy_j"]) <= MOST and found["energy_j"][0] == [1, 2.0] and found["energy_j"][-1] == [5000, 1e4]
    assert heard == list(range(1, 5001))
    assert Trace(tmp_path / "none.json").as_dict() == {}


def test_a_trace_goes_on_where_the_checkpoint_is(tmp_path, monkeypatch):
    monkeypatch.setattr("llmops.build.trace.EVERY_S", 0.0)
    first = Trace(tmp_path / "trace.json")
    for step in range(1, 8):
        first.log(step, {"energy_j": float(step)})
    second = Trace(tmp_path / "trace.json")  # killed after step 7, the checkpoint is that of step 5
    for step in range(6, 10):
        second.log(step, {"energy_j": 100.0 + step})
    assert second.as_dict()["energy_j"] == [[1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 106], [7, 107], [8, 108],
                                            [9, 109]]
    (tmp_path / "trace.json").write_text("{")
    third = Trace(tmp_path / "trace.json")
    third.log(3, {"energy_j": 1.0})
    assert third.as_dict()["energy_j"] == [[3, 1.0]]
