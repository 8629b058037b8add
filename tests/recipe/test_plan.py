"""Keys change when what they stand for changes, and only then; the plan knows what is done; `why` says what changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.recipe import makers

from llmops.recipe import Plan, Recipe, make_plan, parse_recipe, why
from llmops.recipe import keys as keys_module
from llmops.recipe.estimate import row_count
from llmops.recipe.hashing import FileHashes
from llmops.recipe.model import Dims, dims_from_config
from llmops.recipe.show import render

TREE = """\
variants:
  tuned: {finetune: {method: lora, data: train}}
  w4: {from: tuned, quantize: {method: rtn, scheme: w4a16, group_size: 32}}
  half: {from: tuned, prune: {method: depth, layers: 3}}
  student: {from: half, distill: {method: logits, teacher: other, data: train}}
  other: {prune: {method: magnitude, sparsity: 0.5}}
  hidden: {from: other, score: false, prune: {method: wanda, data: calib}}
"""


def recipe(home: Path, *sets: str, **sections: str) -> Recipe:
    return parse_recipe(makers.text(**({"variants": TREE} | sections)), base_dir=home, sets=sets)


def plan(home: Path, *sets: str, **sections: str) -> Plan:
    return make_plan(recipe(home, *sets, **sections), home / "runs" / "store")


def changed(one: Plan, two: Plan) -> set[str]:
    return {name for name, key in one.keys.items() if two.keys.get(name) != key}


def build(made: Plan, *names: str) -> None:
    for name in names:
        stage = made.stage(name)
        folder = made.store / stage.key
        folder.mkdir(parents=True)
        (folder / "llmops.json").write_text(json.dumps({
            "key": stage.key, "key_parts": stage.key_parts, "variant": name, "recipe": made.recipe.name}))


def row(made: Plan, name: str, state: str = "ok", **identity: Any) -> dict[str, Any]:
    stage = made.stage(name)
    return {"identity": {"run": made.recipe.name, "variant": name, "key": stage.key, "score_key": stage.score_key}
            | identity, "status": {"state": state}}


# ---------------------------------------------------------------------------------------------------------------- keys


def test_the_same_recipe_has_the_same_keys(home: Path) -> None:
    first = plan(home)
    assert changed(first, plan(home)) == set()
    assert len(set(first.keys.values())) == len(first.stages) == 7
    assert all(len(key) == 64 for key in first.keys.values())


@pytest.mark.parametrize(("setting", "names"), [
    ("variants.tuned.finetune.rank=8", {"tuned", "w4", "half", "student"}),
    ("variants.w4.quantize.group_size=64", {"w4"}),
    ("variants.other.prune.sparsity=0.6", {"other", "hidden", "student"}),  # a teacher is a parent, too
    ("data.calib.samples=3", {"hidden"}),
    ("seed=1", {"base", "tuned", "w4", "half", "student", "other", "hidden"}),
    ("runtime.dtype=float32", {"base", "tuned", "w4", "half", "student", "other", "hidden"}),
    ("runtime.threads=3", set()),
    ("runtime.checkpoint_s=5", set()),
    ("report_to=[tensorboard]", set()),
    ("variants.tuned.finetune.neftune_alpha=5", {"tuned", "w4", "half", "student"}),
    ("variants.tuned.finetune.stop={holdout: 0.2}", {"tuned", "w4", "half", "student"}),
    ("name=renamed", set()),
    ("evaluate=[{perplexity: {data: test}}]", set()),
    ("measure={repeats: 3}", set()),
])
def test_a_change_runs_down_the_tree_and_no_further(setting: str, names: set[str], home: Path) -> None:
    assert changed(plan(home), plan(home, setting)) == names


def test_names_that_a_recipe_chooses_are_in_no_key(home: Path) -> None:
    renamed = TREE.replace("tuned", "sharp").replace("data: calib", "data: few")
    other = plan(home, variants=renamed, data=makers.HEAD["data"].replace("calib", "few"))
    assert set(plan(home).keys.values()) == set(other.keys.values())


def test_bytes_of_data_and_model_are_in_the_keys(home: Path) -> None:
    before = plan(home)
    (home / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    tested = plan(home)
    assert changed(before, tested) == set()
    assert before.stage("w4").score_key != tested.stage("w4").score_key
    with open(home / "train.jsonl", "a") as file:
        file.write('{"prompt": "new", "completion": "row"}\n')
    assert changed(before, plan(home)) == {"tuned", "w4", "half", "student", "hidden"}
    (home / "small" / "chat_template.jinja").write_text("another")
    assert "base" in changed(before, plan(home))


def test_bytes_of_the_held_out_data_are_in_the_key_and_its_name_is_not(home: Path) -> None:
    (home / "held.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    trees = [{"variants": f"variants:\n  tuned: {{finetune: {{method: lora, data: train, stop: {{data: {name}}}}}}}",
              "data": makers.HEAD["data"] + f"\n  {name}: {{source: held.jsonl}}"} for name in ("held", "aside")]
    first, renamed = (plan(home, **tree) for tree in trees)
    assert first.keys == renamed.keys
    (home / "held.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    assert changed(first, plan(home, **trees[0])) == {"tuned"}


def test_versions_of_what_computes_are_in_the_keys(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan(home)
    assert before.stage("w4").key_parts["version.torch"] == keys_module.package_version("torch") != "absent"
    assert keys_module.package_version("no-such-package") == "absent"
    monkeypatch.setattr(keys_module, "BUILD_VERSION", keys_module.BUILD_VERSION + 1)
    assert changed(before, plan(home)) == set(before.keys)


def test_a_score_key_follows_what_is_scored(home: Path) -> None:
    def score_keys(*sets: str) -> set[str]:
        return {stage.score_key for stage in plan(home, *sets).stages}

    first = score_keys()
    assert score_keys("evaluate.0.exact_match.max_new_tokens=3").isdisjoint(first)
    assert score_keys("measure={repeats: 3}").isdisjoint(first)
    assert score_keys("runtime.kernel=reference").isdisjoint(first)
    assert score_keys("goals={disk_bytes: {max: 3}}") == first
    assert score_keys("runtime.checkpoint_s=5") == first


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    memory, file = tmp_path / "hashes.json", tmp_path / "weights.safetensors"
    file.write_bytes(b"a" * 2_000_000)
    with FileHashes(memory) as hashes:
        first = hashes.of(file)
    assert json.loads(memory.read_text())[str(file)][2] == first
    known = json.loads(memory.read_text())
    known[str(file)][2] = "remembered"
    memory.write_text(json.dumps(known))
    with FileHashes(memory) as hashes:
        assert hashes.of(file) == "remembered"
    file.write_bytes(b"b" * 2_000_000)
    os.utime(file, (1, 1))
    with FileHashes(memory) as hashes:
        assert hashes.of(file) not in ("remembered", first)
    memory.write_text("not json")
    with FileHashes(memory) as hashes:
        assert len(hashes.of(file)) == 64


# ---------------------------------------------------------------------------------------------------------------- plan


def test_stages_come_parents_first_with_their_keys(home: Path) -> None:
    made = plan(home)
    assert [stage.variant for stage in made.stages] == ["base", "tuned", "w4", "half", "other", "student", "hidden"]
    student = made.stage("student")
    assert (student.kind, student.method, student.parents) == ("distill", "logits", ("half", "other"))
    assert student.parent_keys == (made.keys["half"], made.keys["other"])
    assert made.stages[0].kind is None and made.stages[0].built and made.stages[0].parents == ()
    assert student.describe() == "distill logits 1 epoch from half, taught by other"
    assert not made.stage("hidden").scored_here
    with pytest.raises(KeyError):
        made.stage("nobody")


def test_what_is_built_and_scored_is_seen(home: Path) -> None:
    made = plan(home)
    build(made, "tuned", "hidden", "w4")
    rows = [row(made, "tuned"), row(made, "base"), row(made, "w4", state="failed"), row(made, "half", score_key="old")]
    again = make_plan(made.recipe, made.store, rows)
    assert {stage.variant: stage.state for stage in again.stages} == {
        "base": "done", "tuned": "done", "w4": "to score", "half": "to build", "other": "to build",
        "student": "to build", "hidden": "done"}
    body = again.as_json()
    assert (body["to_build"], body["to_score"]) == (3, 4)
    assert json.loads(json.dumps(body)) == body


def test_the_plan_is_drawn_as_a_tree(home: Path) -> None:
    made = plan(home)
    build(made, "tuned")
    drawn = render(make_plan(made.recipe, made.store))
    lines = drawn.splitlines()
    assert lines[0] == "trial: 7 variants, 5 to build, 6 to score"
    assert lines[4].startswith("├─ tuned") and "to score" in lines[4]
    assert lines[6].startswith("│  └─ half") and lines[7].startswith("│     └─ student")
    assert "taught by other" in lines[7] and "not scored" in drawn
    assert "\x1b[" not in drawn and "\x1b[" in render(made, colour=True)
    far = render(plan(home, model="model: org/name"))
    assert "Not known: org/name is not on this machine" in far


def test_parameters_are_counted_as_the_model_has_them() -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (True, False):
        config = LlamaConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=300, tie_word_embeddings=tied)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        dims: Dims = dims_from_config(config.to_dict())
        assert dims.parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_estimates_follow_the_steps(home: Path) -> None:
    made = plan(home)
    figures = {stage.variant: stage.estimate for stage in made.stages}
    linear, other = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384, 256
    count = 1000 * 128 + 6 * (linear + other) + 128
    assert figures["base"].parameters.value == count and figures["base"].disk_bytes.value == 2 * count
    packed = 2 * count + 6 * linear * (0.5 + 2 / 32 - 2)
    assert figures["w4"].disk_bytes.value == packed
    assert figures["half"].parameters.value == count - 3 * (linear + other) == figures["student"].parameters.value
    assert figures["tuned"].tokens.value == 6 * 512  # rows x the model's context, which is below max_length
    assert figures["hidden"].tokens.value == 2 * 512
    assert figures["w4"].tokens.value is None and figures["w4"].tokens.method == "the step reads no tokens"
    for name in ("tuned", "student"):
        assert (figures[name].peak_memory_bytes.value or 0) > 4 * count
    healed = plan(home, variants="variants:\n  q: {quantize: {method: rtn, scheme: w4a16, group_size: 32}}\n"
                  "  full: {from: q, finetune: {method: full, data: train}}\n"
                  "  plain: {finetune: {method: full, data: train}}\n"
                  "  lora: {from: q, finetune: {method: lora, data: train}}\n"
                  "  thin: {finetune: {method: lora, data: train}}\n"
                  "  apart: {from: q, finetune: {method: lora, data: train, merge: false}}\n")
    found = {stage.variant: stage.estimate for stage in healed.stages}
    assert found["full"].disk_bytes == found["lora"].disk_bytes == found["q"].disk_bytes
    assert healed.stage("full").describe() == "finetune full 1 epoch qat from q"
    assert healed.stage("apart").describe() == "finetune lora r16 apart 1 epoch from q"
    linear = 4 * 6 * dims_from_config(makers.CONFIG).linear_parameters
    memory = {name: each.peak_memory_bytes.value or 0 for name, each in found.items()}
    assert memory["full"] - memory["plain"] == linear and memory["lora"] - memory["thin"] == 2 * linear
    largest = 4 * 384 * 128
    assert memory["thin"] - memory["apart"] == pytest.approx(linear * (1 - (4 + 16 / 32) / 32) - largest)
    far = plan(home, model="model: org/name").stages[1].estimate
    assert far.disk_bytes.value is None and "hub" in far.disk_bytes.method and far.tokens.value == 6 * 1024


@pytest.mark.parametrize(("rotate", "more"), [("hadamard", 2 * 1000 * 128), ("[r1]", 2 * 1000 * 128), ("[r2]", 0)])
def test_a_rotated_stream_costs_a_head_of_its_own(home: Path, rotate: str, more: int) -> None:
    made = plan(home, variants="variants:\n  plain: {quantize: {method: rtn, scheme: w8a16}}\n"
                               f"  turned: {{quantize: {{method: rtn, scheme: w8a16, rotate: {rotate}}}}}")
    figures = {stage.variant: stage.estimate.disk_bytes.value or 0 for stage in made.stages}
    assert figures["turned"] - figures["plain"] == more


def test_rows_are_counted_without_being_read(home: Path) -> None:
    sources = recipe(home, data=makers.HEAD["data"] + (
        "\n  part: {source: train.jsonl, split: '[:50%]'}\n  few: {from: part, samples: 2}\n"
        "  facts: {source: builtin:facts, split: test}\n  world: {source: builtin:world}\n"
        "  hub: {source: org/name}")).data
    counts = {name: row_count(name, sources, home)[0] for name in sources}
    assert counts == {"train": 6, "test": 4, "calib": 2, "part": 3, "few": 2, "facts": 600, "world": None, "hub": None}


# ----------------------------------------------------------------------------------------------------------------- why


def test_why_tells_which_part_changed_and_follows_the_parents(home: Path) -> None:
    first = plan(home)
    build(first, "tuned", "w4")
    rows = [row(first, "tuned"), row(first, "w4")]
    assert "nothing changed" in why("w4", plan(home), rows)["lines"][0]
    assert why("half", first, rows)["lines"] == ["half: never built"]
    assert "not built" in why("base", first, rows)["lines"][0]
    now = plan(home, "variants.tuned.finetune.rank=8", "variants.w4.quantize.symmetric=false")
    answer = why("w4", now, rows)
    assert answer["last_key"] == first.keys["w4"] and set(answer["changed"]) == {"parent", "option.symmetric"}
    text = "\n".join(answer["lines"])
    assert "option symmetric: true -> false" in text and 'the parent "tuned" changed' in text
    assert "option rank: 16 -> 8" in text
    assert why("w4", now)["changed"] == answer["changed"]  # without a ledger: the newest build of that name


def test_why_tells_changed_data_and_a_lost_build(home: Path) -> None:
    first = plan(home)
    build(first, "tuned")
    (home / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert set(why("tuned", plan(home), [row(first, "tuned")])["changed"]) == {"data"}
    (first.store / first.keys["tuned"] / "llmops.json").unlink()
    assert why("tuned", plan(home), [row(first, "tuned")])["lines"] == ["tuned: never built"]
    with pytest.raises(KeyError):
        why("nobody", first)


@pytest.mark.parametrize(("step", "said"), [
    ("method: lora, rslora: true, merge: false", "r16 rslora apart 1 epoch"),
    ("method: qlora, init: pissa, max_steps: 9", "r16 pissa nf4 dequantized 9 steps"),
    ("method: dpo, rank: 4", "r4 1 epoch"), ("method: dpo, rank: null", "all weights 1 epoch"),
    ("method: full, epochs: 2", "2 epochs")])
def test_every_way_to_train_is_told_in_a_few_words(step: str, said: str, home: Path) -> None:
    made = plan(home, variants=f"variants:\n  a: {{finetune: {{data: train, {step}}}}}")
    assert made.stage("a").summary == said
