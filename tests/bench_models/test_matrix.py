"""The matrix over a runtime that plays back times: figures that are known beforehand, resuming, refusals."""

import csv
import io
import json
import sys
import types
from dataclasses import replace

import pytest
from pyarrow import parquet

from llmops.bench_models import matrix as matrices
from llmops.bench_models import runtimes
from llmops.bench_models.arms import Arm, arms, fingerprint
from llmops.bench_models.join import joined
from llmops.bench_models.matrix import Matrix, run_matrix
from llmops.bench_models.pair import different_tokens, shared_prompts
from llmops.bench_models.runtimes import Opened
from llmops.bench_models.tables import flat, lines, read, write
from llmops.cli import main
from llmops.errors import LlmopsError, ModelError
from llmops.measure.options import MeasureOptions
from llmops.measure.workload import Timing

PIECES = [f"t{number}" for number in range(40)]
OPTIONS = MeasureOptions(new_tokens=5, repeats=3, sensor="none")


class Playing:
    """Says that a prefill took `first` s and every further token `step` s."""

    def __init__(self, first, step, timed=True):
        self.first, self.step, self.timed, self.asked = first, step, timed, []

    def prefill(self, prompt):
        return None

    def sync(self):
        return None

    def request(self, prompt, new_tokens):
        self.asked.append((tuple(prompt.shape), new_tokens, prompt.sum().item()))
        steps = [self.step] * (new_tokens - 1)
        return Timing(self.first, sum(steps), steps if self.timed else [])


@pytest.fixture
def played(monkeypatch):
    """name -> (first, step, changes of Opened); what is opened is listed."""
    known, opened = {}, []

    def play(runtime, wanted):
        opened.append(wanted.model)
        if wanted.model not in known:
            raise ModelError(f"{wanted.model}: is broken")
        first, step, changes = known[wanted.model]
        timed = changes.pop("timed", True) if "timed" in changes else True
        return replace(Opened(Playing(first, step, timed), "cpu", PIECES, {0, 1}), **changes)

    monkeypatch.setattr(matrices, "opened", play)
    return known, opened


def arm(name):
    return Arm(name, "transformers", name, name * 8)


def matrix(names, reference, **more):
    return Matrix([arm(name) for name in names], reference, more.pop("batches", [1, 4]), more.pop("contexts", [16]),
                  more.pop("options", OPTIONS), **more)


def test_ratios_are_those_of_the_times_and_each_cell_is_beside_the_reference(played, tmp_path):
    known, _ = played
    known |= {"slow": (0.2, 0.04, {}), "fast": (0.1, 0.01, {})}
    cells = run_matrix(matrix(["fast", "slow"], "slow"), tmp_path)
    assert [(cell["arm"]["name"], cell["batch"]) for cell in cells] == [("slow", 1), ("slow", 4), ("fast", 1),
                                                                        ("fast", 4)]
    fast = cells[3]["latency"]
    assert fast["speed_ratio_to_base"]["value"] == pytest.approx(4.0)
    assert fast["decode_tokens_per_s"]["value"] == pytest.approx(4 / 0.01)
    assert fast["prefill_tokens_per_s"]["value"] == pytest.approx(4 * 16 / 0.1)
    assert fast["inter_token_ms_p50"]["value"] == pytest.approx(10.0)
    assert cells[0]["latency"]["aa_speed_ratio"]["value"] == pytest.approx(1.0)
    assert cells[0]["latency"]["speed_ratio_to_base"]["value"] is None
    assert cells[3]["energy"]["ratio_to_base"]["value"] is None and cells[3]["energy"]["saving"] == "unmeasured"
    assert "no sensor" in cells[3]["energy"]["ratio_to_base"]["method"]
    orders = [block["arm"] for block in cells[3]["blocks"]]
    assert sorted(orders) == ["arm"] * 3 + ["reference"] * 3
    assert all({orders[place], orders[place + 1]} == {"arm", "reference"} for place in range(0, 6, 2))


