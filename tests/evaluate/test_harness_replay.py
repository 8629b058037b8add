"""What lm-eval asked, in tokens: its own log-likelihoods come out of them, and `explain` shows them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.runs import recipe, workplace
from tests.twins import twin

from llmops.errors import LlmopsError
from llmops.evaluate import EVALUATORS
from llmops.evaluate.harness_replay import harness_questions
from llmops.evaluate.multiple_choice import loglikelihoods
from llmops.evaluate.options import Harness
from llmops.evaluate.replay import Question, answered
from llmops.evaluate.token_view import view
from llmops.explain import explain, lines
from llmops.ledger import Ledger
from llmops.recipe import parse_recipe
from llmops.runner import run

TASKS = Path(__file__).parent.parent.parent / "recipes" / "tasks"

try:
    import lm_eval
except ImportError:
    lm_eval = None
needed = pytest.mark.skipif(lm_eval is None, reason="lm-eval is not installed (extra: harness)")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: prose.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metadata: {{version: 1.0}}
"""


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TASKS, tmp_path / "tasks")
    place = tmp_path / "tasks"
    for name, kind, text, target, more in (
            ("prose", "loglikelihood_rolling", "", "{{text}}", "metric_list: [{metric: bits_per_byte}]"),
            ("ending", "loglikelihood", "{{text}}", " {{last}}", "metric_list: [{metric: perplexity}]"),
            ("written", "generate_until", "{{text}}", "{{last}}", "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
             "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]")):
        (place / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, text=text, target=target, more=more))
    texts = ["The old river runs north.", "A new bridge stands near the sea.", "Every clock counts. " * 120]
    (place / "prose.jsonl").write_text("".join(json.dumps({"text": t, "last": t[-6:]}) + "\n" for t in texts))
    return tmp_path


def options(folder, *tasks, **more):
    return Harness(tasks=list(tasks), include=str(folder / "tasks"), **more)


@needed
@pytest.mark.parametrize("more", [{}, {"shots": 2}, {"metric": "acc_norm", "limit": 5}])
def test_choices_have_lm_evals_log_likelihoods(folder, more):
    model, tokenizer = twin("llama", torch.float32)
    asked = options(folder, "everyday", **more)
    [score] = EVALUATORS["harness"](model, tokenizer, None, asked, id="harness:everyday", seed=0)
    known = harness_questions(model, tokenizer, asked, "harness:everyday")["everyday"]
    assert [item.id for item in score.items] == list(known)
    for item in score.items:
        question = known[item.id]
        values = loglikelihoods(model, [question.side(text) for text in question.answers], batch_size=4)
        assert values == pytest.approx(item.detail["loglikelihoods"], abs=1e-4)
        assert item.answer in question.answers and item.detail["expected"] in question.answers
    [(prompt, reply)] = answered(model, tokenizer, [known[score.items[0].id]], asked, [score.items[0].answer])
    assert tokenizer.decode(reply).strip() == score.items[0].answer and prompt


@needed
def test_rolling_and_single_continuations_and_written_answers(folder):
    model, tokenizer = twin("llama", torch.float32)
    asked = options(folder, "prose", "ending", "written")
    scores = EVALUATORS["harness"](model, tokenizer, None, asked, id="h", seed=0)
    known = harness_questions(model, tokenizer, asked, "h")
    assert list(known) == ["prose", "ending", "written"]
    by_task = {score.id.partition(":")[2]: score for score in scores}
    for task in ("prose", "ending"):
        assert [item.id for item in by_task[task].items] == list(known[task])
        for number, item in enumerate(by_task[task].items):
            question = known[task][item.id]
            total = -loglikelihoods(model, [question.side("")], batch_size=1)[0]
            if task == "ending":
                assert total == pytest.approx(item.score, abs=1e-4)
            elif number < 2:  # the third takes several windows, of which the first is kept
                assert total / item.weight / 0.6931471805599453 == pytest.approx(item.score, rel=1e-5)
            else:
                assert len(question.answers[""]) == 256 < len(tokenizer(question.text).input_ids)
    items = by_task["written"].items
    replies = answered(model, tokenizer, [known["written"][item.id] for item in items], asked)
    for (prompt, reply), item in zip(replies, items, strict=True):
        assert tokenizer.decode(reply).partition(".")[0] == item.answer and 1 <= len(reply) <= 4
        assert len(prompt) <= 252  # cut from the left where prompt and answer do not fit
    assert len(replies[-1][0]) == 252


