"""Answers that the student draws itself."""

from collections import Counter

import pytest
import torch
from tests.twins import twin

import llmops
from llmops.build.on_policy import MOST_EMPTY, drawer, examples_of
from llmops.build.teaching import Stopwatch, live_loss
from llmops.errors import StepError
from llmops.methods.distill.options import Logits, OnPolicy
from llmops.models.packed_rows import use_packed_attention
from llmops.train.rows import IGNORED, token_rows

EXAMPLES = [{"input_ids": [5 + n, 6, 7, 8, 9, 1], "labels": [IGNORED] * 3 + [8, 9, 1]} for n in range(4)]
STEP = {"method": "logits", "teacher": "t", "data": "d", "max_steps": 2, "learning_rate": 1e-3, "batch_size": 2}
ROWS = [{"prompt": f"where is {number}", "completion": f"in town {number}"} for number in range(6)]


def drawn(student, words, **options):
    return drawer(student, words, OnPolicy(**options), 512, student.config._attn_implementation)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_come_out_of_a_batch_as_they_went_in(packed):
    mixed = [*EXAMPLES, {"input_ids": [9, 8, 7], "labels": [IGNORED, 8, 7]}]
    assert examples_of(token_rows(mixed, pad_id=0, packed=packed).batch(range(5))) == mixed


@pytest.mark.parametrize("packed", [True, False])
def test_prompts_stay_and_answers_are_the_students_own(packed):
    student, words = twin("llama", torch.float32)
    batch = token_rows(EXAMPLES, pad_id=0, packed=packed).batch(range(4))
    say = drawn(student, words, fraction=1.0, max_new_tokens=3, temperature=1e-4)  # as good as greedy
    torch.manual_seed(0)
    found = examples_of(say(student, batch))
    for row, before in zip(found, EXAMPLES, strict=True):
        prompt = before["input_ids"][:3]
        with torch.no_grad():
            told = student.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3, dtype=torch.long),
                                    max_new_tokens=3, do_sample=False)
        assert row["input_ids"] == told[0].tolist()
        assert row["labels"] == [IGNORED] * 3 + row["input_ids"][3:]
    assert say.drawn == 4 and say.tokens == sum(len(row["input_ids"]) - 3 for row in found)


def test_answers_are_drawn_as_often_as_the_student_thinks_them_likely():
    student, words = twin("llama", torch.float32)
    batch = token_rows(EXAMPLES[:1] * 400, pad_id=0).batch(range(400))
    torch.manual_seed(0)
    first = Counter(row["input_ids"][3] for row in
                    examples_of(drawn(student, words, fraction=1.0, max_new_tokens=1, temperature=0.5)(student, batch)))
    with torch.no_grad():
        p = (student(input_ids=torch.tensor([EXAMPLES[0]["input_ids"][:3]])).logits[0, -1] / 0.5).softmax(-1)
    for token in p.topk(3).indices.tolist():
        expected = float(p[token])
        assert abs(first[token] / 400 - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_a_share_of_the_rows_draws_and_the_same_ones_for_the_same_seed():
    student, words = twin("llama", torch.float32)
    batch = token_rows(EXAMPLES * 25, pad_id=0).batch(range(100))
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(examples_of(drawn(student, words, fraction=0.3, max_new_tokens=2)(student, batch)))
    assert made[0] == made[1] != made[2]
    kept = sum(row == before for row, before in zip(made[0], EXAMPLES * 25, strict=True))
    assert 55 <= kept <= 85


def test_a_pass_counts_as_the_data_said_whatever_was_drawn():
    teacher, words = twin("llama", torch.float32)
    student, _ = twin("llama", torch.float32, seed=5)
    options = Logits(**{**STEP, "on_policy": {"fraction": 1.0, "max_new_tokens": 5}})
    batch = token_rows(EXAMPLES, pad_id=0).batch(range(4))
    say = drawn(student, words, fraction=1.0, max_new_tokens=5)
    with use_packed_attention(teacher), use_packed_attention(student), \
            live_loss(teacher, student, options, 512, Stopwatch(torch.device("cpu")), drawn=say) as loss, \
            live_loss(teacher, student, options, 512, Stopwatch(torch.device("cpu"))) as plain:
        torch.manual_seed(3)
        found = float(loss(student, batch).detach())
        torch.manual_seed(3)
        own = say(student, batch)
        count = int((own["labels"][:, 1:] != IGNORED).sum())
        assert found == pytest.approx(float(plain(student, own).detach()) * 12 / count, rel=1e-5)
        with torch.no_grad():  # a look at held-out rows takes them as they are
            assert float(loss(student, batch)) == float(plain(student, batch))


def test_a_student_that_ends_every_answer_at_once_is_an_error_with_advice():
    student, words = twin("llama-untied-bias", torch.float32)
    with torch.no_grad():
        student.lm_head.weight.zero_()
        student.lm_head.weight[1] = 10.0 * torch.sign(torch.randn(128))  # the end, or never the end
    say = drawn(student, words, fraction=1.0, max_new_tokens=4)
    say._empty_now = MOST_EMPTY - 4
    say.stops = set(range(512))
    with pytest.raises(StepError, match=f"last {MOST_EMPTY} answers drawn from the student were empty.*train it on"):
        say(student, token_rows(EXAMPLES, pad_id=0).batch(range(4)))


def test_a_prompt_that_fills_the_context_and_text_without_a_question_are_refused():
    student, words = twin("llama", torch.float32)
    long = {"input_ids": list(range(5, 262)), "labels": [IGNORED] * 256 + [261]}
    with pytest.raises(StepError, match="fills the student's context of 256"):
        drawn(student, words, fraction=1.0)(student, token_rows([long], pad_id=0).batch([0]))
    with pytest.raises(StepError, match="plain text, which asks nothing"):
        llmops.apply(student, words, {"distill": {**STEP, "on_policy": {}}}, [{"text": "hello there"}],
                     teacher=twin("llama")[0])


def test_a_step_on_policy_trains_and_does_so_again_alike():
    teacher, words = twin("llama")
    step = {"distill": {**STEP, "loss": "reverse_kl", "on_policy": {"fraction": 0.5, "max_new_tokens": 4}}}
    made = [llmops.apply(twin("llama", seed=5)[0], words, step, ROWS, teacher=teacher) for _ in range(2)]
    weights = [dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"] for model in made]
    before = dict(twin("llama", seed=5)[0].named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(*weights) and not torch.equal(weights[0], before)