def test_zeros_of_a_variant_or_of_its_parent_are_marked(played, tmp_path):
    known, _ = played
    for name, record in (("sparse", {"kind": "prune", "method": "wanda", "options": {}}),
                         ("healed", {"kind": "finetune", "method": "lora", "parent_key": "sparse"}),
                         ("plain", {"kind": "finetune", "method": "lora", "parent_key": None})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "llmops.json").write_text(json.dumps(record))
        known[str(tmp_path / name)] = (0.1, 0.01, {})
    made = Matrix([Arm(name, "transformers", str(tmp_path / name), name) for name in ("plain", "sparse", "healed")],
                  "plain", [1], [16], OPTIONS)
    for _ in range(2):  # measured, and read again
        cells = run_matrix(made, tmp_path / "out")
        assert ["no time" in flat(cell)["notes"] for cell in cells] == [False, True, True]
        told = lines(cells)
        assert [line.split("  ")[0] for line in told[1:4]] == ["plain", "sparse †", "healed †"]
        assert told[4].startswith("† zeros in dense tensors: no time saved")


def test_energy_is_the_sensors(played, tmp_path):
    known, _ = played
    known |= {"slow": (0.2, 0.04, {}), "fast": (0.1, 0.01, {})}
    options = OPTIONS.model_copy(update={"sensor": "declared", "watts": 50.0, "window_s": 0.01})
    cell = run_matrix(matrix(["slow", "fast"], "slow", options=options, batches=[1]), tmp_path)[1]
    ratio = cell["energy"]["ratio_to_base"]
    assert ratio["provenance"] == "estimated" and ratio["ci95"][0] < ratio["value"] < ratio["ci95"][1]
    assert flat(cell)["joules_per_token"] > 0


