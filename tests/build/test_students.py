"""Students that are no variants, as a step has them."""

from typing import Any

import pytest
import torch
from tests.runs import TUNED, recipe, workplace
from tests.twins import config_of, tokenizer, twin
from transformers import AutoModelForCausalLM

import llmops
from llmops.build import Job, apply_step
from llmops.build.shared import Shared
from llmops.build.teaching import PROJECTION
from llmops.data.options import DataSource
from llmops.data.sources import rows_from
from llmops.errors import ModelError, StepError
from llmops.explain import explain
from llmops.methods.distill.options import Logits
from llmops.recipe import parse_recipe

STEP = {"method": "logits", "teacher": "t", "data": "d", "max_steps": 3, "learning_rate": 1e-2, "batch_size": 3}
ROWS = [{"prompt": f"who is {number}", "completion": f"me, number {number}"} for number in range(6)]


def padded(vocabulary: int, seed: int = 7) -> Any:
    """A pretrained model of the twin's tokenizer, with so many rows in its matrices."""
    config = config_of("qwen2")
    config.vocab_size = vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def take(other: Any = None, words: Any = None, parent: Any = None, signals: Any = None, **step: Any):
    teacher, ours = twin("llama")
    job = Job(parent or twin("llama", seed=5)[0], ours, torch.bfloat16, [], lambda name: rows_from(name, ROWS),
              lambda name: DataSource(source="memory"), 0, lambda name: teacher,
              open=lambda source, revision: (other, words or tokenizer()), signals=signals)
    return apply_step("distill", job, Logits(**{**STEP, **step}))


@pytest.mark.parametrize("vocabulary", [512, 640])
def test_a_pretrained_student_learns_over_the_tokens_that_both_know(vocabulary, tmp_path):
    work = take(padded(vocabulary), student={"model": "other"})
    assert type(work.model).__name__ == "Qwen2ForCausalLM" and work.loss[-1][1] < work.loss[0][1]
    told = " ".join(work.events)
    assert "other is the student" in told
    assert ("640 of the student" in told) == (vocabulary == 640)
    work.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == vocabulary


def test_rows_that_pad_have_no_part_in_the_loss():
    known = max(tokenizer().get_vocab().values()) + 1
    students = [padded(640), padded(640)]
    with torch.no_grad():
        students[1].get_output_embeddings().weight[known:] += 5.0
    losses = [take(student, student={"model": "other"}, max_steps=1, temperature=2.0).loss for student in students]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("rows", [480, 640])
def test_signals_are_the_same_whoever_reads_them_first_and_padding_pulls_at_nothing(rows, tmp_path):
    """The teacher has 512 logits, this student other padding, its sibling as many as the teacher."""
    made = {}
    for order in (("other", "alike"), ("alike", "other")):
        shared = Shared(tmp_path / order[0], {"teacher": "t"})
        for which in order:
            step = {"parent": twin("llama", seed=5)[0]} if which == "alike" else {
                "other": padded(rows), "student": {"model": "other"}}
            work = take(offline={"k": 8}, signals=shared, **step)
            made.setdefault(which, []).append(work.loss)
        assert (shared.manifest()["vocabulary"], shared.manifest()["logits"]) == (
            max(tokenizer().get_vocab().values()) + 1, 512)
    assert made["other"][0] == made["other"][1] and made["alike"][0] == made["alike"][1]
    live = take(padded(rows), student={"model": "other"}, top_k=8)  # the teacher's padding counts on neither side
    assert made["other"][0][0][1] == pytest.approx(live.loss[0][1], rel=2e-3)
    with pytest.raises(StepError, match="expected one for each"):
        take(padded(128), student={"model": "other"}, offline={"k": 8}, signals=shared)


def test_too_few_logits_and_other_tokenizers_are_refused():
    with pytest.raises(StepError, match="the tokenizer knows 4.. tokens|expected one for each"):
        take(padded(128), student={"model": "other"})
    other = tokenizer()
    other.add_tokens(["x"])
    ours = other.get_vocab()
    swapped = type("Tokenizer", (), {"get_vocab": lambda self: {**ours, "!": ours["\""], "\"": ours["!"]}})()
    with pytest.raises(ModelError, match="other has another tokenizer.*2 of .* tokens differ.*synthesize"):
        take(padded(512), swapped, student={"model": "other"})


def test_a_student_larger_than_its_teacher_is_allowed_and_said(tmp_path):
    six = {"config": {"num_hidden_layers": 6}}
    offline = {"offline": {"k": 4}, "signals": Shared(tmp_path / "key", {"teacher": "t"})}
    for more in ({}, offline, offline):  # the last one reads what the one before it left
        work = take(student=six, max_steps=1, **more)
        assert sum("more than its teacher's" in event and "allowed" in event for event in work.events) == 1
    assert not any("more than its teacher's" in event for event in take(max_steps=1).events)


def test_matrices_between_widths_are_trained_and_not_shipped(tmp_path):
    work = take(student={"config": {"hidden_size": 64, "num_attention_heads": 2}}, hidden_weight=1.0,
                attention_weight=0.5, max_steps=6)
    assert work.loss[-1][1] < work.loss[0][1]
    assert not hasattr(work.model, PROJECTION) and not any(PROJECTION in name for name in work.model.state_dict())
    work.save(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.hidden_size == 64


@pytest.mark.parametrize("packing", [True, False])
def test_states_and_attention_of_the_teacher_itself_add_nothing(packing):
    teacher = twin("llama")[0]
    work = take(parent=teacher, hidden_weight=3.0, attention_weight=3.0, packing=packing, max_steps=1)
    assert work.loss[0][1] == pytest.approx(0, abs=1e-5)
    assert take(hidden_weight=0.0, attention_weight=3.0, packing=packing, max_steps=1).loss[0][1] > take(
        packing=packing, max_steps=1).loss[0][1]


def test_a_student_with_other_padding_is_scored_and_explained_beside_its_teacher(tmp_path):
    place = workplace(tmp_path)
    padded(640).save_pretrained(place / "other")
    tokenizer().save_pretrained(place / "other")
    step = {**STEP, "teacher": "tuned", "data": "train", "student": {"model": "other"}}
    variants = {"tuned": TUNED, "s": {"distill": step}, "offline": {"distill": {**step, "offline": {"k": 8}}}}
    result = llmops.run(parse_recipe(recipe(variants), base_dir=place), runs=tmp_path / "runs")
    rows = {row["identity"]["variant"]: row for row in result.rows}
    assert [rows[name]["status"]["state"] for name in variants] == ["ok"] * 3
    assert rows["s"]["tokens"]["base"]["kl_mean"]["value"] > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "r" / "s").config.vocab_size == 640
    found = explain(str(tmp_path / "runs"), "r", "s", "tuned", items=2)
    assert "of type qwen2 and llama" in found["layers"]["not_swapped"]


def test_another_tokenizer_is_refused_before_anything_is_built(tmp_path):
    place = workplace(tmp_path)
    other = tokenizer()
    body = other.backend_tokenizer.to_str().replace('"<|user|>"', '"<|human|>"')
    padded(512).save_pretrained(place / "other")
    other.save_pretrained(place / "other")
    (place / "other" / "tokenizer.json").write_text(body)
    variants = {"tuned": TUNED, "s": {"distill": {**STEP, "teacher": "tuned", "data": "train",
                                                  "student": {"model": "other"}}}}
    with pytest.raises(ModelError, match='variant s: other has another tokenizer: token 3 is "<|user|>"'.replace(
            "|", r"\|")):
        llmops.run(parse_recipe(recipe(variants), base_dir=place), runs=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("store/*"))
