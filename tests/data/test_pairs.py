"""Preferences: read, checked, and turned into pairs that differ in nothing but the answers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.data.families import FAMILIES, family_tokenizer
from tests.data.makers import chat, make_tokenizer, message_rows, pair_rows, trained

from llmops.data.leak import check_leak
from llmops.data.options import DataSource, Limits
from llmops.data.pairs import encode_pairs
from llmops.data.render import calibration_tokens, encode, prompts_and_answers, text_stream
from llmops.data.show import show, show_json
from llmops.data.sources import Rows, load_rows, rows_from
from llmops.errors import DataError

LOOSE = Limits(dropped=1, truncated=1)
ROW = {"prompt": "Where does the old miller live?", "chosen": "He lives in Velmoor.", "rejected": "By the sea."}


def preferences(*rows: dict[str, Any]) -> Rows:
    return rows_from("train", rows)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_and_their_terminators_are_trained_and_the_prompt_is_not(family: str) -> None:
    tokenizer, end = family_tokenizer(family), FAMILIES[family]
    long = {"prompt": chat("Two and three?", "They make five.", "Sure?", system="You are brief."),
            "chosen": [said("Yes, I am.")], "rejected": "No."}
    pairs = encode_pairs(preferences(ROW, long), tokenizer, max_length=512, limits=Limits())
    for index, row in enumerate((ROW, {"chosen": "Yes, I am.", "rejected": "No."})):
        for examples, side in ((pairs.chosen, "chosen"), (pairs.rejected, "rejected")):
            labels = [label for label in examples[index]["labels"] if label != -100]
            first = next(i for i, label in enumerate(examples[index]["labels"]) if label != -100)
            assert labels == examples[index]["input_ids"][first:first + len(labels)]
            assert (tokenizer.backend_tokenizer.decode(labels, skip_special_tokens=False)
                    == end.say(row[side], "") + end.end)
    for chosen, rejected in zip(pairs.chosen, pairs.rejected, strict=True):
        firsts = [next(i for i, label in enumerate(side["labels"]) if label != -100) for side in (chosen, rejected)]
        assert chosen["input_ids"][:firsts[0]] == rejected["input_ids"][:firsts[1]]
    assert pairs.origin == [0, 1]
    sides = [*pairs.chosen, *pairs.rejected]
    assert pairs.report == {
        "rows": 2, "pairs": 2, "dropped": 0, "truncated": 0, "answers_cut": 0, "identical": 0, "same_after_cut": 0,
        "system_folded": 0, "longest": max(len(side["input_ids"]) for side in sides),
        "tokens": sum(len(side["input_ids"]) for side in sides),
        "trainable_tokens": sum(label != -100 for side in sides for label in side["labels"])}


@pytest.mark.parametrize("family", ["llama3", "chatml", "mistral"])
def test_a_side_is_what_training_on_it_alone_would_be(family: str) -> None:
    tokenizer = family_tokenizer(family)
    pairs = encode_pairs(preferences(ROW), tokenizer, max_length=512, limits=Limits())
    for examples, side in ((pairs.chosen, "chosen"), (pairs.rejected, "rejected")):
        alone = encode(pair_rows((ROW["prompt"], ROW[side])), tokenizer, max_length=512, limits=Limits()).examples
        assert examples == alone


def test_without_a_template_the_answer_and_eos_are_trained() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    pairs = encode_pairs(preferences(ROW), tokenizer, max_length=512, limits=Limits())
    assert trained(pairs.chosen[0], tokenizer) == ["He lives in Velmoor.</s>"]
    assert pairs.chosen[0]["input_ids"][0] == tokenizer.bos_token_id
    with pytest.raises(DataError, match="no chat template"):
        encode_pairs(preferences({**ROW, "prompt": [user("Two?")]}), tokenizer, max_length=512, limits=Limits())


def test_texts_and_turns_give_the_same_pairs() -> None:
    tokenizer = family_tokenizer("llama3")
    plain = encode_pairs(preferences(ROW), tokenizer, max_length=512, limits=Limits())
    prompt = [user(ROW["prompt"])]
    for row in ({**ROW, "prompt": prompt}, {**ROW, "chosen": [said(ROW["chosen"])]},
                {"prompt": ROW["prompt"], "chosen": [*prompt, said(ROW["chosen"])],
                 "rejected": [*prompt, said(ROW["rejected"])]}):
        assert encode_pairs(preferences(row), tokenizer, max_length=512, limits=Limits()) == plain


def test_answers_of_several_turns_and_calls() -> None:
    tools = [{"name": "get_weather", "description": "of a city", "parameters": {"type": "object"}}]
    call = {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": '{"city": "Oslo"}'}]}
    row = {"prompt": [user("How warm is it?")], "rejected": "I cannot say.", "tools": json.dumps(tools),
           "chosen": [call, {"role": "tool", "content": "7"}, said("Seven degrees.")]}
    llama = family_tokenizer("llama3")
    pairs = encode_pairs(preferences(row), llama, max_length=2048, limits=Limits())
    assert trained(pairs.chosen[0], llama) == ['{"name": "get_weather", "parameters": {"city": "Oslo"}}<|eot_id|>',
                                               "Seven degrees.<|eot_id|>"]
    assert trained(pairs.rejected[0], llama) == ["I cannot say.<|eot_id|>"]
    with pytest.raises(DataError, match="train:1: chosen: the answer has several assistant turns.*into the prompt"):
        encode_pairs(preferences(row), family_tokenizer("qwen3"), max_length=2048, limits=Limits())


def test_a_long_prompt_gives_way_from_its_left_alike_on_both_sides() -> None:
    tokenizer = family_tokenizer("llama3")
    row = {**ROW, "prompt": "word " * 60 + "last?"}
    whole = encode_pairs(preferences(row), tokenizer, max_length=4096, limits=Limits())
    size = whole.report["longest"]
    pairs = encode_pairs(preferences(row), tokenizer, max_length=size - 50, limits=LOOSE)
    assert pairs.report["truncated"] == 1 and pairs.report["answers_cut"] == 0 and pairs.report["longest"] == size
    for cut, full in ((pairs.chosen[0], whole.chosen[0]), (pairs.rejected[0], whole.rejected[0])):
        assert cut["input_ids"] == [tokenizer.bos_token_id, *full["input_ids"][51:]]
        assert trained(cut, tokenizer) == trained(full, tokenizer)  # whole, terminator included
        assert cut["labels"][0] == -100
    assert max(len(side[0]["input_ids"]) for side in (pairs.chosen, pairs.rejected)) == size - 50
    with pytest.raises(DataError, match=r"1 of 1 rows are longer than max_length .*the longest has \d+ tokens"):
        encode_pairs(preferences(row), tokenizer, max_length=size - 50, limits=Limits())


def test_a_long_answer_is_cut_at_its_end_and_counted() -> None:
    tokenizer = family_tokenizer("llama3")
    row = {**ROW, "prompt": "word " * 60, "chosen": "far away " * 60}
    whole = encode_pairs(preferences(row), tokenizer, max_length=4096, limits=Limits())
    pairs = encode_pairs(preferences(row), tokenizer, max_length=80, limits=LOOSE)
    assert pairs.report["answers_cut"] == pairs.report["truncated"] == 1
    ids, labels = pairs.chosen[0]["input_ids"], pairs.chosen[0]["labels"]
    assert len(ids) == 80 and labels[:40] == [-100] * 40 and labels[40:] == ids[40:]  # half of it is prompt
    answer = [label for label in whole.chosen[0]["labels"] if label != -100]
    assert ids[40:] == answer[:40]
    assert trained(pairs.rejected[0], tokenizer) == trained(whole.rejected[0], tokenizer)
    assert pairs.rejected[0]["input_ids"][:40] == ids[:40]


def test_a_short_prompt_is_not_touched_by_a_long_answer() -> None:
    tokenizer = family_tokenizer("llama3")
    whole = encode_pairs(preferences({**ROW, "chosen": "far " * 90}), tokenizer, max_length=4096, limits=Limits())
    pairs = encode_pairs(preferences({**ROW, "chosen": "far " * 90}), tokenizer, max_length=128, limits=LOOSE)
    assert pairs.chosen[0]["input_ids"] == whole.chosen[0]["input_ids"][:128]
    assert pairs.rejected == whole.rejected


def test_pairs_without_a_difference_are_dropped_and_counted() -> None:
    tokenizer = family_tokenizer("llama3")
    same = {**ROW, "rejected": " He lives in Velmoor.\n"}  # the template trims
    late = {**ROW, "chosen": "far " * 90 + "a", "rejected": "far " * 90 + "b"}
    pairs = encode_pairs(preferences(ROW, same, late), tokenizer, max_length=100, limits=LOOSE)
    assert pairs.origin == [0] and len(pairs.chosen) == len(pairs.rejected) == 1
    assert {key: pairs.report[key] for key in ("rows", "pairs", "dropped", "identical", "same_after_cut", "truncated")
            } == {"rows": 3, "pairs": 1, "dropped": 2, "identical": 1, "same_after_cut": 1, "truncated": 1}
    with pytest.raises(DataError, match=r"1 of 2 rows are equal on both sides or have nothing to train on .*train:2"):
        encode_pairs(preferences(ROW, same), tokenizer, max_length=100, limits=Limits())
    with pytest.raises(DataError, match="none of its 1 rows"):
        encode_pairs(preferences(same), tokenizer, max_length=100, limits=LOOSE)


def test_every_width_keeps_the_promises() -> None:
    tokenizer = family_tokenizer("llama3")
    rows = preferences({**ROW, "prompt": "word " * 20, "chosen": "far away " * 9, "rejected": "near " * 4})
    whole = encode_pairs(rows, tokenizer, max_length=4096, limits=Limits())
    full = [[label for label in side[0]["labels"] if label != -100] for side in (whole.chosen, whole.rejected)]
    for width in range(8, whole.report["longest"] + 2):
        pairs = encode_pairs(rows, tokenizer, max_length=width, limits=LOOSE)
        sides = [pairs.chosen[0], pairs.rejected[0]]
        firsts = [next(i for i, label in enumerate(side["labels"]) if label != -100) for side in sides]
        assert sides[0]["input_ids"][:firsts[0]] == sides[1]["input_ids"][:firsts[1]] and firsts[0] >= width // 2
        answers = [side["input_ids"][first:] for side, first in zip(sides, firsts, strict=True)]
        for side, answer, wanted in zip(sides, answers, full, strict=True):
            assert len(side["input_ids"]) <= width and answer == wanted[:len(answer)]
        assert pairs.report["answers_cut"] == (answers != full)
        assert pairs.report["truncated"] == (width < whole.report["longest"])


def test_chunks_do_not_change_the_pairs() -> None:
    tokenizer = family_tokenizer("chatml")
    rows = preferences(*[{**ROW, "chosen": f"It is {number}."} for number in range(300)])
    told: list[tuple[int, int, str]] = []
    pairs = encode_pairs(rows, tokenizer, max_length=99, limits=Limits(), progress=lambda *step: told.append(step))
    assert pairs.origin == list(range(300)) and told == [(256, 300, "tokenized"), (300, 300, "tokenized")]
    assert trained(pairs.chosen[299], tokenizer) == ["It is 299.<|im_end|>"]


def test_other_kinds_are_refused_and_preferences_where_one_answer_is_wanted() -> None:
    tokenizer = family_tokenizer("chatml")
    with pytest.raises(DataError, match="its rows are prompt_completion.*expected preferences"):
        encode_pairs(pair_rows(("a", "b")), tokenizer, max_length=99, limits=Limits())
    with pytest.raises(DataError, match=r"only method dpo.*columns: \{prompt: prompt, completion: chosen\}"):
        encode(preferences(ROW), tokenizer, max_length=99, limits=Limits())
    with pytest.raises(DataError, match="two answers and no right one"):
        prompts_and_answers(preferences(ROW), tokenizer)


def test_streams_and_calibration_take_the_chosen_side() -> None:
    tokenizer = family_tokenizer("chatml")
    one = message_rows(chat(ROW["prompt"], ROW["chosen"]))
    for row in (ROW, {**ROW, "prompt": [user(ROW["prompt"])]}):
        assert text_stream(preferences(row), tokenizer) == text_stream(one, tokenizer)
        drawn = [calibration_tokens(rows, tokenizer, samples=2, length=8, seed=0) for rows in (preferences(row), one)]
        assert drawn[0].tolist() == drawn[1].tolist()


@pytest.mark.parametrize(("name", "text"), [
    ("a.jsonl", "".join(json.dumps(row) + "\n" for row in ({**ROW, "id": 7}, {**ROW, "prompt": [user("Two?")]}))),
    ("a.csv", 'prompt,chosen,rejected\n[1] is?,a,b\n"[{""role"": ""user"", ""content"": ""Two?""}]",a,b\n'),
])
def test_files_of_preferences(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    rows = load_rows("train", {"train": DataSource(source=name)}, tmp_path, 0)
    assert rows.kind == "preference" and isinstance(rows.rows[0]["prompt"], str)
    assert rows.rows[1]["prompt"] == [user("Two?")] and rows.rows[1]["rejected"][0]["role"] == "assistant"


def test_columns_are_mapped(tmp_path: Path) -> None:
    row = {"question": "Two?", "better": "a", "worse": "b", "completion": "c"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    rows = load_rows("train", {"train": DataSource(source="a.jsonl", columns=columns)}, tmp_path, 0)
    assert rows.kind == "preference" and rows.rows == [{"completion": "c", "prompt": "Two?", "chosen": "a",
                                                         "rejected": "b"}]
    (tmp_path / "b.jsonl").write_text(json.dumps(ROW) + "\n")
    picked = DataSource(source="b.jsonl", columns={"prompt": "prompt", "completion": "chosen"})
    assert load_rows("train", {"train": picked}, tmp_path, 0).kind == "prompt_completion"


def test_tools_in_a_column_of_another_name(tmp_path: Path) -> None:
    tools = [{"name": "add", "parameters": {}}]
    turns = [user("Two?"), {"role": "assistant", "tool_calls": [{"name": "add", "arguments": ""}], "content": None}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"chat": turns, "functions": tools}) + "\n"
                                      + json.dumps({"chat": chat("a", "b"), "functions": None}) + "\n")
    source = DataSource(source="a.jsonl", columns={"messages": "chat", "tools": "functions"})
    rows = load_rows("train", {"train": source}, tmp_path, 0).rows
    assert rows[0]["tools"] == [{"type": "function", "function": tools[0]}] and "tools" not in rows[1]
    assert rows[0]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {}}}]}


def test_a_question_of_either_kind_that_is_tested_is_a_leak() -> None:
    for row in (ROW, {**ROW, "prompt": [{"role": "system", "content": "x"}, user(ROW["prompt"])]}):
        with pytest.raises(DataError, match="1 of 1 rows.*with another answer"):
            check_leak(preferences(row), pair_rows((ROW["prompt"].upper(), "By the hill.")))
        check_leak(preferences(row), pair_rows(("Where?", "Here.")))
    context = {**ROW, "prompt": chat("Two?", "Five.", "Sure?")}
    check_leak(preferences(context), pair_rows(("Two?", "Five.")))  # the prompt's own answers are not trained


def test_both_sides_are_shown() -> None:
    tokenizer = family_tokenizer("chatml")
    rows = preferences(ROW, {**ROW, "chosen": "Far."})
    pairs = encode_pairs(rows, tokenizer, max_length=99, limits=Limits())
    output = io.StringIO()
    Console(file=output, width=200, force_terminal=True, color_system="standard").print(
        show(rows, tokenizer, pairs, 1))
    text = output.getvalue()
    for side in ("chosen", "rejected"):
        assert f"\x1b[1m{side}\x1b[0m" in text and f"\x1b[32m{ROW[side]}\x1b[0m" in text
    assert "train:1" in text and "train:2" not in text and "rows 2, pairs 2" in text and "identical 0" in text
    body = json.loads(json.dumps(show_json(rows, tokenizer, pairs, 1)))
    (sample,) = body["samples"]
    for side in ("chosen", "rejected"):
        green = "".join(piece["text"] for piece in sample[side]["pieces"] if piece["trained"])
        assert green == ROW[side] + "<|im_end|>"
    assert body["report"] == pairs.report and sample["place"] == "train:1"
