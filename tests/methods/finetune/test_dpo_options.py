"""What a recipe may say about preferences, and what is refused before a weight is loaded."""

import pytest
from tests.runs import recipe, workplace

from llmops.errors import RecipeError
from llmops.methods.finetune.options import Dpo
from llmops.recipe import parse_recipe

TUNED = {"finetune": {"method": "lora", "data": "train"}}


def parsed(folder, step, data=None, **more):
    body = recipe({"tuned": TUNED, "preferred": {"from": "tuned", "finetune": {"method": "dpo", **step}}, **more})
    body["data"]["pairs"] = data or {"source": "builtin:preferences"}
    return parse_recipe(body, base_dir=folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("place"))


def test_the_learning_rate_follows_what_is_trained(place):
    assert Dpo(method="dpo", data="pairs").learning_rate == 1e-5
    assert Dpo(method="dpo", data="pairs", rank=None).learning_rate == 1e-6
    assert Dpo(method="dpo", data="pairs", rank=None, learning_rate=3e-6).learning_rate == 3e-6
    assert parsed(place, {"data": "pairs", "rank": None}).variants["preferred"].options.learning_rate == 1e-6


@pytest.mark.parametrize(("step", "said"), [
    ({"data": "pairs", "beta": 0}, "beta: given 0; expected a number, above 0"),
    ({"data": "pairs", "loss": "sigmoyd"}, 'one of sigmoid, hinge, ipo.*did you mean "sigmoid"'),
    ({"data": "pairs", "loss": "ipo", "label_smoothing": 0.1}, "label_smoothing 0.1 with loss: ipo"),
    ({"data": "pairs", "rank": None, "merge": False}, "merge: false with rank: null"),
    ({"data": "pairs", "targets": ["q_prj"]}, 'did you mean "q_proj"'),
    ({"beta": 0.1}, 'missing key "data"'),
    ({"data": "pears"}, 'did you mean "pairs"')])
def test_what_is_wrong_is_said(place, step, said):
    with pytest.raises(RecipeError, match=said):
        parsed(place, step)


def test_a_parent_in_another_format_than_integers_is_refused(place):
    def late(scheme):
        return parsed(place, {"data": "pairs"}, few={"from": "tuned", "quantize": {"method": "rtn", "scheme": scheme}},
                      late={"from": "few", "finetune": {"method": "dpo", "data": "pairs"}})

    assert late("w4a16").variants["late"].method == "dpo"
    with pytest.raises(RecipeError, match="in nf4, whose rounding cannot be trained; expected integer weights"):
        late("nf4")


def test_the_score_of_preferences_wants_preferences(place):
    body = recipe({"tuned": TUNED})
    body["data"]["facts"] = {"source": "builtin:facts"}
    body["evaluate"] = [{"preference_accuracy": {"data": "facts"}}]
    with pytest.raises(RecipeError, match="expected data for preference_accuracy, such as builtin:preferences"):
        parse_recipe(body, base_dir=place)
