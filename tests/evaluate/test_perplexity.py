import json
import math

import pytest
import torch
from tests.twins import tokens, twin
from torch.nn.functional import cross_entropy

from llmops.data.render import text_stream
from llmops.data.sources import Rows
from llmops.errors import DataError, LlmopsError
from llmops.evaluate import EVALUATORS, live
from llmops.evaluate.options import Perplexity
from llmops.evaluate.perplexity import score_stream, windows
from llmops.evaluate.statistics import paired, weighted_mean

STREAM = tokens(1, 1000, seed=3)[0].tolist()


def scored(model, tokenizer, stream=None, **options):
    return score_stream(model, tokenizer, STREAM if stream is None else stream, Perplexity(data="test", **options),
                        id="perplexity:test")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_windows_of_the_papers_equal_a_plain_loop(name):
    """GPTQ's own loop: loss x length summed over the windows, divided by all their tokens, exponentiated."""
    model, tokenizer = twin(name, torch.float32)
    length, total = 96, 0.0
    count = len(STREAM) // length
    with torch.no_grad():
        for i in range(count):
            batch = torch.tensor([STREAM[i * length:(i + 1) * length]])
            loss = cross_entropy(model(batch).logits[0, :-1].double(), batch[0, 1:])
            total += float(loss) * length
    score = scored(model, tokenizer, context=length, batch_size=4)
    assert score.value.value == pytest.approx(math.exp(total / (count * length)), rel=1e-6)
    assert score.protocol | {"tokenizer_sha256": ""} == {
        "id": "perplexity/gptq", "aggregation": "exp_mean", "context": 96, "stride": 96, "context_asked": 96,
        "separator": "blank_line",
        "bos": "none", "tokens": count * 95, "windows": count, "dtype": "float32", "tokenizer_sha256": ""}


def test_sliding_windows_equal_one_token_at_a_time():
    model, tokenizer = twin("llama", torch.float32)
    stream, context, stride = STREAM[:150], 64, 24
    losses = []
    with torch.no_grad():
        for place in range(1, len(stream)):
            end = next(end for _, end, first in windows(150, context, stride) if first <= place < end)
            start = max(0, end - context)
            assert place - start >= min(place, context - stride)  # what each token may look back on
            logits = model(torch.tensor([stream[start:place]])).logits[0, -1].double()
            losses.append(float(cross_entropy(logits[None], torch.tensor([stream[place]]))))
    score = scored(model, tokenizer, stream, context=context, stride=stride)
    assert score.value.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert score.protocol["tokens"] == 149 and score.protocol["id"] == "perplexity/sliding"


@pytest.mark.parametrize("length, context, stride", [(64, 64, 1), (65, 64, 64), (1000, 64, 10), (100, 99, 50)])
def test_a_stride_scores_every_token_once(length, context, stride):
    cut = windows(length, context, stride)
    assert [place for _, end, first in cut for place in range(first, end)] == list(range(1, length))
    assert all(end - start == context for start, end, _ in cut)


