import math

import pytest
import torch
from tests.twins import twin

from llmops.data.sources import Rows
from llmops.errors import DataError
from llmops.evaluate import EVALUATORS, live
from llmops.evaluate.multiple_choice import loglikelihoods
from llmops.evaluate.options import MultipleChoice

QUESTIONS = [
    {"question": "The old river runs", "choices": ["north", "north and far away to the sea", "1234"], "answer": 0},
    {"question": "A bridge", "choices": ["stands near the sea", "old"], "answer": 1},
    {"question": "Every clock counts to", "choices": ["7", "1234567890", "the garden", "ä"], "answer": 1},
]


def rows(changed=QUESTIONS):
    return Rows("test", "choices", list(changed))


def evaluate(model, tokenizer, given=None, **options):
    return EVALUATORS["multiple_choice"](model, tokenizer, given or rows(), MultipleChoice(data="test", **options),
                                         id="multiple_choice:test", seed=0, progress=None)[0]


def brute_force(model, prompt, choice):
    """log p(choice | prompt), the whole sequence at once and one token at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(choice))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("chat", [True, False])
def test_loglikelihoods_equal_brute_force(name, chat):
    model, tokenizer = twin(name, torch.float32)
    if not chat:
        tokenizer.chat_template = None
    score = evaluate(model, tokenizer, batch_size=5)
    for item, row in zip(score.items, QUESTIONS, strict=True):
        text, glue = (f"<|user|>{row['question']}<|end|><|assistant|>", "") if chat else (row["question"], " ")
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        choices = [tokenizer(glue + choice, add_special_tokens=False).input_ids for choice in row["choices"]]
        expected = [brute_force(model, prompt, choice) for choice in choices]
        assert item.detail["loglikelihoods"] == pytest.approx(expected, rel=1e-5)
        assert item.answer == row["choices"][expected.index(max(expected))]
        assert item.id == live.item_id(*(prompt + choice for choice in choices))


def test_choices_are_scored_in_the_tokens_that_replies_are_trained_in():
    model, tokenizer = twin("llama", torch.float32)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- message['content'] + '<|end|>' -}}", "{{- ' ' + message['content'] + '<|end|>' -}}")
    for item, row in zip(evaluate(model, tokenizer).items, QUESTIONS, strict=True):
        for choice, found in zip(row["choices"], item.detail["loglikelihoods"], strict=True):
            chat = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": choice}]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            opening = text.rindex("<|assistant|>") + len("<|assistant|>")
            prompt = tokenizer(text[:opening], add_special_tokens=False).input_ids
            whole = tokenizer(text.removesuffix("<|end|>"), add_special_tokens=False).input_ids
            assert whole[:len(prompt)] == prompt
            start = len(prompt)  # the space stands inside {% generation %}, so it is trained and scored
            assert found == pytest.approx(brute_force(model, whole[:start], whole[start:]), rel=1e-4)


def test_dividing_by_bytes_is_what_acc_norm_does():
    model, tokenizer = twin("llama", torch.float32)
    plain, by_bytes = evaluate(model, tokenizer), evaluate(model, tokenizer, length_normalized=True)
    for item, row in zip(by_bytes.items, QUESTIONS, strict=True):
        values = [value / len(choice.encode()) for value, choice in
                  zip(item.detail["loglikelihoods"], row["choices"], strict=True)]
        assert item.detail["choice"] == values.index(max(values))
        assert item.score == float(item.detail["choice"] == row["answer"])
    assert [i.answer for i in plain.items] != [i.answer for i in by_bytes.items]
    assert plain.protocol["normalization"] == "none" and by_bytes.protocol["normalization"] == "bytes"


def test_neither_batch_size_nor_memory_limit_changes_a_score(monkeypatch):
    model, tokenizer = twin("llama", torch.float32)
    whole = evaluate(model, tokenizer)
    sizes = []
    monkeypatch.setattr(live, "MAX_LOGITS", 40 * 512)
    original = model.forward

    def forward(input_ids, attention_mask, use_cache, logits_to_keep):
        sizes.append(input_ids.numel())
        return original(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache,
                        logits_to_keep=logits_to_keep)

    monkeypatch.setattr(model, "forward", forward)
    cut = evaluate(model, tokenizer)
    assert max(sizes) <= 40 < sum(sizes) and len(sizes) > 1
    for item, other in zip(whole.items, cut.items, strict=True):
        assert item.detail["loglikelihoods"] == pytest.approx(other.detail["loglikelihoods"], rel=1e-5)
        assert (item.id, item.answer, item.score) == (other.id, other.answer, other.score)


def test_progress_counts_sequences():
    model, tokenizer = twin("llama", torch.float32)
    seen = []
    loglikelihoods(model, [([9, 8], [7]), ([9], [8, 7, 6]), ([5], [6])], batch_size=2,
                   progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)] and tokenizer is not None


def test_a_model_of_nan_answers_nothing_and_its_items_can_be_stored():
    model, tokenizer = twin("llama", torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    score = evaluate(model, tokenizer)
    assert score.value.value == 0 and [item.answer for item in score.items] == ["", "", ""]
    assert score.items[0].detail["loglikelihoods"] == [None, None, None]


@pytest.mark.parametrize("given, message", [
    (Rows("test", "text", [{"text": "a"}]), 'needs question, choices and answer, not "text"'),
    (Rows("test", "choices", []), "no question to answer"),
    (rows([*QUESTIONS, {"question": "x", "choices": ["a"], "answer": 0}]), "row 4: 1 choices and answer 0"),
    (rows([{"question": "x", "choices": ["a", "b"], "answer": 2}]), "row 1: 2 choices and answer 2"),
    (rows([{"question": "x", "choices": ["a", ""], "answer": 0}]), "row 1: the question or a choice is empty"),
    (rows([{"question": "x " * 300, "choices": ["a", "b"], "answer": 0}]), "model's 256 positions"),
])
def test_what_cannot_be_scored_is_refused(given, message):
    model, tokenizer = twin("llama", torch.float32)
    with pytest.raises(DataError, match=message):
        EVALUATORS["multiple_choice"](model, tokenizer, given, MultipleChoice(data="test"), id="multiple_choice:test")