def test_a_matrix_that_was_stopped_goes_on_at_its_cell(played, tmp_path, monkeypatch):
    known, opened = played
    known |= {"a": (0.2, 0.04, {}), "b": (0.1, 0.01, {})}
    measured = []
    real = matrices.measure_pair

    def stops(*args, **options):
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(matrices, "measure_pair", stops)
    with pytest.raises(KeyboardInterrupt):
        run_matrix(matrix(["a", "b"], "a"), tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 2
    first = run_matrix(matrix(["a", "b"], "a"), tmp_path)
    assert len(measured) == 5  # the one that was stopped, and the one after it
    del opened[:]
    assert run_matrix(matrix(["a", "b"], "a"), tmp_path) == first
    assert opened == [] and len(measured) == 5  # nothing is opened where nothing is missing
    run_matrix(matrix(["a", "b"], "a", seed=1, batches=[1]), tmp_path)
    assert len(measured) == 7
    damaged = next((tmp_path / "cells").iterdir())
    damaged.write_text("{")
    run_matrix(matrix(["a", "b"], "a"), tmp_path)
    run_matrix(matrix(["a", "b"], "a", seed=1, batches=[1]), tmp_path)
    assert len(measured) == 8


def test_what_fails_is_written_down_and_tried_again(played, tmp_path):
    known, opened = played
    known |= {"a": (0.2, 0.04, {}), "small": (0.1, 0.01, {"context": 18, "batches": 1})}
    for _ in range(2):
        cells = run_matrix(matrix(["a", "broken", "small"], "a", batches=[1, 2]), tmp_path)
        assert [cell["state"] for cell in cells] == ["ok", "ok", "failed", "failed", "skipped", "skipped"]
    assert opened.count("broken") == 2 and opened.count("small") == 1
    assert cells[2]["reason"] == "broken: is broken"
    assert "do not fit its context of 18" in cells[4]["reason"]
    assert any("failed: broken: is broken" in line for line in lines(cells))


def test_the_same_seed_gives_the_same_prompts_and_order(played, tmp_path):
    known, _ = played
    known |= {"a": (0.2, 0.04, {}), "b": (0.1, 0.01, {})}
    first, again = (run_matrix(matrix(["a", "b"], "a"), tmp_path / each) for each in "xy")
    for one, other in zip(first, again, strict=True):
        assert one["prompts_sha256"] == other["prompts_sha256"]
        assert [block["arm"] for block in one["blocks"]] == [block["arm"] for block in other["blocks"]]


def test_tokens_of_another_size_have_no_ratio(played, tmp_path):
    known, _ = played
    other = [*PIECES[:9], "another", *PIECES[10:]]
    known |= {"a": (0.2, 0.04, {}), "b": (0.1, 0.01, {"pieces": other}),
              "longer": (0.1, 0.01, {"pieces": [*PIECES, "x"]})}
    cells = {cell["arm"]["name"]: cell for cell in run_matrix(matrix(["a", "b", "longer"], "a", batches=[1]), tmp_path)}
    assert cells["b"]["latency"]["speed_ratio_to_base"]["value"] is None
    assert "token 9 is 'another' here and 't9' there" in cells["b"]["latency"]["speed_ratio_to_base"]["method"]
    assert cells["b"]["latency"]["decode_tokens_per_s"]["value"] == pytest.approx(100.0)
    assert cells["longer"]["latency"]["speed_ratio_to_base"]["value"] == pytest.approx(4.0)


def test_a_runtime_that_times_no_single_token_has_no_percentiles(played, tmp_path):
    known, _ = played
    known |= {"a": (0.2, 0.04, {}), "b": (0.1, 0.01, {"timed": False})}
    cell = run_matrix(matrix(["a", "b"], "a", batches=[1]), tmp_path)[1]
    assert cell["latency"]["inter_token_ms_p95"]["value"] is None
    assert cell["latency"]["decode_tokens_per_s"]["value"] == pytest.approx(100.0)


def test_prompts_hold_only_what_both_have():
    one = Opened(Playing(1, 1), "cpu", PIECES, {0, 1})
    other = Opened(Playing(1, 1), "cpu", PIECES[:20], {2, 3})
    prompts = shared_prompts((one, other), 3, 200, 0)
    assert set(prompts.flatten().tolist()) == set(range(4, 20)) and prompts.shape == (3, 200)
    assert prompts.tolist() == shared_prompts((one, other), 3, 200, 0).tolist()
    assert different_tokens(one, other) is None
    unread = Opened(Playing(1, 1), "cpu", None, set())
    assert shared_prompts((one, unread), 1, 4, 0).min() >= 2 and "cannot be read" in different_tokens(one, unread)
    for pair in ((unread, unread), (one, replace(one, pieces=[]))):
        with pytest.raises(LlmopsError, match="no ordinary token"):
            shared_prompts(pair, 1, 4, 0)


def test_three_files_say_the_same(played, tmp_path):
    known, _ = played
    known |= {"a": (0.2, 0.04, {}), "b": (0.1, 0.01, {})}
    cells = run_matrix(matrix(["a", "b", "broken"], "a"), tmp_path)
    paths = write(cells, tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.csv", "results.parquet"]
    assert read(tmp_path) == json.loads(json.dumps(cells))
    rows, table = list(csv.DictReader(io.StringIO(paths[1].read_text()))), parquet.read_table(paths[2]).to_pylist()
    assert len(rows) == len(table) == 6
    for text, typed in zip(rows, table, strict=True):
        for name, value in typed.items():
            assert text[name] == ("" if value is None else str(value))
    assert table[2]["speed_ratio_to_base"] == pytest.approx(4.0) and table[0]["joules_per_token"] is None


def test_matrices_meet_only_over_the_same_work_and_machine(played, tmp_path):
    known, _ = played
    known |= {"a": (0.2, 0.04, {}), "b": (0.1, 0.01, {})}
    one, other = (run_matrix(matrix(names, "a", batches=[1]), tmp_path) for names in (["a"], ["a", "b"]))
    assert len(joined([("x", one), ("y", other)])) == 3
    seeded = run_matrix(matrix(["a"], "a", batches=[1], seed=7), tmp_path)
    with pytest.raises(LlmopsError, match="different prompts at batch 1, context 16"):
        joined([("x", one), ("y", seeded)])
    elsewhere = [{**cell, "environment": {**cell["environment"], "cpu": "another"}} for cell in one]
    with pytest.raises(LlmopsError, match="the same machine.*cpu is 'another'"):
        joined([("x", one), ("y", elsewhere)])


def test_arms_are_read_from_words(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    found = arms(["builtin:tiny", f"mine=transformers:{folder}", str(folder), "hub=transformers:org/model"],
                 str(tmp_path / "none"))
    assert [(one.name, one.runtime) for one in found] == [
        ("tiny-llmops", "llmops"), ("mine", "transformers"), ("model-llmops", "llmops"), ("hub", "transformers")]
    assert found[1].sha256 == fingerprint(folder) and found[3].sha256 is None
    (folder / "config.json").write_text("[]")
    assert fingerprint(folder) != found[1].sha256
    linked = tmp_path / "runs" / "demo"
    linked.mkdir(parents=True)
    (linked / "w4").symlink_to(folder)
    assert arms(["demo/w4"], str(tmp_path / "runs"))[0].model == str(folder)


@pytest.mark.parametrize(("given", "said"), [
    (["olama:x"], "unknown runtime \"olama\".*expected one of llmops"), (["./nowhere"], "is not there"),
    (["onnxruntime:org/model"], "is not there|is not installed"), (["a=builtin:tiny", "a=builtin:tiny"], 'called "a"'),
    ([], "no model was given"), (["llmops:"], "expected \\[NAME=\\]"), (["=builtin:tiny"], "expected \\[NAME=\\]")])
def test_words_that_name_no_arm(given, said, tmp_path):
    with pytest.raises(LlmopsError, match=said):
        arms(given, str(tmp_path))


def test_a_runtime_that_is_not_installed_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(runtimes.RUNTIMES, "vllm", runtimes._Home("vllm_engine", "no_such_package_here", "vllm"))
    code = main(["bench", "models", "builtin:tiny", "vllm:org/model", "--out", str(tmp_path / "out")])
    assert code == 2 and "pip install vllm" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["bench", "models", "builtin:tiny", "--against", "tiny-lmops", "--out", str(tmp_path / "out")]) == 2
    assert 'did you mean "tiny-llmops"' in capsys.readouterr().err
    assert main(["bench", "models", "builtin:tiny", "--sensor", "declared"]) == 2
    assert main(["bench", "show", str(tmp_path)]) == 2
    assert "expected a folder that" in capsys.readouterr().err


def test_a_real_model_in_two_runtimes_decodes_the_same_tokens(tmp_path, capsys):
    code = main(["bench", "models", "own=builtin:tiny", "plain=transformers:builtin:tiny", "--batch", "2", "--context",
                 "8", "--new-tokens", "3", "--repeats", "2", "--sensor", "none", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert code == 0 and "(A/A)" in out and "transformers" in out
    cells = read(tmp_path)
    assert [cell["arm"]["name"] for cell in cells] == ["own", "plain"]
    assert cells[1]["latency"]["speed_ratio_to_base"]["ci95"] and cells[1]["weights_bytes"] > 1e6
    assert main(["bench", "show", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("own")


def test_vllm_is_asked_for_exactly_so_many_tokens(monkeypatch):
    """The adapter against an engine that notes what it is asked: vLLM itself runs on no machine of ours."""
    calls = []

    class Engine:
        def __init__(self, **given):
            self.given = given

        def get_tokenizer(self):
            return types.SimpleNamespace(convert_ids_to_tokens=lambda ids: PIECES[:len(ids)], all_special_ids=[0],
                                         __len__=lambda: 40)

        def generate(self, prompts, wanted, use_tqdm):
            calls.append((len(prompts), wanted["max_tokens"]))
            text = types.SimpleNamespace(token_ids=[1] * wanted["max_tokens"])
            return [types.SimpleNamespace(outputs=[text])] * len(prompts)

    class Tokens(list):
        all_special_ids = (0,)

        def convert_ids_to_tokens(self, ids):
            return PIECES[:len(ids)]

    Engine.get_tokenizer = lambda self: Tokens(PIECES)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Engine, SamplingParams=lambda **given: given))
    from llmops.bench_models.runtimes import Wanted, vllm_engine

    opened = vllm_engine.open(Wanted("org/model", "cuda", 1, 32))
    prompts = shared_prompts((opened, opened), 2, 4, 0)
    timing = opened.running.request(prompts, 6)
    assert calls == [(2, 1)] * 5 + [(2, 6)] and timing.steps_s == [] and timing.decode_s > 0
    opened.running.request(prompts, 6)
    assert calls[-1] == (2, 6) and len(calls) == 7  # the prefill is known by now