def test_neither_batch_size_nor_memory_limit_changes_a_score(monkeypatch):
    model, tokenizer = twin("llama", torch.float32)
    whole = scored(model, tokenizer, context=50, batch_size=8)
    monkeypatch.setattr(live, "MAX_LOGITS", 2 * 50 * 512)
    monkeypatch.setattr(live, "SLICE", 7 * 512)
    seen, original = [], model.forward

    def forward(input_ids, use_cache):
        seen.append(len(input_ids))
        return original(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", forward)
    cut = scored(model, tokenizer, context=50, batch_size=8)
    assert set(seen) == {2} and len(seen) == 10
    assert cut.value.value == pytest.approx(whole.value.value, rel=1e-6)
    assert [item.id for item in cut.items] == [item.id for item in whole.items]


def test_the_context_is_capped_at_the_models_and_the_protocol_says_so():
    model, tokenizer = twin("llama", torch.float32)
    score = scored(model, tokenizer, context=2048)
    assert (score.protocol["context"], score.protocol["context_asked"], score.protocol["windows"]) == (256, 2048, 3)


def test_the_interval_is_over_windows_on_the_log():
    model, tokenizer = twin("llama", torch.float32)
    score = scored(model, tokenizer, context=100)
    mean, stderr, (low, high) = weighted_mean([item.score for item in score.items])
    assert score.value.ci95 == pytest.approx((math.exp(low), math.exp(high))) and score.value.n == 10
    assert score.stderr == pytest.approx(math.exp(mean) * stderr)
    assert [item.detail["start"] for item in score.items] == list(range(0, 1000, 100))
    assert scored(model, tokenizer, STREAM[:100], context=100).value.ci95 is None  # one window, no interval


def test_max_tokens_and_bos():
    model, tokenizer = twin("llama", torch.float32)
    tokenizer.bos_token = "<|system|>"
    score = scored(model, tokenizer, [tokenizer.bos_token_id, *STREAM], context=50, max_tokens=120)
    assert score.protocol["windows"] == 2 and score.protocol["bos"] == "at the start of the stream"


def test_a_changed_model_pairs_with_its_parent_window_by_window():
    model, tokenizer = twin("llama", torch.float32)
    parent = scored(model, tokenizer, context=40)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    variant = scored(model, tokenizer, context=40)
    found, a, b = paired(variant, parent, 0), variant.value.value, parent.value.value
    assert found["ratio"].value == pytest.approx(a / b) and found["delta"].value == pytest.approx(a - b)
    low, high = found["delta"].ci95
    assert low < a - b < high and found["gained"] + found["lost"] == found["n"] == 25


def test_rows_of_text_through_the_data_room():
    model, tokenizer = twin("llama", torch.float32)
    texts = ["The old river runs north.", "Every clock counts to 1234567890."] * 4
    seen = []
    [score] = EVALUATORS["perplexity"](model, tokenizer, Rows("test", "text", [{"text": text} for text in texts]),
                                       Perplexity(data="test", context=16, batch_size=1), id="perplexity:test", seed=0,
                                       progress=lambda done, total: seen.append((done, total)))
    ids = tokenizer("\n\n".join(texts)).input_ids
    assert score.value.value == scored(model, tokenizer, ids, context=16, batch_size=1).value.value
    assert seen[-1] == (len(ids) // 16, len(ids) // 16)


def test_a_model_of_nan_has_no_perplexity_and_its_row_can_be_stored():
    model, tokenizer = twin("llama", torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    score = scored(model, tokenizer, context=100)
    assert score.value.value is None and "not finite in 10 of 10" in score.value.method and score.stderr is None
    assert "NaN" not in json.dumps([score.as_dict(), *[item.as_dict() for item in score.items]], allow_nan=False)


def test_too_little_text_and_too_long_a_stride_are_refused():
    model, tokenizer = twin("llama", torch.float32)
    with pytest.raises(DataError, match="the text has 60 tokens, one window needs 64.*lower context to 60"):
        scored(model, tokenizer, STREAM[:60], context=64)
    with pytest.raises(DataError, match=r"has 16 tokens \(max_tokens is 16\)"):
        scored(model, tokenizer, context=64, max_tokens=16)
    with pytest.raises(LlmopsError, match="stride 300 is longer than the window of 256"):
        scored(model, tokenizer, context=512, stride=300)


def test_texts_may_be_joined_by_the_end_token():
    _, tokenizer = twin("llama", torch.float32)
    documents = Rows("d", "text", [{"text": "one lake"}, {"text": "two towns"}])
    first, second = (tokenizer(row["text"]).input_ids for row in documents.rows)
    assert text_stream(documents, tokenizer, "eos") == [*first, tokenizer.eos_token_id, *second]
    blank = tokenizer("one lake\n\ntwo towns").input_ids
    assert text_stream(documents, tokenizer) == blank
