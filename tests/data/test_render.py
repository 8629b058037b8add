"""Rows to tokens: what is framed, cut, dropped and counted; streams, crops and batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.data.makers import (
    SENTENCES,
    chat,
    choice_rows,
    make_tokenizer,
    message_rows,
    pair_rows,
    text_rows,
    trained,
)

from llmops.data.options import Limits
from llmops.data.render import (
    IGNORED,
    answer_crops,
    calibration_tokens,
    check_crop,
    choice_examples,
    collate,
    encode,
    prompts_and_answers,
    sequences,
    text_stream,
)
from llmops.data.sources import Rows
from llmops.errors import DataError

STRICT = Limits(dropped=0.0, truncated=0.0)
LOOSE = Limits(dropped=1.0, truncated=1.0)
POEM = "\n".join(SENTENCES[:6])


# prompt and completion -----------------------------------------------------------------------------------------------


def test_pairs_become_turns_where_there_is_a_template() -> None:
    tokenizer = make_tokenizer("chatml")
    pairs = encode(pair_rows(("Two and three?", "Five.")), tokenizer, max_length=64, limits=STRICT)
    turns = encode(message_rows(chat("Two and three?", "Five.")), tokenizer, max_length=64, limits=STRICT)
    assert pairs.examples == turns.examples
    assert trained(pairs.examples[0], tokenizer) == ["Five.<|im_end|>"]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_pairs_without_a_template_are_prompt_completion_and_eos(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    result = encode(pair_rows(("Two and three?", " Five, naïve ☂.")), tokenizer, max_length=64, limits=STRICT)
    (example,) = result.examples
    assert tokenizer.decode(example["input_ids"]) == ("<s>" if adds_bos else "") + "Two and three? Five, naïve ☂.</s>"
    assert trained(example, tokenizer) == [" Five, naïve ☂.</s>"]
    (prompt,) = prompts_and_answers(pair_rows(("Two and three?", " Five, naïve ☂.")), tokenizer)
    assert example["input_ids"][:len(prompt.input_ids)] == prompt.input_ids
    assert prompt.input_ids == tokenizer("Two and three?")["input_ids"] and prompt.answer == " Five, naïve ☂."


# text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("max_length", [2, 7, 16, 1000])
def test_windows_hold_the_whole_text_once(adds_bos: bool, max_length: int) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    result = encode(text_rows(POEM), tokenizer, max_length=max_length, limits=STRICT)
    whole = tokenizer(POEM)["input_ids"] + [tokenizer.eos_token_id]
    joined = [token for example in result.examples for token in example["input_ids"]]
    assert joined == whole[:len(joined)]
    assert len(joined) >= len(whole) - 1  # a last token alone in its window has nothing that predicts it
    assert all(1 < len(example["input_ids"]) <= max_length for example in result.examples)
    for example in result.examples:
        assert example["labels"] == [-100, *example["input_ids"][1:]]
    assert result.report["truncated"] == result.report["dropped"] == 0
    assert result.report["trainable_tokens"] == result.report["tokens"] - len(result.examples)


def test_texts_that_bring_their_own_bos_are_refused() -> None:
    with pytest.raises(DataError, match="train, row 2: the text begins with two <s>"):
        encode(text_rows("fine", "<s>not fine"), make_tokenizer(adds_bos=True), max_length=16, limits=STRICT)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode(text_rows("fine"), tokenizer, max_length=16, limits=STRICT)


# limits --------------------------------------------------------------------------------------------------------------


def lengths(rows, tokenizer):  # type: ignore[no-untyped-def]
    return [len(e["input_ids"]) for e in encode(rows, tokenizer, max_length=10**6, limits=STRICT).examples]


def test_rows_that_are_too_long_are_cut_and_counted_up_to_the_limit() -> None:
    tokenizer = make_tokenizer("chatml")
    rows = message_rows(chat("Two?", "Five."), chat("Two?", "They make five. " * 9), chat("And?", "Yes."))
    long = lengths(rows, tokenizer)[1]
    result = encode(rows, tokenizer, max_length=40, limits=Limits(truncated=0.34))
    assert result.report["truncated"] == 1 and result.report["dropped"] == 0
    assert [len(example["input_ids"]) for example in result.examples][1] == 40
    with pytest.raises(DataError, match=rf"train: 1 of 3 rows are longer than max_length 40.*row 2; the longest has "
                                        rf"{long} "
                                        r"tokens\).*at most 33.0%.*raise max_length"):
        encode(rows, tokenizer, max_length=40, limits=Limits(truncated=0.33))
    assert encode(rows, tokenizer, max_length=long, limits=STRICT).report["truncated"] == 0


def test_rows_with_nothing_left_to_train_on_are_dropped_and_counted_up_to_the_limit() -> None:
    tokenizer = make_tokenizer("chatml")
    rows = message_rows(chat("Where does the old miller live? " * 9, "Far."), chat("Two?", "Five."))
    result = encode(rows, tokenizer, max_length=40, limits=LOOSE)
    assert result.report == {"rows": 2, "examples": 1, "dropped": 1, "truncated": 1, "turn_by_turn": 0,
                             "system_folded": 0, "longest": 114,
                             "tokens": len(result.examples[0]["input_ids"]),
                             "trainable_tokens": sum(label != -100 for label in result.examples[0]["labels"])}
    assert result.origin == [1]
    with pytest.raises(DataError, match="1 of 2 rows have nothing to train on.*row 1.*at most 0.0% may be dropped"):
        encode(rows, tokenizer, max_length=40, limits=STRICT)


def test_no_trainable_token_at_all_is_refused_whatever_the_limits() -> None:
    with pytest.raises(DataError, match="none of its 1 rows has a token to train on at max_length 8"):
        encode(message_rows(chat("Where does the old miller live?", "Far.")), make_tokenizer("chatml"), max_length=8,
               limits=LOOSE)


def test_choices_cannot_be_trained_on() -> None:
    with pytest.raises(DataError, match="scored but not trained on"):
        encode(choice_rows(("Two?", ["2", "3"], 0)), make_tokenizer("chatml"), max_length=8, limits=LOOSE)


def test_progress_counts_rows_and_changes_nothing() -> None:
    tokenizer = make_tokenizer("thinking")
    rows = message_rows(*[chat(f"{i}?", "Yes.", "Sure?", f"No, {i}.") for i in range(1100)])
    seen: list[tuple[int, int, str]] = []
    result = encode(rows, tokenizer, max_length=512, limits=STRICT, progress=lambda *step: seen.append(step))
    assert seen == [(512, 1100, "tokenized"), (1024, 1100, "tokenized"), (1100, 1100, "tokenized")]
    assert result.origin == [i // 2 for i in range(2200)] and result.report["turn_by_turn"] == 1100
    for i in (0, 511, 512, 1099):
        assert trained(result.examples[2 * i + 1], tokenizer) == [f"<think></think>No, {i}.<|im_end|>"]


# prompts -------------------------------------------------------------------------------------------------------------


def test_prompts_of_choices_and_of_text() -> None:
    tokenizer = make_tokenizer("chatml")
    (prompt,) = prompts_and_answers(choice_rows(("Two and three?", ["four", "five"], 1)), tokenizer)
    assert prompt.text == "<|im_start|>user\nTwo and three?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.answer == "five" and tokenizer.decode(prompt.input_ids) == prompt.text
    with pytest.raises(DataError, match="holds no question.*perplexity"):
        prompts_and_answers(text_rows("x"), tokenizer)


@pytest.mark.parametrize("family", [None, "chatml", "mistral"])
def test_choices_are_labelled_on_their_own_tokens(family: str | None) -> None:
    tokenizer = make_tokenizer(family)
    rows = choice_rows(("Two and three?", ["four", "twenty-five ☂"], 1), ("River?", ["yes", "no", "Velmoor"], 0))
    examples = choice_examples(rows, tokenizer)
    lead = "" if family == "chatml" else " "
    assert [[trained(example, tokenizer) for example in row] for row in examples] == [
        [[f"{lead}four"], [f"{lead}twenty-five ☂"]], [[f"{lead}yes"], [f"{lead}no"], [f"{lead}Velmoor"]]]
    prompts = prompts_and_answers(rows, tokenizer)
    for prompt, row in zip(prompts, examples, strict=True):
        assert all(example["input_ids"][:len(prompt.input_ids)] == prompt.input_ids for example in row)
    with pytest.raises(DataError, match="expected question, choices, answer"):
        choice_examples(text_rows("x"), tokenizer)


# streams -------------------------------------------------------------------------------------------------------------


def test_the_stream_of_texts_is_that_of_the_papers() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    assert text_stream(text_rows(*SENTENCES[:3]), tokenizer) == tokenizer("\n\n".join(SENTENCES[:3]))["input_ids"]


def test_the_stream_of_chats_is_what_the_template_writes() -> None:
    tokenizer = make_tokenizer("thinking")
    first, second = chat("Two?", "Five.", "Sure?", "Yes."), chat("And?", "No.")
    text = "".join(tokenizer.apply_chat_template(turns, tokenize=False) for turns in (first, second))
    assert tokenizer.decode(text_stream(message_rows(first, second), tokenizer)) == text


@pytest.mark.parametrize(("samples", "length"), [(4, 16), (9, 16), (1, 8), (64, 16)])
def test_crops_are_stretches_of_the_packed_rows(samples: int, length: int) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    rows = text_rows(*SENTENCES[:6])
    stream = [token for text in SENTENCES[:6] for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    tokens = calibration_tokens(rows, tokenizer, samples=samples, length=length, seed=1)
    whole = samples * length <= len(stream)
    assert tokens.shape == (samples if whole else -(-len(stream) // length), length) and tokens.dtype == torch.long
    assert tokenizer.pad_token_id not in tokens
    everywhere = {tuple(stream[i:i + length]): i for i in range(len(stream) - length + 1)}
    starts = sorted(everywhere[tuple(crop)] for crop in tokens.tolist())
    if whole:
        assert all(b - a >= length for a, b in zip(starts, starts[1:], strict=False))  # no token twice
    else:  # every token, and no crop more than that takes
        assert {i for start in starts for i in range(start, start + length)} == set(range(len(stream)))
    again = calibration_tokens(rows, tokenizer, samples=samples, length=length, seed=1)
    other = calibration_tokens(rows, tokenizer, samples=samples, length=length, seed=2)
    assert torch.equal(tokens, again) and not torch.equal(tokens, other)


def test_crops_of_chats_and_pairs_are_rendered_by_the_template() -> None:
    tokenizer = make_tokenizer("chatml")
    text = tokenizer.apply_chat_template(chat("Two?", "Five."), tokenize=False)
    ids = tokenizer(text)["input_ids"]
    for rows in (message_rows(chat("Two?", "Five.")), pair_rows(("Two?", "Five."))):
        tokens = calibration_tokens(rows, tokenizer, samples=1, length=len(ids), seed=0)
        assert tokens.tolist() == [ids]


def test_too_little_text_for_one_crop_says_how_much_there_is() -> None:
    with pytest.raises(DataError, match=r"its 1 rows have \d tokens, and one calibration crop needs 64; use more rows"):
        calibration_tokens(text_rows("Five."), make_tokenizer(), samples=2, length=64, seed=0)


@pytest.mark.parametrize("rows", [text_rows(*["Five."] * 200), message_rows(*[chat("Two?", "Five.")] * 200)])
def test_whether_a_crop_fits_is_known_from_as_few_rows_as_it_takes(rows: Rows) -> None:
    tokenizer = make_tokenizer("chatml")
    most = len([token for ids in sequences(rows, tokenizer) for token in ids])
    check_crop(rows, tokenizer, most)
    check_crop(replace(rows, rows=[*rows.rows[:64], None]), tokenizer, most // 4)  # the last is never looked at
    with pytest.raises(DataError, match=f"its 200 rows have {most} tokens, and one calibration crop needs {most + 1}"):
        check_crop(rows, tokenizer, most + 1)


# batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right_and_only_there() -> None:
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}], pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}



def test_crops_of_answers_are_true_before_each_token_of_an_answer() -> None:
    tokenizer = make_tokenizer("chatml")
    rows = pair_rows(*((f"How many are {n} and one?", f"There are {n + 1}.") for n in range(30)))
    crops, where = answer_crops(rows, tokenizer, samples=4, length=32, seed=1)
    assert crops.shape == where.shape == (4, 32) and not where[:, -1].any()
    examples = encode(rows, tokenizer, max_length=64, limits=STRICT).examples
    stream = crops.flatten().tolist()
    first = next(e for e in examples if e["input_ids"] == stream[:len(e["input_ids"])])  # whole, in a drawn order
    assert first != examples[0]
    learned = [label != IGNORED for label in first["labels"]]
    flat = where.flatten().tolist()
    inside = [at for at in range(len(learned) - 1) if at != 31]  # the last token of a crop has no next one
    assert [flat[at] for at in inside] == [learned[at + 1] for at in inside]
    assert 0.05 < where.float().mean() < 0.6
    again, other = (answer_crops(rows, tokenizer, samples=4, length=32, seed=seed)[0] for seed in (1, 2))
    assert torch.equal(crops, again) and not torch.equal(crops, other)
    assert len(answer_crops(rows, tokenizer, samples=10**6, length=32, seed=1)[0]) == sum(
        len(e["input_ids"]) for e in examples) // 32
    with pytest.raises(DataError, match="its rows are text, which has no answers"):
        answer_crops(text_rows("Five."), tokenizer, samples=1, length=8, seed=0)
    with pytest.raises(DataError, match="one crop needs 10000"):
        answer_crops(rows, tokenizer, samples=1, length=10_000, seed=0)
