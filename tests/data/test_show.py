"""What is printed of data: the mask in colour, and nothing in the data that a terminal would obey."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

from rich.console import Console
from tests.data.makers import chat, choice_rows, make_tokenizer, message_rows, text_rows

from llmops.data.options import Limits
from llmops.data.render import encode
from llmops.data.show import show, show_json, visible
from llmops.data.sources import Rows

NASTY = ("[bold red]x[/] \x1b]0;title\x07 \x1b[31mred \x9b2J \r over \u202ebackwards \u200b [link=http://x]y[/link] "
         ":smile:")


def printed(rows: Rows, tokenizer: Any, count: int = 9, colour: bool = False) -> str:
    encoded = None if rows.kind == "choices" else encode(rows, tokenizer, max_length=512, limits=Limits())
    output = io.StringIO()
    console = Console(file=output, width=400, force_terminal=colour, color_system="standard" if colour else None,
                      legacy_windows=False)
    console.print(show(rows, tokenizer, encoded, count))
    return output.getvalue()


def test_samples_special_tokens_and_counts_are_printed() -> None:
    rows = replace(message_rows(chat("Two and three?", "Five, naïve ☂."), chat("And?", "Yes."), chat("Hm?", "No.")),
                   notes={"read": 4, "empty": 1, "used": 3}, places=("a.jsonl:1", "a.jsonl:2", "a.jsonl:4"))
    text = printed(rows, make_tokenizer("chatml"), count=2)
    assert "<|im_start|>user" in text and "Five, naïve ☂.<|im_end|>" in text
    assert "a.jsonl:1" in text and "a.jsonl:2" in text and "a.jsonl:4" not in text
    assert "read 4, empty 1, used 3; rows 3, examples 3, dropped 0, truncated 0" in text
    assert "trainable tokens" in text and "trained: like this" in text


def test_trained_tokens_are_green_and_no_others() -> None:
    text = printed(message_rows(chat("Two and three?", "Five.")), make_tokenizer("chatml"), colour=True)
    assert "\x1b[32mFive.\x1b[0m" in text
    assert "\x1b[1;7;32m<|im_end|>\x1b[0m" in text  # the trained terminator
    assert "\x1b[1;2m<|im_end|>\x1b[0m" in text  # the user's is not trained
    assert text.count("\x1b[32m") == 2  # the sample, and the legend


def test_data_cannot_steer_the_terminal() -> None:
    tokenizer = make_tokenizer("chatml")
    nasty_place = replace(message_rows(chat(NASTY, NASTY)), places=("\x1b[2Jfile[bold].jsonl:1",), name="na\x1bme")
    nasty_choices = choice_rows((NASTY, [NASTY, "b"], 0))
    for rows in (nasty_place, text_rows(NASTY), nasty_choices):
        text = printed(rows, tokenizer)
        assert not {c for c in text if c != "\n" and (ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0)}
        assert "\u202e" not in text and "\u200b" not in text
        assert "[bold red]x[/]" in text and ":smile:" in text and "[link=http://x]y[/link]" in text
        assert "\u241b]0;title\u2407" in text and "\\u202ebackwards" in text
    assert "\u241b[2Jfile[bold].jsonl:1" in printed(nasty_place, tokenizer)


def test_visible_keeps_ordinary_text() -> None:
    ordinary = "Naïve café ☂ 日本 😀\nsecond line"
    assert visible(ordinary) == ordinary
    assert visible("\t\x00\x7f\x9b\u2028\U000e0001") == "\u2409\u2400\u2421\\u009b\\u2028\\U000e0001"


def test_the_json_form_says_the_same() -> None:
    tokenizer = make_tokenizer("chatml")
    rows = message_rows(chat("Two?", "Five ☂."), chat("And?", "Yes."))
    encoded = encode(rows, tokenizer, max_length=512, limits=Limits())
    body = json.loads(json.dumps(show_json(rows, tokenizer, encoded, 1)))
    (sample,) = body["samples"]
    assert sample["input_ids"] == encoded.examples[0]["input_ids"] and sample["place"] == "train, row 1"
    assert "".join(piece["text"] for piece in sample["pieces"]) == tokenizer.decode(sample["input_ids"])
    assert "".join(piece["text"] for piece in sample["pieces"] if piece["trained"]) == "Five ☂.<|im_end|>"
    assert [piece["text"] for piece in sample["pieces"] if piece["special"]] == [
        "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert sum(piece["tokens"] for piece in sample["pieces"]) == len(sample["input_ids"])
    assert body["report"] == encoded.report and body["special_tokens"]["eos_token"] == "<|im_end|>"


def test_rows_that_are_not_trained_on_are_shown_as_they_are() -> None:
    rows = choice_rows(("Two and three?", ["four", "five"], 1))
    assert "choices: ['four', 'five']" in printed(rows, make_tokenizer("chatml"))
    body = show_json(rows, make_tokenizer("chatml"), None, 5)
    assert body["report"] is None and body["samples"][0]["columns"] == rows.rows[0]
