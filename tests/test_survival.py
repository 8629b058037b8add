"""What a run survives: two at once, failed attempts, full disks, signals, several ranks, and SIGKILL at any moment."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from benchmarks.kill_test import kill_test
from tests.runs import TUNED, recipe, workplace

import llmops
from llmops.build import variant as build
from llmops.build.attempts import Attempts
from llmops.errors import StepError
from llmops.ledger import Ledger
from llmops.locks import Locks
from llmops.measure.meter import Window
from llmops.quantity import Quantity
from llmops.recipe import parse_recipe
from llmops.recipe.keys import why
from llmops.runner import plan
from llmops.store import Store, replace_file

ROOT = Path(__file__).parent.parent
DECLARED = {"sensor": "declared", "watts": 10, "prompt_tokens": 8, "new_tokens": 2, "batch_sizes": [1], "repeats": 2}
W4 = {"from": "tuned", "quantize": {"method": "rtn", "scheme": "w4a16"}}
MAG = {"prune": {"method": "magnitude", "sparsity": 0.5}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("place"))


def written(place: Path, path: Path, variants: dict, **more) -> Path:
    """A recipe file over the workplace."""
    body = recipe(variants, **more)
    body["model"] = str(place / "model")
    for source in body["data"].values():
        if "source" in source:
            source["source"] = str(place / source["source"])
    path.write_text(yaml.safe_dump(json.loads(json.dumps(body))))  # no anchors
    return path


def tune(path: Path, runs: Path, *more: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT / "kernels")))
    return subprocess.Popen([sys.executable, *prefix, "-m", "llmops", "tune", str(path), "--runs", str(runs), *more],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": paths})


def states(rows) -> dict[str, str]:
    return {row["identity"]["variant"]: row["status"]["state"] for row in rows}


def left_over(runs: Path) -> list[Path]:
    return [path for path in runs.rglob("*") if path.name.startswith(".") or path.suffix in (".work", ".lock", ".beat")]


# --------------------------------------------------------------------------------------------------- two at once


@pytest.mark.slow
@pytest.mark.parametrize("names", [("r", "r"), ("r", "s")], ids=["the same recipe", "a shared prefix"])
def test_two_runs_on_one_store_build_and_score_everything_once(place, tmp_path, names):
    runs = tmp_path / "runs"
    variants = [{"tuned": TUNED, "w4": W4}, {"tuned": TUNED, "w4": W4} if names[1] == "r" else {
        "tuned": TUNED, "w8": {"from": "tuned", "quantize": {"method": "rtn", "scheme": "w8a16"}}}]
    paths = [written(place, tmp_path / f"{number}.yaml", each, name=name)
             for number, (name, each) in enumerate(zip(names, variants, strict=True))]
    children = [tune(path, runs) for path in paths]
    ends = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], ends
    rows = Ledger(runs / "ledger.db").history()
    expected = ["base", "tuned", "w4"] if names[1] == "r" else ["base", "base", "tuned", "tuned", "w4", "w8"]
    assert sorted(row["identity"]["variant"] for row in rows) == expected
    assert all(row["status"]["state"] == "ok" for row in rows)
    logs = "".join(path.read_text() for path in runs.glob("*/log.txt"))
    for name in set(expected) - {"base"}:
        assert logs.count(f"build {name}: ") == 2, name  # its begin and its end
    for name in set(expected):
        assert logs.count(f"] score {name}\n") == logs.count(f"] score {name}: done after ") == 1, name
    assert not left_over(runs)


@pytest.mark.slow
def test_what_another_process_builds_is_put_aside_and_waited_for(place, tmp_path):
    runs = tmp_path / "runs"
    path = written(place, tmp_path / "r.yaml", {"tuned": TUNED, "mag": MAG, "w4": W4})
    stage = plan(path, runs=runs).stage("tuned")
    lock = Locks(Store(runs).builds).take(stage.key)
    assert lock is not None
    lines: list[str] = []
    with lock, tune(path, runs) as child:
        reader = threading.Thread(target=lambda: lines.extend(child.stderr))
        reader.start()
        _wait_for(lambda: any("waiting for" in line for line in lines))
        assert f"waiting for {os.getpid()} on " in lines[-1] and ": building tuned since " in lines[-1]
        assert states(Ledger(runs / "ledger.db").rows()) == {"base": "ok", "mag": "ok"}
        child.send_signal(signal.SIGINT)
        reader.join()
    assert child.returncode == 130 and "interrupted" in lines[-1]
    result = llmops.run(path, runs=runs)
    assert states(result.rows) == dict.fromkeys(["base", "tuned", "mag", "w4"], "ok")
    assert not left_over(runs)


def test_a_ledger_takes_rows_from_several_processes_at_once(tmp_path):
    script = ("import sys\nfrom llmops.ledger import Ledger\n"
              "for number in range(25):\n"
              "    Ledger(sys.argv[1]).append({'identity': {'run': sys.argv[2], 'variant': str(number), 'key': 'k',\n"
              "        'utc': 'now'}, 'status': {'state': 'ok'}}, {'score': [{'n': number}]})")
    children = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "ledger.db"), name], text=True,
                                 stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
                for name in ("a", "b", "c")]
    ends = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], ends
    assert len(Ledger(tmp_path / "ledger.db").history()) == 75


# ------------------------------------------------------------------------------------------------ failed attempts


def test_a_failed_attempt_is_paid_for_by_the_one_that_succeeds(place, tmp_path, monkeypatch):
    def fails(job, options):
        until = time.perf_counter() + 0.05
        while time.perf_counter() < until:
            job.progress(0, 1, "")
        raise StepError("not this time")

    runs, body = tmp_path / "runs", parse_recipe(recipe({"tuned": TUNED}, measure=DECLARED), base_dir=place)
    monkeypatch.setitem(build.STEPS, ("finetune", "lora"), fails)
    first = llmops.run(body, runs=runs)
    assert states(first.rows) == {"base": "ok", "tuned": "failed"} and first.exit_code == 3
    before = why("tuned", plan(body, runs=runs), Ledger(runs / "ledger.db").history())
    monkeypatch.undo()
    second = llmops.run(body, runs=runs)
    building = second.rows[1]["building"]
    parts = building["attempts"]
    assert len(parts) == 2 and parts[0]["wall_s"] > 0.05 and parts[0]["energy_j"] > 0.5
    assert building["energy_j"]["value"] == pytest.approx(sum(part["energy_j"] for part in parts))
    assert building["wall_s"]["value"] == pytest.approx(sum(part["wall_s"] for part in parts))
    assert "2 attempts" in building["energy_j"]["method"]
    assert "not this time" in str(first.rows[1]["status"]) and not left_over(runs)
    after = why("tuned", plan(body, runs=runs), Ledger(runs / "ledger.db").history())
    assert before["variant"] == after["variant"] == "tuned"
    assert not any("attempt" in line for line in after["lines"])


class _Meter(Window):
    def __init__(self, wall_s: float, joules: float | None) -> None:
        super().__init__("w")
        self.wall_s = wall_s
        self.energy = (Quantity.null("J", "the counter did not advance") if joules is None
                       else Quantity.measured(joules, "J", "sensor"))


@pytest.mark.parametrize(("attempts", "joules", "provenance"), [
    ([(2.0, 20.0)], 20.0, "measured"),
    ([(1.0, 8.0), (3.0, 32.0)], 40.0, "measured"),
    ([(0.5, None), (2.0, 20.0)], 25.0, "estimated"),
    ([(2.0, 20.0), (0.5, None)], 25.0, "estimated"),
    ([(0.5, None), (0.5, None)], None, "null"),
])
def test_attempts_add_up(tmp_path, attempts, joules, provenance):
    for wall_s, energy in attempts:
        with Attempts(tmp_path / "work", _Meter(wall_s, energy)) as under_way:
            pass
    spent = under_way.total()
    assert (spent.energy_j.value, spent.energy_j.provenance) == (pytest.approx(joules), provenance)
    assert spent.wall_s.value == sum(wall for wall, _ in attempts)
    assert [part["energy_j"] for part in spent.attempts] == [energy for _, energy in attempts]


# ------------------------------------------------------------------------------------------------------ full disks


def test_a_full_disk_fails_at_the_first_checkpoint_and_the_same_command_goes_on(place, tmp_path):
    runs, body = tmp_path / "runs", parse_recipe(recipe({"tuned": TUNED}), base_dir=place)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # the kernel refuses to write more: EFBIG
    try:
        first = llmops.run(body, runs=runs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert states(first.rows) == {"base": "ok", "tuned": "failed"} and first.exit_code == 3
    reason = first.rows[1]["status"]["reason"]
    assert "step-000001: the checkpoint could not be written" in reason and "free some disk" in reason
    second = llmops.run(body, runs=runs)
    assert states(second.rows) == {"base": "ok", "tuned": "ok"}
    assert second.rows[0]["row_id"] == first.rows[0]["row_id"] and not left_over(runs)


def test_a_disk_too_full_for_the_row_names_the_first_error(place, tmp_path, monkeypatch):
    def full(*given):
        raise llmops.StoreError("the ledger is full too")

    def fails(job, options):
        monkeypatch.setattr(Ledger, "append", full)
        raise llmops.StoreError("no space for the checkpoint")

    body = parse_recipe(recipe({"tuned": TUNED}), base_dir=place)
    monkeypatch.setitem(build.STEPS, ("finetune", "lora"), fails)
    with pytest.raises(llmops.StoreError, match="no space for the checkpoint"):
        llmops.run(body, runs=tmp_path / "runs")
    monkeypatch.undo()
    assert states(llmops.run(body, runs=tmp_path / "runs").rows) == {"base": "ok", "tuned": "ok"}


def test_a_file_is_replaced_whole_and_leaves_of_dead_processes_go(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / f".page.html.{child.pid}").write_text("half")
    (tmp_path / f".page.html.{os.getppid()}").write_text("of a process that lives")
    replace_file(tmp_path / "page.html", "whole")
    assert (tmp_path / "page.html").read_text() == "whole\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".page.html.{os.getppid()}", "page.html"]


# --------------------------------------------------------------------------------------------- signals and kills


@pytest.mark.slow
def test_sigterm_ends_in_order_with_143_and_the_next_run_goes_on(place, tmp_path):
    runs = tmp_path / "runs"
    path = written(place, tmp_path / "r.yaml", {"tuned": {"finetune": {**TUNED["finetune"], "max_steps": 4000}}},
                   runtime={"checkpoint_s": 0.01})
    child = tune(path, runs)
    _wait_for(lambda: list((runs / "store").glob("*.work/checkpoints/step-*")))
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 143 and "terminated; what was finished is kept" in errors, errors
    assert "Traceback" not in errors
    kept = left_over(runs)
    assert [path.suffix for path in kept] == [".work"]
    names = {each.name for each in kept[0].iterdir()} - {"trace.json"}  # written now and then: a slow machine has one
    assert names == {"attempt-0000.json", "checkpoints"}
    assert states(Ledger(runs / "ledger.db").rows()) == {"base": "ok"}


@pytest.mark.slow
def test_killed_at_four_moments_the_end_is_that_of_a_quiet_run(tmp_path):
    rounds = kill_test(4, tmp_path)
    assert [fault for each in rounds for fault in each.faults] == []
    assert sum(len(each.moments) for each in rounds) == 4


# ---------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.slow
def test_torchrun_trains_on_two_ranks_what_one_process_trains(place, tmp_path):
    """The same variants, each scored once by rank 0, with the losses of one process.

    `again` begins with weights that were stored in bfloat16, where a sum in another order may have fallen to the other
    side: its losses agree less closely.
    """
    path = written(place, tmp_path / "r.yaml", {"tuned": TUNED, "w4": W4, "again": {**TUNED, "from": "tuned"}})
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    child = tune(path, tmp_path / "two", "--json", prefix=torchrun)
    out, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    assert out.count('"row_id"') == 4  # printed by one rank
    two = Ledger(tmp_path / "two" / "ledger.db").history()
    assert states(two) == dict.fromkeys(["base", "tuned", "w4", "again"], "ok") and len(two) == 4
    one = llmops.run(path, runs=tmp_path / "one")
    for row, other in zip(one.rows, sorted(two, key=lambda row: row["row_id"]), strict=True):
        assert row["identity"]["key"] == other["identity"]["key"]
        close = 1e-3 if row["identity"]["variant"] == "again" else 1e-4
        assert [loss for _, loss in row["building"]["loss"]] == pytest.approx(
            [loss for _, loss in other["building"]["loss"]], rel=close)
    assert not left_over(tmp_path / "two")


def _wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.05)
