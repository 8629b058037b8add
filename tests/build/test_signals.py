"""A teacher's signals on disk: what a student learns from them, and whose signals are refused."""

import re
from typing import Any

import pytest
import torch
from tests.runs import TUNED, recipe, workplace
from tests.twins import twin
from transformers import AutoModelForCausalLM

import llmops
from llmops.build import Job, apply_step
from llmops.build import signals as module
from llmops.build.shared import Shared
from llmops.build.signals import digest, open_signals, write_signals
from llmops.build.teaching import Stopwatch, live_loss, offline_loss
from llmops.data.options import DataSource
from llmops.data.sources import rows_from
from llmops.errors import RecipeError, StepError, StoreError
from llmops.methods.distill.options import Logits
from llmops.models.packed_rows import use_packed_attention
from llmops.recipe import parse_recipe
from llmops.train.rows import IGNORED, token_rows

V = 512
EXAMPLES = [{"input_ids": list(range(5 + n, 12 + 2 * n)), "labels": [IGNORED] * 3 + list(range(8 + n, 12 + 2 * n))}
            for n in range(9)]
PARTS = {"teacher": "t", "template": "x", "data": "d", "k": "8", "temperature": "1"}


def rows(packed: bool = True, examples=EXAMPLES):
    return token_rows(examples, pad_id=0, packed=packed)


def written(folder, sets, k=8, teacher=None, temperature=1.0, parts=PARTS):
    teacher = twin("llama", torch.float32)[0] if teacher is None else teacher
    shared = Shared(folder, parts, "me")
    with shared.making(), use_packed_attention(teacher):
        write_signals(shared, teacher, sets, k=k, vocabulary=V, temperature=temperature)
    return shared


