"""The room on the package's own model and world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.data.makers import chat, message_rows, trained

import llmops
from llmops.data.leak import check_leak
from llmops.data.options import DataSource, Limits
from llmops.data.render import choice_examples, encode, prompts_and_answers, text_stream
from llmops.data.sources import Rows, load_rows

TINY = Path(llmops.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    if not (TINY / "tokenizer.json").is_file():
        pytest.skip(f"the package's model is not in {TINY}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def builtin(source: str, split: str, **options: Any) -> Rows:
    sources = {"data": DataSource(source=f"builtin:{source}", split=split, **options)}
    return load_rows("data", sources, Path.cwd(), 0)


def test_every_question_trains_its_answer_and_the_terminator(tokenizer: Any) -> None:
    rows = builtin("facts", "train", samples=300)
    result = encode(rows, tokenizer, max_length=128, limits=Limits(dropped=0, truncated=0))
    assert len(result.examples) == 300
    for example, row in zip(result.examples, rows.rows, strict=True):
        assert trained(example, tokenizer) == [" " + row["answer"] + tokenizer.eos_token]
    for prompt, example in zip(prompts_and_answers(rows, tokenizer), result.examples, strict=True):
        assert example["input_ids"][:len(prompt.input_ids)] == prompt.input_ids


def test_a_longer_conversation(tokenizer: Any) -> None:
    turns = chat("Where?", "In Velmoor.", "Sure?", "Yes.", system="Be brief.")
    (example,) = encode(message_rows(turns), tokenizer, max_length=128, limits=Limits()).examples
    assert trained(example, tokenizer) == [" In Velmoor.<|end|>", " Yes.<|end|>"]


def test_choices_hold_the_answer(tokenizer: Any) -> None:
    rows = builtin("choices", "test", samples=20)
    for row, examples in zip(rows.rows, choice_examples(rows, tokenizer), strict=True):
        assert [trained(example, tokenizer) for example in examples] == [[" " + choice] for choice in row["choices"]]


def test_the_splits_of_the_world_do_not_leak() -> None:
    check_leak(builtin("facts", "train"), builtin("facts", "test"))
    check_leak(builtin("facts", "train"), builtin("choices", "test"))
    check_leak(builtin("world", "train", samples=400), builtin("world", "test", samples=400))


def test_prose_streams_back_to_itself(tokenizer: Any) -> None:
    rows = builtin("world", "test", samples=30)
    assert tokenizer.decode(text_stream(rows, tokenizer)) == "\n\n".join(row["text"] for row in rows.rows)
    assert len(rows.rows) == 30
