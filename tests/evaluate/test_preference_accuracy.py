import pytest
import torch
from tests.twins import twin

from llmops.data.sources import Rows, rows_from
from llmops.errors import DataError
from llmops.evaluate import EVALUATORS, live
from llmops.evaluate.options import PreferenceAccuracy
from llmops.evaluate.statistics import paired

PAIRS = [{"prompt": "The old river runs", "chosen": "north", "rejected": "north and far away to the sea"},
         {"prompt": "A bridge", "chosen": "stands near the sea", "rejected": "old"},
         {"prompt": "Every clock counts to", "chosen": "1234567890", "rejected": "7"}]


def evaluate(model, tokenizer, given=PAIRS, **options):
    rows = given if isinstance(given, Rows) else rows_from("test", given)
    return EVALUATORS["preference_accuracy"](model, tokenizer, rows, PreferenceAccuracy(data="test", **options),
                                             id="preference_accuracy:test", seed=0, progress=None)[0]


def log_p(model, prompt: list[int], answer: list[int]) -> float:
    """By brute force, the whole sequence at once."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))


@pytest.mark.parametrize("by_tokens", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_likelier_answer_with_its_terminator_by_brute_force(name, by_tokens):
    model, tokenizer = twin(name, torch.float32)
    score = evaluate(model, tokenizer, length_normalized=by_tokens, batch_size=2)
    right = []
    for item, row in zip(score.items, PAIRS, strict=True):
        prompt = tokenizer(f"<|user|>{row['prompt']}<|end|><|assistant|>", add_special_tokens=False).input_ids
        answers = [tokenizer(row[side] + "<|end|>", add_special_tokens=False).input_ids
                   for side in ("chosen", "rejected")]
        found = [log_p(model, prompt, answer) for answer in answers]
        assert item.detail["loglikelihoods"] == pytest.approx(found, rel=1e-5)
        values = [value / len(answer) if by_tokens else value for value, answer in zip(found, answers, strict=True)]
        right.append(float(values[0] > values[1]))
        assert item.score == right[-1] and item.answer == ("chosen" if right[-1] else "rejected")
        assert item.detail["margin"] == pytest.approx(values[0] - values[1], rel=1e-4)
        assert item.id == live.item_id(*(prompt + answer for answer in answers))
    assert score.value.value == pytest.approx(sum(right) / 3) and score.value.n == 3
    assert score.value.ci95 and score.value.unit == "fraction"


def test_swapping_the_sides_turns_every_answer_round():
    model, tokenizer = twin("llama", torch.float32)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    forth, back = evaluate(model, tokenizer), evaluate(model, tokenizer, swapped)
    assert [item.score for item in back.items] == [1 - item.score for item in forth.items]


def test_the_turns_of_an_answer_count_and_what_stands_between_them_does_not():
    model, tokenizer = twin("llama", torch.float32)
    turns = [{"role": "assistant", "content": "north"}, {"role": "user", "content": "or not"},
             {"role": "assistant", "content": "far away"}]
    row = {"prompt": [{"role": "user", "content": "Where to"}], "chosen": turns,
           "rejected": [{"role": "assistant", "content": "the sea"}]}
    item = evaluate(model, tokenizer, [row]).items[0]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (
        "<|user|>Where to<|end|><|assistant|>", "north<|end|>", "<|user|>or not<|end|><|assistant|>",
        "far away<|end|>")]
    expected = log_p(model, ids[0], ids[1]) + log_p(model, [*ids[0], *ids[1], *ids[2]], ids[3])
    assert item.detail["loglikelihoods"][0] == pytest.approx(expected, rel=1e-5)


def test_two_models_are_compared_pair_by_pair():
    (first, tokenizer), (second, _) = twin("llama", torch.float32), twin("llama", torch.float32, seed=5)
    many = [{"prompt": f"Clock {number}", "chosen": "old" + " sea" * (number % 3), "rejected": f"north {number}"}
            for number in range(20)]
    one, other = evaluate(first, tokenizer, many), evaluate(second, tokenizer, many)
    found = paired(one, other, 0)
    assert found["delta"].value == pytest.approx(one.value.value - other.value.value)
    assert found["gained"] - found["lost"] == round(20 * found["delta"].value) and found["mcnemar_p"] is not None


def test_a_ruined_model_prefers_nothing():
    model, tokenizer = twin("llama", torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    score = evaluate(model, tokenizer)
    assert [item.score for item in score.items] == [0.0] * 3 and score.items[0].detail["loglikelihoods"] == [None, None]


@pytest.mark.parametrize(("given", "said"), [
    ([{"prompt": "a", "completion": "b"}], 'needs prompt, chosen and rejected, not "prompt_completion"'),
    ([*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}], "test:4: both answers are the same text.*1 such pairs"),
    ([{"prompt": "a " * 300, "chosen": "b", "rejected": "c"}], "more than the model's 256 positions"),
    (Rows("test", "preference", []), "no pair to compare")])
def test_what_cannot_be_compared_is_refused(given, said):
    model, tokenizer = twin("llama", torch.float32)
    with pytest.raises(DataError, match=said):
        evaluate(model, tokenizer, given)
