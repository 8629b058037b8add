"""Recipes that are right: the design's own, the packaged ones, and what each key turns into."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.recipe import makers

from llmops.errors import RecipeError
from llmops.recipe import load_recipe, parse_recipe
from llmops.recipe.data_checks import is_local
from llmops.recipe.source import parse

DESIGN = """\
version: 1
name: support-bot
seed: 0
model: Qwen/Qwen3-0.6B          # hub id (optional @revision), a folder, or builtin:tiny

data:
  train: {source: train.jsonl}
  test:  {source: test.jsonl}
  calib: {from: train, samples: 128}

evaluate:
  - exact_match: {data: test}
  - perplexity:  {data: test, context: 2048}
  - harness:     {tasks: [arc_easy], shots: 0}

measure:
  prompt_tokens: 256
  new_tokens: 128
  batch_sizes: [1, 8]
  repeats: 5

variants:
  student:    {from: half, distill: {method: logits, teacher: tuned, data: train, loss: forward_kl}}
  tuned:      {finetune: {method: lora, data: train, rank: 16, alpha: 32, epochs: 2}}
  tuned-w4:   {from: tuned, quantize: {method: rtn, scheme: w4a16, group_size: 128}}
  sparse:     {from: tuned, prune: {method: wanda, sparsity: 0.5, data: calib}}
  healed:     {from: sparse, finetune: {method: lora, data: train, epochs: 1}}
  half:       {from: tuned, prune: {method: depth, layers: 14, choose: block_influence, data: calib}}

goals:
  exact_match: {max_drop: 0.02, against: tuned}
  joules_per_token: {max_ratio: 0.7}
  prefer: joules_per_token
