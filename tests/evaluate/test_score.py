import hashlib
import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from llmops.evaluate import EVALUATORS
from llmops.evaluate.options import EVALUATIONS, ExactMatch
from llmops.evaluate.score import Item, Score
from llmops.quantity import Quantity


def test_a_score_survives_storage():
    items = [Item("ab12", 1.0, "Paris", {"expected": "paris", "correct": True}), Item("cd34", None, "", {"weight": 7})]
    score = Score("exact_match:test", "exact_match", True, Quantity.measured(0.5, "fraction", "m", (0.1, 0.9), 2), 0.5,
                  {"id": "exact_match/greedy", "aggregation": "mean"}, items)
    body = json.loads(json.dumps(score.as_dict(), allow_nan=False))
    assert body["items_sha256"] == hashlib.sha256("\n".join(each.id for each in items).encode()).hexdigest()
    kept = json.loads(json.dumps([item.as_dict() for item in items]))
    assert "items" not in body and body["n"] == 2
    assert Score.from_dict(body | {"versus": {}}, [Item(**item) for item in kept]) == score
    assert [asdict(item) for item in items] == kept
    assert [item.weight for item in items] == [1.0, 7.0]


def test_every_evaluation_of_a_recipe_has_its_evaluator():
    assert list(EVALUATORS) == list(EVALUATIONS)


def test_the_room_opens_without_torch():
    script = ("import sys, llmops.evaluate, llmops.evaluate.options, llmops.evaluate.statistics\n"
              "assert not {'torch', 'transformers', 'lm_eval', 'scipy'} & set(sys.modules), sys.modules")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_broken_expression_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression .* first group is the answer"):
        ExactMatch(data="test", extract="(")
