"""The JSON Schema agrees with the reader on what one place of a recipe can hold."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.recipe import makers
from tests.recipe.test_bad_recipes import CASES
from tests.recipe.test_read import DESIGN

from llmops.errors import RecipeError
from llmops.recipe import json_schema
from llmops.recipe.schema import STEPS
from llmops.recipe.source import parse

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (it is in the dev extra)")

#: Cases that only the whole of a recipe, the files around it, or its model can show.
BEYOND = frozenset((
    "unknown builtin", "model folder missing", "model folder empty", "model revision empty", "revision of a folder",
    "secret value", "secret comment", "aws key", "openai key", "data missing", "data folder missing",
    "data file kind", "data file empty", "data builtin", "data from nowhere", "data circle", "data split",
    "data split empty", "data split name", "data split of a file", "data column", "evaluate data", "evaluate twice",
    "extract broken", "extract no group", "harness include", "stride", "choices of facts", "batch sizes", "declared",
    "watts", "context", "dangling from", "cycle", "from itself", "learning rate nan", "targets empty",
    "targets misspelt", "training data", "pattern and sparsity", "depth too many", "depth zero",
    "depth twice as many", "depth out of range", "depth duplicate", "depth order", "influence without data",
    "data without influence", "pattern and scope", "pattern and ratios", "reach without ratios", "no size", "two sizes",
    "share that no shape has", "share that no layer has", "every weight of a row",
    "contiguous and even", "wider than it is", "fewer heads than groups", "heads and groups", "too many heads a group",
    "axes of a shape", "hidden that heads do not divide", "multiples of too much", "a workload that is not measured",
    "a workload beyond the context", "student size", "student hidden size", "student odd heads",
    "student architecture", "groups after a narrow parent", "hardly a weight a row of 128 by magnitude",
    "hardly a weight a row of 128 by sparsegpt", "hardly a weight a row of 384 by magnitude",
    "more layers than a short parent has", "sparsegpt on integers", "depth of all", "depth of all, by name",
    "layers of a parent of one", "width of all", "less than a weight of a row",
    "group size", "group size 0", "ignore misspelt",
    "four bits after quantized", "pairs after quantized", "pruned after healed", "quantized after healed",
    "trained in floats", "dora after quantized", "dropout after quantized", "pissa apart after quantized",
    "adapter apart on quantized zeros", "quantized base trained",
    "loftq without qlora", "loftq turns alone", "pissa rank", "qlora on zeros",
    "dora on zeros", "adapter apart on zeros", "pissa on zeros", "stop data unknown",
    "stop data trained on", "mixed data", "mixed data twice", "stop data among the mixed",
    "pair adapter apart on zeros",
    "quantized twice", "quantized base", "teacher is the student", "teacher is the parent", "teacher unknown",
    "teacher circle", "student with a parent", "student key", "student vocabulary", "student layers", "student heads",
    "student model", "student folder", "student builtin", "beta without its loss", "skew without its loss",
    "top k of too few", "offline k of too few", "offline without signals", "offline and on-policy",
    "offline with states", "offline with top k", "written by nobody", "written of nothing", "written in a circle",
    "written by its own student", "scored against a teacher", "many answers and one greedy",
    "shorter than the shortest", "matrix option", "matrix entry", "matrix twice", "matrix name", "matrix collision",
    "goal unknown", "goal on no score", "goal against", "goal against nothing", "goal min above max",
    "goal noninferior of all", "goal noninferior of a cost", "goal gap without groups", "slice unknown",
    "slice of a perplexity", "slice of builtin", "slice twice", "cluster unknown",
    "goal shared name", "goal not scored", "prefer unknown", "loftq without qlora",
    "loftq turns alone", "pissa rank", "qlora on zeros", "dora on zeros", "adapter apart on zeros", "pissa on zeros"))


@cache
def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def test_right_recipes_pass() -> None:
    check = validator()
    texts = [file.read_text() for file in (Path(__file__).parents[2] / "recipes").glob("*.yaml")]
    texts += [DESIGN, makers.text(), makers.text(
        model="model: {id: small, trust_remote_code: true}\nruntime: {device: 'cuda:1'}\nmeasure:",
        variants="variants:\n  w: {matrix: {scheme: [w8a16, w4a16], from: [base]}, quantize: {method: rtn}}")]
    for text in texts:
        assert [error.message for error in check.iter_errors(parse(text, "r.yaml").value)] == []


@pytest.mark.parametrize(("name", "sections"), [case[:2] for case in CASES], ids=[case[0] for case in CASES])
def test_it_refuses_what_one_place_shows_and_nothing_more(name: str, sections: dict[str, str]) -> None:
    try:
        value = parse(makers.text(**sections).replace("§", ""), "r.yaml").value
    except RecipeError:
        return  # not YAML, or not the YAML of recipes: no schema sees it
    assert validator().is_valid(value) == (name in BEYOND)


def test_every_option_of_every_method_says_what_it_is_for() -> None:
    schema = json_schema()
    for methods in STEPS.values():
        for model in methods.values():
            for option, body in schema["$defs"][model.__name__]["properties"].items():
                assert option == "method" or body.get("description"), (model, option)
    assert schema["additionalProperties"] is False and schema["$defs"]["Lora"]["additionalProperties"] is False