"""


def test_the_design_s_recipe_is_read_whole(home: Path) -> None:
    (home / "recipe.yaml").write_text(DESIGN)
    recipe = load_recipe(home / "recipe.yaml")
    assert (recipe.name, recipe.seed) == ("support-bot", 0)
    assert (recipe.model.id, recipe.model.revision) == ("Qwen/Qwen3-0.6B", None)
    assert list(recipe.variants) == ["tuned", "half", "student", "tuned-w4", "sparse", "healed"]  # parents first
    student = recipe.variants["student"]
    assert (student.parent, student.teacher, student.kind, student.method) == ("half", "tuned", "distill", "logits")
    assert student.parents() == ["half", "tuned"] and student.data_names() == ["train"]
    assert recipe.variants["tuned"].parents() == ["base"] and recipe.variants["tuned-w4"].data_names() == []
    assert [step.name for step in recipe.chain("student")] == ["tuned", "half", "student"]
    assert recipe.score_ids() == ["exact_match:test", "perplexity:test", "harness:arc_easy"]
    assert recipe.goals.as_dict() == {
        "quality": {"exact_match:test": {"max_drop": 0.02, "against": "tuned"}},
        "costs": {"joules_per_token": {"max_ratio": 0.7}}, "prefer": "joules_per_token"}
    assert recipe.measure is not None and recipe.measure.batch_sizes == [1, 8]
    assert recipe.base_dir == home and recipe.text == DESIGN


def test_the_smallest_recipe_and_its_defaults(home: Path) -> None:
    text = "version: 1\nname: x\nmodel: small\nvariants: {a: {prune: {method: magnitude}}}"
    recipe = parse_recipe(text, base_dir=home)
    assert recipe.evaluate == [] and recipe.measure is None and recipe.data == {} and recipe.goals.as_dict() == {}
    assert recipe.variants["a"].score and recipe.runtime.dtype == "auto" and not recipe.model.trust_remote_code


@pytest.mark.parametrize(("written", "value"), [("1e-4", 1e-4), ("2.0e-3", 2e-3), (".5", 0.5), ("1", 1.0),
                                                ("5E-05", 5e-5)])
def test_numbers_are_numbers_however_they_are_written(written: str, value: float, home: Path) -> None:
    wrong_in_yaml_1_1 = makers.text(
        variants=f"variants:\n  a: {{finetune: {{method: lora, data: train, learning_rate: {written}}}}}\n"
                 "  b: {prune: {method: magnitude, sparsity: 0.5, pattern: 2:4}}")
    recipe = parse_recipe(wrong_in_yaml_1_1, base_dir=home)
    assert recipe.variants["a"].options.learning_rate == value
    assert recipe.variants["b"].options.pattern == "2:4"  # PyYAML alone reads 124


def test_model_and_data_may_be_written_short_or_long(home: Path) -> None:
    short = parse_recipe(makers.text(model="model: org/name@v1.2", data="data: {train: train.jsonl, test: test.jsonl}"),
                         base_dir=home)
    whole = "model: {id: org/name, revision: v1.2, trust_remote_code: true}"
    long = parse_recipe(makers.text(model=whole), base_dir=home)
    assert (short.model.id, short.model.revision) == (long.model.id, long.model.revision) == ("org/name", "v1.2")
    assert long.model.trust_remote_code and short.data["train"] == long.data["train"]


def test_python_values_are_read_as_the_file_would_be(home: Path) -> None:
    values = {"version": 1, "name": "trial", "model": "small", "data": {"train": {"source": "train.jsonl"}},
              "variants": {"a": {"finetune": {"method": "lora", "data": "train", "targets": ("q_proj",)}}}}
    assert parse_recipe(values, base_dir=home).variants["a"].options.targets == ["q_proj"]
    values["variants"]["a"]["finetune"]["rnak"] = 3  # type: ignore[index]
    with pytest.raises(RecipeError, match=r'^<recipe>: variants.a.finetune.rnak: unknown key "rnak".*"rank"'):
        parse_recipe(values, base_dir=home)
    with pytest.raises(RecipeError, match="given a set; expected text, a number"):
        parse_recipe({"version": 1, "variants": {"a", "b"}}, base_dir=home)


def test_content_is_hashed_and_layout_is_not(home: Path) -> None:
    plain = parse_recipe(makers.text(), base_dir=home)
    moved = makers.text().replace("{method: lora, data: train}", "{data: train,  method: lora}")
    spaced = parse_recipe("# comment\n" + moved, base_dir=home)
    other = parse_recipe(makers.text(), base_dir=home, sets=["seed=1"])
    assert plain.sha256 == spaced.sha256 != other.sha256


def test_packaged_recipes_are_right(tmp_path: Path) -> None:
    """Some name a file that the user brings; here one row stands for it."""
    folder = tmp_path / "recipes"
    shutil.copytree(Path(__file__).parents[2] / "recipes", folder)
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        for entry in parse(file.read_text(), file.name).value["data"].values():
            if isinstance(entry, dict) and is_local(entry.get("source", "builtin:"), folder):
                (folder / entry["source"]).write_text('{"question": "one row", "answer": "for the file"}\n')
        recipe = load_recipe(file)
        assert recipe.text.splitlines()[0].startswith("# yaml-language-server: $schema="), file


def test_validating_and_planning_import_nothing_heavy(home: Path) -> None:
    """Each of these takes longer to import than the whole of validate may."""
    (home / "recipe.yaml").write_text(makers.text())
    code = ("import sys; from llmops.recipe import load_recipe, make_plan, json_schema;"
            "from llmops.recipe.show import render;"
            f"plan = make_plan(load_recipe({str(home / 'recipe.yaml')!r}), {str(home / 'store')!r}); render(plan);"
            "plan.as_json(); json_schema();"
            "print([name for name in ('torch', 'transformers', 'datasets', 'peft', 'numpy', 'rich', 'pandas')"
            " if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={"PYTHONPATH": str(Path(__file__).parents[2] / "src")})
    assert done.stdout.strip() == "[]", done.stderr


def test_a_model_in_integers_takes_training_and_no_second_rounding(tmp_path: Path) -> None:
    home = makers.folder(tmp_path)
    for step in ("finetune: {method: lora, data: train, merge: false}", "finetune: {method: full, data: train}",
                 "finetune: {method: dpo, data: train}"):
        parse_recipe(makers.text(model="model: integers", variants=f"variants:\n  a: {{{step}}}"), base_dir=home)
    for step in ("quantize: {method: rtn, scheme: w4a16}", "finetune: {method: qlora, data: train}"):
        with pytest.raises(RecipeError, match="a base model that is quantized already"):
            parse_recipe(makers.text(model="model: integers", variants=f"variants:\n  a: {{{step}}}"), base_dir=home)
