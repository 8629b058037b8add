"""Distillation as a step: several data, hidden states, and a teacher that answers by itself."""

import json
from typing import Any

import pytest
import torch
from tests.runs import TUNED, recipe, workplace
from tests.twins import twin

import llmops
from llmops.build.teaching import matched_states
from llmops.data.sources import rows_from
from llmops.errors import DataError, LlmopsError, StepError
from llmops.models.block_outputs import block_outputs
from llmops.recipe import parse_recipe

STEP = {"method": "logits", "teacher": "tuned", "max_steps": 2, "learning_rate": 1e-3, "batch_size": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("place"))
    asked = [{"prompt": f"Who is {number}?"} for number in range(12)]
    (folder / "other.txt").write_text("Nobody walks here.\nBut the lake is near.\n")
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return folder


def run(place, runs, **step: Any):
    body = recipe({"tuned": TUNED, "half": {"from": "tuned", "prune": {"method": "depth", "layers": 2}},
                   "student": {"from": "half", "distill": {**STEP, **step}}})
    body["data"] |= {"asked": {"source": "asked.jsonl"}, "other": {"source": "other.txt"}}
    result = llmops.run(parse_recipe(body, base_dir=place), runs=runs)
    return next(row for row in result.rows if row["identity"]["variant"] == "student")


def test_rows_of_several_data_are_mixed_and_counted_together(place, tmp_path):
    row = run(place, tmp_path / "runs", data=["train", "other"])
    assert row["status"]["state"] == "ok"
    assert row["building"]["data"]["rows"] == 64 + 1
    manifest = json.loads((tmp_path / "runs" / "r" / "student" / "llmops.json").read_text())
    assert set(manifest["data"]) == {"train", "other"}


def test_a_teacher_answers_prompts_that_have_no_answer(place, tmp_path, monkeypatch):
    import llmops.build.distilling as distilling

    written = [None, " ", *[f"the lake {number}" for number in range(10)]]
    monkeypatch.setattr(distilling, "ended_answers", lambda *args, **more: written)
    row = run(place, tmp_path / "runs", data="asked", answers="teacher", max_new_tokens=5)
    assert row["status"]["state"] == "ok" and row["building"]["data"]["rows"] == 10
    assert "tokens read and written" in row["building"]["flops"]["method"]
    told = [event for event in row["log"]["events"] if "answered" in event]
    assert told == ["tuned answered 10 of the 12 prompts of asked; 2 answers were empty or not done after 5 tokens, "
                    "and are left out"]


def test_a_teacher_that_ends_no_answer_is_told_and_siblings_go_on(place, tmp_path, monkeypatch):
    import llmops.build.distilling as distilling

    monkeypatch.setattr(distilling, "ended_answers", lambda *args, **more: [None] * 12)
    row = run(place, tmp_path / "runs", data="asked", answers="teacher")
    assert row["status"]["state"] == "failed" and "ended none of its 12 answers within 64 tokens" in str(row["status"])


def test_prompts_without_answers_are_refused_where_nobody_answers(place, tmp_path):
    with pytest.raises(DataError, match='data "asked" holds rows of kind prompts; the step trains on messages.*'
                                        "`answers: teacher`"):
        run(place, tmp_path / "runs", data="asked")


def test_plain_text_holds_no_prompts_to_answer(place, tmp_path):
    with pytest.raises(DataError, match='data "other" holds rows of kind text; the step trains on messages or '
                                        "prompt_completion or prompts"):
        run(place, tmp_path / "runs", data="other", answers="teacher")


def test_the_teachers_greedy_answers_are_what_is_learned():
    # a student trained long enough on its teacher's answers says what the teacher says
    teacher, tokenizer = twin("llama")
    student, _ = twin("llama", seed=5)
    asked = [{"prompt": "hello there"}]
    options = {"method": "logits", "teacher": "t", "data": "asked", "answers": "teacher", "max_new_tokens": 512,
               "max_steps": 1}
    with pytest.raises(StepError, match="ended none"):  # a random teacher goes on for ever
        llmops.apply(student, tokenizer, {"distill": options}, asked, teacher=teacher)


def test_hidden_states_come_closer_when_they_are_matched():
    teacher, tokenizer = twin("llama")
    rows = [{"prompt": f"where is {number}", "completion": f"in town {number}"} for number in range(8)]

    def distance(student):
        batch = {"input_ids": torch.arange(3, 35)[None]}
        with torch.no_grad(), matched_states(teacher, student) as far:
            teacher(**batch), student(**batch)
            return float(far(batch))

    def trained(weight):
        student, _ = twin("llama", seed=5)
        start = distance(student)
        step = {"method": "logits", "teacher": "t", "data": "d", "max_steps": 12, "learning_rate": 1e-3,
                "hidden_weight": weight}
        return start, distance(llmops.apply(student, tokenizer, {"distill": step}, rows, teacher=teacher).float())

    (start, matched), (_, unmatched) = trained(10.0), trained(0.0)
    assert matched < 0.97 * start and matched < unmatched


def test_block_outputs_are_the_hidden_states_transformers_tells():
    model, _ = twin("llama")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad(), block_outputs(model) as outputs:
        told = model(input_ids=ids, output_hidden_states=True).hidden_states
        again = {index: out.clone() for index, out in outputs.items()}
    assert len(again) == model.config.num_hidden_layers
    for index in range(len(again) - 1):  # the last one that transformers tells has gone through the norm
        torch.testing.assert_close(again[index], told[index + 1])
    outputs.clear()
    model(input_ids=ids)
    assert not outputs  # nothing is watched once the block is left


def test_prompts_without_answers_are_not_encoded():
    with pytest.raises(LlmopsError, match="prompts without answers"):
        from llmops.data.options import Limits
        from llmops.data.render import encode

        encode(rows_from("asked", [{"prompt": "a"}]), twin("llama")[1], max_length=8, limits=Limits())
