import copy
import re
from types import SimpleNamespace

import pytest
import torch
from tests.twins import NAMES, tokenizer, twin
from torch import nn
from transformers import GenerationConfig, LlamaConfig

from llmops.data.render import Prompt
from llmops.data.sources import Rows
from llmops.errors import DataError, LlmopsError
from llmops.evaluate import EVALUATORS
from llmops.evaluate.exact_match import extracted, greedy, normalized, score_prompts
from llmops.evaluate.live import item_id, scoring
from llmops.evaluate.options import ExactMatch


class Parrot(nn.Module):
    """Writes the text it is given for the last token of a prompt, then stops."""

    def __init__(self, tokenizer, answers, limit=256):
        super().__init__()
        self.config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=limit)
        self.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        self.dtype, self.anchor = torch.float32, nn.Parameter(torch.zeros(1))
        self.answers = {tokenizer(key).input_ids[-1]: [*tokenizer(text).input_ids, tokenizer.eos_token_id]
                        for key, text in answers.items()}
        self.calls = []

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, use_cache=None):
        self.calls.append(len(input_ids))
        if past_key_values is None:
            assert (attention_mask[:, -1] == 1).all() and (position_ids[:, 0] == 0).all()  # padded on the left
            past_key_values = Script([list(self.answers[int(row[-1])]) for row in input_ids])
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, rest in enumerate(past_key_values.rest):
            logits[row, -1, rest.pop(0) if rest else 7] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


class Script:
    def __init__(self, rest):
        self.rest = rest

    def batch_select_indices(self, indices):
        self.rest = [self.rest[i] for i in indices.tolist()]


QUESTIONS = {"k0": "ten", "k1": "The River.", "k2": "a bridge is old", "k4": "Answer: 12\n#### 1,234", "k6": ""}


def asked(names, made):
    return [Prompt(made(f"Every clock {name}" if name != "k1" else name).input_ids, name, "", i)
            for i, name in enumerate(names)]


def options(**changes):
    return ExactMatch(data="test", **changes)


def test_answers_are_scored_and_kept_in_order():
    made = tokenizer()
    prompts = asked(list(QUESTIONS), made)
    score = score_prompts(Parrot(made, QUESTIONS), made, prompts, ["ten", "river", "a bridge is new", "1234", "x"],
                          options(batch_size=2), id="exact_match:test")
    assert [item.answer for item in score.items] == [text.strip() for text in QUESTIONS.values()]
    assert [item.score for item in score.items] == [1, 1, 0, 0, 0]
    assert [item.id for item in score.items] == [item_id(prompt.input_ids) for prompt in prompts]
    assert score.items[2].detail == {"expected": "a bridge is new", "correct": False}
    assert score.value.value == 0.4 and score.value.n == 5 and score.value.ci95[0] < 0.4 < score.value.ci95[1]
    assert score.stderr == pytest.approx((0.4 * 0.6 / 4) ** 0.5)


def test_extract_takes_the_answer_on_both_sides():
    made = tokenizer()
    score = score_prompts(Parrot(made, QUESTIONS), made, asked(["k4", "k0"], made), ["2 + 2\n#### 1234", "#### ten"],
                          options(extract="#### (.+)"), id="exact_match:test")
    assert [(item.answer, item.score) for item in score.items] == [("1,234", 1), ("", 0)]
    assert score.items[0].detail["expected"] == "1234" and score.items[0].detail["text"].startswith("Answer: 12")


def test_any_of_several_references_is_right_and_normalisation_can_be_off():
    made = tokenizer()
    model = Parrot(made, QUESTIONS)
    prompts = asked(["k1"], made)
    assert score_prompts(model, made, prompts, [["Lake", "river"]], options(), id="x").value.value == 1
    assert score_prompts(model, made, prompts, ["river"], options(normalize=False), id="x").value.value == 0
    assert score_prompts(model, made, prompts, ["The River."], options(normalize=False), id="x").value.value == 1


def test_finished_rows_leave_the_batch():
    made = tokenizer()
    model = Parrot(made, QUESTIONS)
    score_prompts(model, made, asked(list(QUESTIONS), made), ["x"] * 5, options(batch_size=5), id="x")
    assert model.calls[0] == 5 and model.calls[-1] == 1
    assert len(model.calls) == max(len(answer) for answer in model.answers.values())


@pytest.mark.parametrize("text, expected", [
    ("The  quick, brown FOX!", "quick brown fox"), ("An apple a day", "apple day"), ("theatre", "theatre"),
    ("1.5", "1.5"), ("-3", "-3"), ("3-4", "34"), ("It is 3.", "it is 3"), ("1,234,567", "1234567"), ("a, b", "b"),
    ("“Ωmega”…", "ωmega"), ("$5", "5"), ("  ", "")])