@pytest.mark.parametrize("loss", ["forward_kl", "jensen_shannon", "skewed_reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_kept_are_the_live_loss(tmp_path, loss, temperature):
    teacher, student = twin("llama", torch.float32)[0], twin("llama", torch.float32, seed=5)[0]
    options = Logits(method="logits", teacher="t", data="d", loss=loss, temperature=temperature, hard_weight=0.2)
    shared = written(tmp_path / "key", [rows()], k=V, teacher=teacher, temperature=temperature)
    signals = open_signals(shared, [rows()])
    batch = signals.beside(rows()).batch([4, 0, 7])
    with torch.no_grad(), use_packed_attention(teacher), use_packed_attention(student), \
            live_loss(teacher, student, options, V, Stopwatch(torch.device("cpu"))) as live:
        expected, found = float(live(student, batch)), float(offline_loss(options, V)(student, batch))
    assert found == pytest.approx(expected, rel=2e-3) and expected > 1


def test_a_few_tokens_and_the_rest_are_that_loss_with_top_k(tmp_path):
    teacher, student = twin("llama", torch.float32)[0], twin("llama", torch.float32, seed=5)[0]
    options = Logits(method="logits", teacher="t", data="d", top_k=8)
    signals = open_signals(written(tmp_path / "key", [rows()], teacher=teacher), [rows()])
    batch = signals.beside(rows()).batch([1, 2, 8])
    with torch.no_grad(), use_packed_attention(teacher), use_packed_attention(student), \
            live_loss(teacher, student, options, V, Stopwatch(torch.device("cpu"))) as live:
        assert float(offline_loss(options, V)(student, batch)) == pytest.approx(float(live(student, batch)), rel=2e-3)


def test_shards_hold_whole_rows_and_held_out_rows_follow(tmp_path, monkeypatch):
    one = written(tmp_path / "one", [rows(), rows(examples=EXAMPLES[:3])])
    monkeypatch.setattr(module, "SHARD_TOKENS", 14)
    many = written(tmp_path / "many", [rows(), rows(examples=EXAMPLES[:3])])
    assert len(list(many.folder.glob("shard-*.bin"))) > 4
    sets = [rows(), rows(examples=EXAMPLES[:3])]
    a, b = (open_signals(shared, sets) for shared in (one, many))
    for row in range(12):
        for first, second in zip(a.of([row]), b.of([row]), strict=True):
            torch.testing.assert_close(first, second)
    held = b.beside(sets[1], len(sets[0])).batch([2])
    for first, second in zip((held["signal_ids"], held["signal_log_p"]), b.of([2]), strict=True):
        torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)  # the same rows, at both of their places


def test_a_kill_between_shards_costs_only_the_shard_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_TOKENS", 14)
    teacher = twin("llama", torch.float32)[0]
    whole = written(tmp_path / "whole", [rows()], teacher=teacher)
    cut, calls = Shared(tmp_path / "cut", PARTS, "me"), []
    lines = module._lines

    def dies(*args: Any):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return lines(*args)

    monkeypatch.setattr(module, "_lines", dies)
    with pytest.raises(KeyboardInterrupt), cut.making(), use_packed_attention(teacher):
        write_signals(cut, teacher, [rows()], k=8, vocabulary=V, temperature=1.0)
    assert open_signals(cut, [rows()]) is None and len(list(cut.folder.glob("shard-*.bin"))) == 2
    with cut.making(), use_packed_attention(teacher):
        write_signals(cut, teacher, [rows()], k=8, vocabulary=V, temperature=1.0)
    for path in whole.folder.glob("shard-*.bin"):
        assert path.read_bytes() == (cut.folder / path.name).read_bytes()
    assert len(calls) == 3 + len(list(whole.folder.glob("shard-*.bin"))) - 2


def test_the_digest_is_of_the_tokens_whatever_their_layout():
    assert digest([rows()]) == digest([rows(packed=False)]) == digest([rows()], )
    other = [*EXAMPLES[:-1], {**EXAMPLES[-1], "labels": [IGNORED] * 4 + EXAMPLES[-1]["labels"][4:]}]
    assert digest([rows()]) != digest([rows(examples=other)])


@pytest.mark.parametrize(("part", "said"), [
    ("teacher", "teacher"), ("template", "chat template"), ("data", "data"), ("k", "k"),
    ("temperature", "temperature")])
def test_signals_of_another_are_refused_with_what_differs(tmp_path, part, said):
    written(tmp_path / "key", [rows()])
    mine = Shared(tmp_path / "key", {**PARTS, part: "another"})
    with pytest.raises(StepError, match=f"signals made with another {said} .*made anew"):
        open_signals(mine, [rows()])


def test_signals_of_other_rows_and_damaged_ones_are_refused(tmp_path):
    shared = written(tmp_path / "key", [rows()])
    with pytest.raises(StepError, match="signals of other rows"):
        open_signals(shared, [rows(examples=EXAMPLES[1:])])
    path = shared.folder / "shard-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="writes them anew"):
        open_signals(shared, [rows()])


# --------------------------------------------------------------------------------------------------------- whole runs

STEP = {"method": "logits", "teacher": "tuned", "data": "train", "max_steps": 3, "learning_rate": 1e-3,
        "batch_size": 4, "offline": {"k": 8}}
HALF = {"from": "tuned", "prune": {"method": "depth", "layers": 2}}
METER = {"measure": {"prompt_tokens": 4, "new_tokens": 2, "batch_sizes": [1], "repeats": 2, "sensor": "declared",
                     "watts": 10.0}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("place"))


def test_three_students_share_one_pass_of_their_teacher_and_its_cost(place, tmp_path, monkeypatch):
    passes = []
    lines = module._lines
    monkeypatch.setattr(module, "_lines", lambda *args: passes.append(args) or lines(*args))
    body = recipe({"tuned": TUNED, "half": {**HALF, "score": False}, "a": {"from": "half", "distill": STEP},
                   "b": {"from": "half", "distill": {**STEP, "loss": "jensen_shannon"}},
                   "fresh": {"distill": {**STEP, "student": {"config": {"num_hidden_layers": 1, "hidden_size": 64}}}}},
                  **METER, evaluate=[])
    parsed = parse_recipe(body, base_dir=place)
    result = llmops.run(parsed, runs=tmp_path / "runs")
    taught = {row["identity"]["variant"]: row["building"] for row in result.rows}
    assert not result.failed and len(passes) == 1
    (folder,) = (tmp_path / "runs" / "signals").glob("[0-9a-f]*[0-9a-f]")
    shares = [taught[name]["teacher_energy_j"]["value"] for name in ("a", "b", "fresh")]
    whole = {entry["energy_j"]["value"] for name in ("a", "b", "fresh") for entry in taught[name]["shared"]}
    assert len(set(shares)) == 1 and len(whole) == 1 and sum(shares) == pytest.approx(whole.pop())
    assert all(0 < share < taught[name]["energy_j"]["value"] for name, share in zip(("a", "b", "fresh"), shares,
                                                                                    strict=True))
    entry = taught["a"]["shared"][0]
    assert (entry["what"], entry["k"], entry["bytes_per_token"], entry["key"]) == ("signals", 8, 9 + 18, folder.name)
    assert "break_even_to_teacher_tokens" in taught["fresh"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "r" / "fresh")
    assert (plain.config.num_hidden_layers, plain.config.hidden_size) == (1, 64)
    _refuses_foreign(place, tmp_path, folder)


def _refuses_foreign(place, tmp_path, folder):
    """The same signals named by hand: taken by who they belong to, refused for another k, teacher or data."""
    cache = {"k": 8, "cache": str(folder)}

    for change, said in (({"offline": {**cache, "k": 9}}, "k 9 with signals made at 8"),
                         ({"temperature": 2.0}, "temperature 2 with signals made at 1"),
                         ({"max_length": 64}, "max_length 64 with signals made at 1024")):
        with pytest.raises(RecipeError, match=said):  # before anything is built
            parse_recipe(recipe({"tuned": TUNED, "half": HALF, "bad": {
                "from": "half", "distill": {**STEP, "offline": cache, **change}}}), base_dir=place)
    (place / "more.txt").write_text("Nobody walks here, and nobody ever did.")
    builds = tmp_path / "runs" / "store"
    before = sorted(builds.iterdir())
    for change, said in (({"teacher": "base"}, "another teacher ("), ({"data": ["train", "more"]}, "another data ("),
                         ({"loss": "reverse_kl"}, "")):
        body = recipe({"tuned": TUNED, "half": HALF, "student": {
            "from": "half", "score": False, "distill": {**STEP, "offline": cache, **change}}}, evaluate=[])
        body["data"]["more"] = {"source": "more.txt"}
        parsed = parse_recipe({**body, "name": "foreign"}, base_dir=place)
        for ask in (llmops.plan, llmops.run) if said else ():
            with pytest.raises(RecipeError, match=re.escape(said)):
                ask(parsed, runs=tmp_path / "runs")
        assert sorted(builds.iterdir()) == before
    result = llmops.run(parsed, runs=tmp_path / "runs")
    assert [row["status"]["state"] for row in result.rows] == ["ok"] * 4


def test_the_same_signals_make_the_same_student(tmp_path):
    teacher, words = twin("llama")
    made = []
    for which in ("one", "two"):
        job = Job(twin("llama", seed=5)[0], words, torch.bfloat16, [], lambda name: rows_from(
            name, [{"prompt": f"who is {number}", "completion": "me"} for number in range(6)]),
            lambda name: DataSource(source="memory"), 0, lambda name: teacher, signals=Shared(tmp_path / which, PARTS))
        work = apply_step("distill", job, Logits(**{**STEP, "data": "d"}))
        made.append(dict(work.model.named_parameters())["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(*made)
    assert not torch.equal(made[0], dict(twin("llama", torch.float32, 5)[0].named_parameters())[
        "model.layers.0.mlp.up_proj.weight"])


def test_in_memory_there_is_no_place_for_signals():
    teacher, words = twin("llama")
    with pytest.raises(StepError, match="taken in memory; expected no `offline`"):
        llmops.apply(twin("llama", seed=5)[0], words, {"distill": {**STEP, "teacher": "t", "data": "d"}},
                     [{"prompt": "who", "completion": "me"}], teacher=teacher)