@needed
@pytest.mark.parametrize(("more", "kept"), [("do_sample: true, temperature: 0.7", 0), ("temperature: 0.7", 0),
                                            ("num_beams: 2", 0), ("do_sample: false, temperature: 0.0", 3)])
def test_answers_that_are_drawn_are_not_written_again(folder, more, kept):
    place = folder / "tasks" / "written.yaml"
    place.write_text(place.read_text().replace("max_gen_toks: 4", f"max_gen_toks: 4, {more}"))
    model, tokenizer = twin("llama", torch.float32)
    assert len(harness_questions(model, tokenizer, options(folder, "written"), "h")["written"]) == kept


def test_an_answer_ends_with_the_token_that_makes_its_ending_whole():
    model, tokenizer = twin("llama", torch.float32)
    prompt = tokenizer("The old river").input_ids
    [(_, whole)] = answered(model, tokenizer, [Question("q", "", prompt, {}, most=8)], None)
    ending = tokenizer.decode(whole[:4])[-2:]
    [(_, reply)] = answered(model, tokenizer, [Question("q", "", prompt, {}, until=["nowhere", ending], most=8)], None)
    assert len(whole) == 8 and reply == whole[:len(reply)] and ending in tokenizer.decode(reply)
    assert ending not in tokenizer.decode(reply[:-1])


@needed
def test_an_item_is_explained_choice_by_choice(folder):
    workplace(folder)
    body = recipe({"w2": {"quantize": {"method": "rtn", "scheme": "w2a16", "group_size": 32}}},
                  runtime={"dtype": "float32"})  # lm-eval takes its softmax in the model's own dtype
    body["evaluate"] = [{"harness": {"tasks": ["everyday", "written"], "include": "tasks"}}]
    run(parse_recipe(body, base_dir=folder), runs=folder / "runs")
    found = explain(str(folder / "runs"), "r", "w2", items=3)
    score = found["scores"]["harness:everyday"]
    assert score["changed"] > 0 and len(score["items"]) == min(3, score["changed"])
    for item in score["items"]:
        assert len(item["choices"]) == len(item["loglikelihoods"])
        before, now = item["loglikelihoods_before"], item["loglikelihoods"]
        assert [each["delta_logp"] for each in item["choices"]] == pytest.approx(
            [b - a for a, b in zip(before, now, strict=True)], abs=1e-3)
        assert all(token["kl"] >= 0 for each in item["choices"] for token in each["tokens"])
        assert "".join(token["token"] for token in item["tokens"]).strip() == item["answer_before"]
    assert found["layers"]["score"] in ("harness:everyday", "harness:written") and found["layers"]["swaps"]
    written = found["scores"]["harness:written"]
    assert written["changed"] == 3 and not found["notes"]
    for item in written["items"]:
        assert "".join(token["token"] for token in item["tokens"]).partition(".")[0] == item["answer_before"]
        assert len(item["tokens"]) >= 1 and item["parts_at"] is not None
    assert "log p of the choices" in "\n".join(lines(found))
    assert "log p " in (folder / "runs" / "r" / "report.html").read_text()
    assert explain(str(folder / "runs"), "r", "w2", items=3) == found
    path = folder / "tasks" / "everyday.jsonl"
    path.write_text(path.read_text().replace("?", "??"))
    moved = explain(str(folder / "runs"), "r", "w2", items=3)
    assert any("lm-eval makes other prompts now" in note for note in moved["notes"])
    assert Ledger(folder / "runs" / "ledger.db").audit() == []


def test_choices_of_our_own_questions_add_up():
    model, tokenizer = twin("llama", torch.float32)
    other, _ = twin("llama", torch.float32, seed=1)
    side = (tokenizer("The old river").input_ids, tokenizer(" runs north").input_ids)
    [tokens] = view(other, model, tokenizer, [side])
    sums = [loglikelihoods(each, [side], batch_size=1)[0] for each in (other, model)]
    assert sum(token.delta_logp for token in tokens) == pytest.approx(sums[0] - sums[1], abs=1e-4)


def test_without_lm_eval_it_is_said(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    model, tokenizer = twin("llama")
    with pytest.raises(LlmopsError, match=r'pip install "llmops\[harness\]"'):
        harness_questions(model, tokenizer, Harness(tasks=["everyday"], include=str(TASKS)), "harness:everyday")