def test_normalisation(text, expected):
    assert normalized(text) == expected
    assert normalized(normalized(text)) == normalized(text) or text == "a, b"


def test_a_reference_that_normalises_to_nothing_is_compared_as_it_is():
    made = tokenizer()
    model = Parrot(made, {"k0": "...", "k2": "the"})
    score = score_prompts(model, made, asked(["k0", "k2"], made), ["...", "..."], options(), id="x")
    assert [item.score for item in score.items] == [1, 0]


@pytest.mark.parametrize("pattern, expected", [(r"#### (.+)", "42"), (r"\d+", "17"), (r"none (.)", None)])
def test_extracted(pattern, expected):
    assert extracted("17 apples\n#### 42 \n#### 9", re.compile(pattern)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_generate_on_real_architectures(name):
    """Prompts from 3 to 70 tokens in one batch, past the twins' sliding windows, against one prompt at a time."""
    model, made = twin(name, torch.float32)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 512, (n,), generator=draw).tolist() for n in (3, 70, 9, 40, 17)]
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        plain = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=1, pad_token_id=0)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
        alone.append(whole[0, ids.shape[1]:].tolist())
    with scoring(model):
        assert greedy(model, prompts, stops={1}, pad=0, max_new_tokens=24) == alone
        # some rows end early, so that the batch is cut while others go on
        stops = {1, *(alone[row][end] for row, end in ((0, 2), (1, 5), (2, 1)) if end < len(alone[row]))}
        short = greedy(model, prompts, stops=stops, pad=0, max_new_tokens=24)
    for ids, whole in zip(short, alone, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), len(whole) - 1)
        assert ids == whole[:end + 1]


def test_the_batch_size_changes_nothing():
    model, made = twin("llama", torch.float32)
    texts = [f"{a} {b} {c}" for a in ("The old", "Every") for b in ("river", "garden in the sea")
             for c in ("", "north", "1234")]
    rows = Rows("test", "messages", [{"messages": [{"role": "user", "content": text},
                                                   {"role": "assistant", "content": "x"}]} for text in texts])
    runs = [EVALUATORS["exact_match"](model, made, rows, options(batch_size=size), id="exact_match:test", seed=0,
                                      progress=None)[0] for size in (1, 8, 64)]
    assert runs[0].items == runs[1].items == runs[2].items
    assert len({item.answer for item in runs[0].items}) > 1


def test_rows_their_answers_and_progress():
    made = tokenizer()
    made.chat_template = None
    model, seen = Parrot(made, QUESTIONS), []
    rows = Rows("test", "prompt_completion", [{"prompt": "Every clock k0", "completion": "wrong", "answer": "ten"},
                                              {"prompt": "clock k1", "completion": "river"}])
    [score] = EVALUATORS["exact_match"](model, made, rows, options(batch_size=1), id="exact_match:test", seed=0,
                                        progress=lambda done, total: seen.append((done, total)))
    assert [item.score for item in score.items] == [1, 1] and score.items[0].detail["expected"] == "ten"
    assert seen == [(1, 2), (2, 2)]


def test_model_and_tokenizer_are_left_as_they_were():
    """A checkpoint that samples, with a repetition penalty, is scored greedily without one, and keeps both."""
    model, made = twin("llama", torch.float32)
    plain = score_prompts(model, made, [Prompt([9, 9, 9], "", "", 0)], ["x"], options(), id="x")
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=5.0,
                                               eos_token_id=[1])
    model.train()
    before = copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict(), made.padding_side))
    again = score_prompts(model, made, [Prompt([9, 9, 9], "", "", 0)], ["x"], options(), id="x")
    assert again.items == plain.items and model.training
    assert before == (model.config.to_dict(), model.generation_config.to_dict(), made.padding_side)


def test_what_cannot_be_scored_is_refused():
    made = tokenizer()
    model = Parrot(made, QUESTIONS, limit=40)
    text = Rows("test", "text", [{"text": "a"}])
    with pytest.raises(DataError, match='test: exact_match needs messages .* not "text"'):
        EVALUATORS["exact_match"](model, made, text, options(), id="exact_match:test")
    with pytest.raises(DataError, match="no prompt to answer"):
        score_prompts(model, made, [], [], options(), id="exact_match:test")
    with pytest.raises(DataError, match=r"does not match the reference answer 'ten'"):
        score_prompts(model, made, asked(["k0"], made), ["ten"], options(extract="#### (.+)"), id="exact_match:test")
    with pytest.raises(DataError, match="max_new_tokens 32 too many for the model's 40 positions"):
        score_prompts(model, made, [Prompt([9] * 20, "", "", 0)], ["x"], options(), id="exact_match:test")
    broken = options().model_copy(update={"extract": "("})
    with pytest.raises(LlmopsError, match="not a regular expression"):
        score_prompts(model, made, asked(["k0"], made), ["ten"], broken, id="exact_match:test")
