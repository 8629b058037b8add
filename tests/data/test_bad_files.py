"""Bad data files: every message names the place, in the file or in the recipe, and the cure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmops.data.options import DataSource
from llmops.data.sources import SourceError, load_rows, rows_from
from llmops.errors import DataError, RecipeError
from llmops.preflight import rows_of
from llmops.recipe import load_recipe, parse_recipe


@dataclass(frozen=True)
class Bad:
    """A file, where its fault stands, what the message must say, and what it must advise.

    `key`: the key of the recipe that does not fit the file; the message then names its place. `line` 0: nothing in the
    file is wrong.
    """

    file: str
    content: bytes | str
    line: int
    says: str
    cure: str
    options: dict[str, Any] = field(default_factory=dict)
    key: str = ""


def lines(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


GOOD_TEXT, GOOD_PAIR = {"text": "fine"}, {"prompt": "Two?", "completion": "Five."}
GOOD_CHAT = turns(("user", "Two?"), ("assistant", "Five."))
GOOD_CHOICE = {"prompt": "Two?", "chosen": "Five.", "rejected": "Six."}
CALL = {"function": {"name": "add", "arguments": {"a": 2}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {}}}


def called(call: Any, *after: dict[str, Any], **columns: Any) -> dict[str, Any]:
    """A row in which the assistant makes one call."""
    turn = {"role": "assistant", "content": None, "tool_calls": [call] if isinstance(call, dict) else call}
    return {"messages": [{"role": "user", "content": "Two?"}, turn, *after], **columns}


GOOD_QUIZ = {"question": "Two?", "choices": ["4", "5"], "answer": 1}

TABLE = {
    # how a file is written
    "jsonl-cut-off": Bad("a.jsonl", lines(GOOD_TEXT, "", '{"text": "cut'), 3, "not JSON (Unterminated "
                                                                              "string", "mend the line"),
    "jsonl-comma": Bad("a.jsonl", lines(GOOD_TEXT, '{"text": "x",}'), 2, "not JSON", "take it out"),
    "jsonl-single-quotes": Bad("a.jsonl", "{'text': 'x'}\n", 1, "double quotes", "one JSON object a line"),
    "jsonl-two-on-a-line": Bad("a.jsonl", lines(GOOD_TEXT, '{"text": "x"} {"text": "y"}'), 2, "Extra data", "mend"),
    "jsonl-holds-array": Bad("a.jsonl", json.dumps([GOOD_TEXT]), 1, "begins a JSON array", 'name it ".json"'),
    "jsonl-holds-strings": Bad("a.jsonl", lines(GOOD_TEXT, '"just text"'), 2, "str where an object", "column name"),
    "jsonl-huge-number": Bad("a.jsonl", '{"text": ' + "1" * 5000 + "}\n", 1, "not JSON", "mend the line"),
    "jsonl-too-deep": Bad("a.jsonl", '{"text": ' + "[" * 200_000 + "\n", 1, "not JSON", "mend the line"),
    "empty-file": Bad("a.jsonl", "", 1, "has no rows", "right file"),
    "only-blank-lines": Bad("a.jsonl", "\n \n\n", 1, "has no rows", "right file"),
    "latin-1": Bad("a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', 2, "byte 14 of the line is "
                                                                             "0xe9", "save the file as UTF-8"),
    "utf-16": Bad("a.jsonl", '{"text": "x"}'.encode("utf-16"), 1, "byte order mark of UTF-16", "save it as UTF-8"),
    "utf-32": Bad("a.txt", "x".encode("utf-32"), 1, "byte order mark of UTF-32", "save it as UTF-8"),
    "json-cut-off": Bad("a.json", '[{"text": "x"},\n {"text": "y"}\n', 3, "follows an element", "the file may be cut "
                                                                                                "off"),
    "json-no-comma": Bad("a.json", '[{"text": "x"}\n {"text": "y"}]', 2, "follows an element", "expected a comma"),
    "json-bad-element": Bad("a.json", '[{"text": "x"},\n {"text":\n "y\n"}]', 3, "not JSON", "an array of objects"),
    "json-after-array": Bad("a.json", '[{"text": "x"}]\n[1]', 2, "follows the array", '".jsonl" file'),
    "json-number": Bad("a.json", "12", 1, "begins with '12'", "expected an array of objects"),
    "json-numbers": Bad("a.json", '[{"text": "x"},\n\n 7]', 3, "int where an object", "column name"),
    "csv-too-many": Bad("a.csv", "prompt,completion\na,b\nc,d,e\n", 3, "3 fields where the header has "
                                                                       "2", "quote fields"),
    "csv-too-few": Bad("a.csv", 'prompt,completion\n"a\nb",c\nd\n', 4, "1 fields where the header has "
                                                                       "2", "quote fields"),
    "csv-open-quote": Bad("a.csv", 'prompt,completion\n"a,b\n', 2, "not csv", "mend the line"),
    "csv-same-names": Bad("a.csv", "text,text\na,b\n", 1, "the header is 'text, text'", "different, non-empty name"),
    "csv-no-name": Bad("a.csv", "text,\na,b\n", 1, "the header is", "mend the first line"),
    "parquet-that-is-not": Bad("a.parquet", b"PAR2 no", 1, "not a parquet file", "suffix of what it holds"),
    # which columns there are
    "no-kind": Bad("a.jsonl", lines({"question": "Two?", "answer": "Five."}), 1, '"question", "answer"',
                   "columns: {prompt: question, completion: answer}"),
    "no-kind-near": Bad("a.csv", "promt,completoin\na,b\n", 1, "expected messages or prompt+completion or text",
                        "columns: {prompt: promt, completion: completoin}"),
    "no-kind-chats": Bad("a.jsonl", lines({"conversations": []}), 1, '"conversations"', "columns: {messages: "
                                                                                        "conversations}"),
    "two-kinds": Bad("a.jsonl", lines({**GOOD_PAIR, "text": "x"}), 1, "fit prompt+completion and text",
                     "columns: {prompt: prompt, completion: completion}"),
    "mapped-wrongly": Bad("a.jsonl", lines({"question": "Two?", "answer": "x"}), 1, 'prompt to "qestion"',
                          'did you mean "question"', {"columns": {"prompt": "qestion", "completion": "answer"}}),
    "mapped-halfway": Bad("a.jsonl", lines({"question": "Two?", "reply": "x"}), 1, "mapped by {prompt: question}",
                          "columns: {prompt: question, completion: reply}", {"columns": {"prompt": "question"}}),
    "column-missing": Bad("a.jsonl", lines(GOOD_PAIR, {"prompt": "x", "completon": "y"}), 2, 'no "completion"',
                          'did you mean "completon"'),
    # what stands in them
    "number": Bad("a.jsonl", lines(GOOD_TEXT, {"text": 12}), 2, "text is 12 (int)", "put it in quotes"),
    "surrogate": Bad("a.jsonl", lines(GOOD_TEXT, '{"text": "\\ud800"}'), 2, "half of a surrogate pair", "take it out"),
    "empty-row": Bad("a.jsonl", lines(GOOD_PAIR, {"prompt": "x", "completion": " "}, GOOD_PAIR), 2, "1 of 3 rows",
                     "limits: {dropped: ...}"),
    "null": Bad("a.jsonl", lines(GOOD_TEXT, {"text": None}), 2, "the row is empty", "take them out"),
    "all-empty": Bad("a.jsonl", lines({"text": ""}, {"text": "\n"}), 1, "all 2 rows", "check `columns`",
                     {"limits": {"dropped": 1}}),
    "messages-text": Bad("a.jsonl", lines(GOOD_CHAT, {"messages": "Two?"}), 2, 'messages is "Two?"', 'as [{"role": '
                                                                                                     '"user"'),
    "turn-keys": Bad("a.jsonl", lines({"messages": [{"from": "human", "value": "Two?"}]}), 1, 'the keys "from", '
                                                                                              '"value"',
                     "rename its keys"),
    "turn-text": Bad("a.jsonl", lines({"messages": ["Two?"]}), 1, 'turn 1 is "Two?"', 'expected {"role": ..., '
                                                                                      '"content"'),
    "role": Bad("a.jsonl", lines(turns(("usr", "Two?"), ("assistant", "x"))), 1, 'the role "usr"', 'did you mean '
                                                                                                   '"user"'),
    "starts-with-assistant": Bad("a.jsonl", lines(GOOD_CHAT, turns(("assistant", "Hello"))), 2, "starts with assistant",
                                 "drop the turns before"),
    "late-system": Bad("a.jsonl", lines(turns(("user", "a"), ("system", "b"), ("assistant", "c"))), 1, "turn 2 is "
                                                                                                       "the system's",
                       "move it to the front"),
    "ends-with-user": Bad("a.jsonl", lines(GOOD_CHAT, turns(("user", "Two?"))), 2, 'ends with the turn of '
                                                                                   '"user"', "add the answer"),
    "content-list": Bad("a.jsonl", lines(turns(("user", [{"type": "text"}]), ("assistant", "x"))), 1,
                        "the content of turn 1 is", "expected text"),
    "no-turns": Bad("a.jsonl", lines(GOOD_CHAT, {"messages": []}), 2, "the row is empty", "take them out"),
    "choices-text": Bad("a.jsonl", lines(GOOD_QUIZ, {**GOOD_QUIZ, "choices": "4"}), 2, 'choices is '
                                                                                       '"4"', "at least two texts"),
    "choices-numbers": Bad("a.jsonl", lines({**GOOD_QUIZ, "choices": [4, 5]}), 1, "choice 1 is 4 "
                                                                                  "(int)", "put it in quotes"),
    "choices-same": Bad("a.jsonl", lines({**GOOD_QUIZ, "choices": ["4", "4"]}), 1, "expected "
                                                                                   "different", "mend the row"),
    "answer-beyond": Bad("a.jsonl", lines(GOOD_QUIZ, {**GOOD_QUIZ, "answer": 2}), 2, "answer is 2", "0 to 1"),
    "answer-true": Bad("a.jsonl", lines({**GOOD_QUIZ, "answer": True}), 1, "answer is true", "index of the right "
                                                                                             "choice"),
    "answer-unknown": Bad("a.csv", 'question,choices,answer\nTwo?,"[""4"", ""5""]",six\n', 2, 'answer is '
                                                                                              '"six"', "a letter A "
                                                                                                       "to B"),
    # tools
    "calls-text": Bad("a.jsonl", lines(called("add")), 1, 'tool_calls of turn 2 is "add"', "expected a list"),
    "call-unnamed": Bad("a.jsonl", lines(GOOD_CHAT, called({"id": "1"})), 2, "tool call 1 of turn 2 is", "give the "
                                                                                                     "function's name"),
    "call-arguments": Bad("a.jsonl", lines(called({"name": "add", "arguments": "2, 3"})), 1,
                          'call 1 of turn 2 (add) are "2, 3"', "mend the call"),
    "call-by-the-user": Bad("a.jsonl", lines({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}), 1,
                            'turn 1 is the turn of "user" and has tool_calls', "on turns of the assistant"),
    "call-unknown": Bad("a.jsonl", lines(called({"name": "ad"}, tools=[ADD])), 1, 'turn 2 calls "ad"',
                        'did you mean "add"'),
    "result-without-call": Bad("a.jsonl", lines(turns(("user", "x"), ("tool", "5"), ("assistant", "y"))), 1,
                               "no assistant turn with tool_calls before it", "drop the result"),
    "result-too-many": Bad("a.jsonl", lines(called(CALL, *turns(("tool", "5"), ("tool", "5"),
                                                                ("assistant", "y"))["messages"])), 1,
                           "turn 4 is the result of a tool", "one result for each call"),
    "result-of-another": Bad("a.jsonl", lines(called({**CALL, "id": "1"}, {"role": "tool", "content": "5",
                                                                          "tool_call_id": "2"},
                                                   {"role": "assistant", "content": "y"})), 1,
                             'answers the tool call "2"', "mend its tool_call_id"),
    "ends-with-result": Bad("a.jsonl", lines(called(CALL, {"role": "tool", "content": "5"})), 1,
                            'ends with the turn of "tool"', "add the answer"),
    "tools-a-name": Bad("a.jsonl", lines(called(CALL, tools="add")), 1, 'tools is "add"', "a list of JSON schemas"),
    "tool-unnamed": Bad("a.jsonl", lines(called(CALL, tools=[{"type": "function"}])), 1, "tool 1 is", "the function's "
                                                                                                     "name"),
    "tool-twice": Bad("a.jsonl", lines(called(CALL, tools=[ADD, ADD])), 1, 'tools has "add" twice', "remove one"),
    # preferences
    "no-prompt": Bad("a.jsonl", lines({"chosen": "a", "rejected": "b"}), 1, "two answers and no prompt", "a column "
                                                                                                         "prompt"),
    "preference-named": Bad("a.jsonl", lines({"question": "x", "chosen": "a", "worse": "b"}), 1, '"worse"',
                            "columns: {prompt: question, chosen: chosen, rejected: worse}"),
    "preference-number": Bad("a.jsonl", lines(GOOD_CHOICE, {**GOOD_CHOICE, "chosen": 5}), 2, "chosen is 5 (int)",
                             "put it in quotes"),
    "preference-blank": Bad("a.jsonl", lines(GOOD_CHOICE, {**GOOD_CHOICE, "rejected": " "}), 2, "the row is empty",
                            "take them out"),
    "prompt-answered": Bad("a.jsonl", lines({**GOOD_CHOICE, "prompt": GOOD_CHAT["messages"]}), 1,
                           'the prompt ends with the turn of "assistant"', "move the answer into chosen"),
    "chosen-another-prompt": Bad("a.jsonl", lines({**GOOD_CHOICE, "prompt": "Three?", "chosen": GOOD_CHAT["messages"]}),
                                 1, 'chosen starts with the turn of "user"', "repeat the prompt exactly"),
    "rejected-unfinished": Bad("a.jsonl", lines({**GOOD_CHOICE, "rejected": turns(("assistant", "a"),
                                                                                  ("user", "b"))["messages"]}), 1,
                               'rejected ends with the turn of "user"', "add the answer"),
    "rejected-role": Bad("a.jsonl", lines({**GOOD_CHOICE, "rejected": turns(("asistant", "a"))["messages"]}), 1,
                         'rejected: turn 1 has the role "asistant"', 'did you mean "assistant"'),
    "rejected-call": Bad("a.jsonl", lines({
        "prompt": [{"role": "user", "content": "x"}], "chosen": "y", "tools": [ADD],
        "rejected": called({"name": "sub"})["messages"][1:]}), 1, 'turn 2 calls "sub"', "expected one of add"),
    "preference-tools": Bad("a.jsonl", lines({**GOOD_CHOICE, "tools": [ADD]}), 1, "has tools, and its prompt is text",
                            "take the tools out"),
    # which part of it
    "split-of-a-file": Bad("a.jsonl", lines(GOOD_TEXT), 0, 'test" of a single file', 'as "[:90%]"', {"split": "test"},
                           key="split"),
    "split-beyond": Bad("a.jsonl", lines(GOOD_TEXT), 1, "beyond the 1 rows", "a range within them", {"split": "[:5]"},
                        key="split"),
    "split-empty": Bad("a.jsonl", lines(GOOD_TEXT, GOOD_TEXT), 2, "of 2 rows is empty", "a range within them",
                       {"split": "[90%:]"}, key="split"),
    "split-of-lines": Bad("a.txt", "x\ny\n", 2, "lines of the text: the range [0:5] reaches", "a range within them",
                          {"split": "[:5]"}, key="split"),
    "split-blank-lines": Bad("a.txt", "x\n\n\n", 2, "only blank lines", "a wider range", {"split": "[1:]"},
                             key="split"),
    "suffix": Bad("a.xlsx", b"PK", 0, "a.xlsx", "convert it", key="source"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_a_bad_file(case: str, tmp_path: Path) -> None:
    bad = TABLE[case]
    assert bad.line or bad.key, "every message names a place"
    written(bad, tmp_path)
    if bad.line:
        with pytest.raises(DataError) as caught:
            load_rows("train", {"train": DataSource(source=bad.file, **bad.options)}, tmp_path, 0)
        check(bad, str(caught.value), f"{bad.file}:{bad.line}: ")
    if bad.key:
        with pytest.raises((RecipeError, DataError)) as refused:
            rows_of(load_recipe(tmp_path / "recipe.yaml"), "train")
        line, column = {"source": (6, 13), "split": (7, 12)}[bad.key]
        check(bad, str(refused.value), f"{tmp_path / 'recipe.yaml'}:{line}:{column}: data.train.{bad.key}: ")


def written(bad: Bad, folder: Path) -> None:
    """The file, and a recipe that trains on it."""
    (folder / bad.file).write_bytes(bad.content if isinstance(bad.content, bytes) else bad.content.encode())
    split = f"    split: {json.dumps(bad.options['split'])}\n" if "split" in bad.options else ""
    (folder / "recipe.yaml").write_text(
        f"version: 1\nname: bad\nmodel: builtin:tiny\ndata:\n  train:\n    source: {bad.file}\n{split}"
        "variants:\n  tuned:\n    finetune: {method: lora, data: train}\n")


def check(bad: Bad, message: str, begins: str) -> None:
    assert message.startswith(begins), message
    assert bad.says in message, message
    assert bad.cure in message, message
    assert len(message) < 700 and "\n" not in message, message


def test_what_does_not_fit_is_told_without_a_recipe_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(GOOD_TEXT))
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    for options, key, says in (({"source": "a.jsonl", "split": "test"}, "split", 'no split named "test"'),
                               ({"source": "a.xlsx"}, "source", 'cannot read a ".xlsx" file')):
        with pytest.raises(SourceError, match=says) as caught:
            load_rows("train", {"other": DataSource(source="b.jsonl"), "train": DataSource(**options)}, tmp_path, 0)
        assert (caught.value.name, caught.value.key) == ("train", key)


def test_a_split_that_does_not_fit_is_told_where_it_is_written(tmp_path: Path) -> None:
    """The source that has the split, not the one that is loaded; and its place when the recipe is built in Python."""
    (tmp_path / "a.jsonl").write_text(lines(GOOD_TEXT))
    sources = {"all": {"source": "a.jsonl"}, "part": {"from": "all", "split": "[3:]"}, "first": {"from": "part"}}
    body = {"version": 1, "name": "bad", "model": "builtin:tiny", "data": sources,
            "variants": {"tuned": {"finetune": {"method": "lora", "data": "first"}}}}
    with pytest.raises(DataError, match=r"^<recipe>: data\.part\.split: a\.jsonl:1: the split"):
        rows_of(parse_recipe(body, base_dir=tmp_path), "first")
    text = ("version: 1\nname: bad\nmodel: builtin:tiny\ndata:\n  all: a.jsonl\n  part: {from: all, split: \"[3:]\"}\n"
            "  first: {from: part}\nvariants:\n  tuned: {finetune: {method: lora, data: first}}\n")
    with pytest.raises(DataError, match=r"^r\.yaml:6:28: data\.part\.split: a\.jsonl:1: "):
        rows_of(parse_recipe(text, file="r.yaml", base_dir=tmp_path), "first")


def test_the_table_is_as_large_as_promised() -> None:
    assert len(TABLE) >= 75
    assert len({bad.says for bad in TABLE.values()}) > 35


@pytest.mark.parametrize("file", ["missing.jsonl", "sub/train.jsonl", "./nothing", "/no/such/place", "two words"])
def test_a_file_that_is_not_there(file: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no such file or folder.*expected a file.*paths count from the "
                                        r"recipe's"):
        load_rows("train", {"train": DataSource(source=file)}, tmp_path, 0)


def test_a_misspelt_file_is_told_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines(GOOD_TEXT))
    with pytest.raises(DataError, match='did you mean "train.jsonl"'):
        load_rows("train", {"train": DataSource(source="trian.jsonl")}, tmp_path, 0)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(lines(GOOD_TEXT))

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a.jsonl: cannot be read \(Permission denied\); check the path and its "
                                        r"rights"):
        load_rows("train", {"train": DataSource(source="a.jsonl")}, tmp_path, 0)


def test_rows_in_memory_are_checked_like_those_of_a_file() -> None:
    assert rows_from("train", [GOOD_PAIR]).kind == "prompt_completion"
    for rows, says in (([], "no rows were given"), ([GOOD_TEXT, {"text": 3}], "train:2: text is 3"),
                       ([{"txt": "x"}], "columns: {text: txt}"), ([GOOD_TEXT, {"text": ""}], "train:2: the row is "
                                                                                             "empty")):
        with pytest.raises(DataError) as caught:
            rows_from("train", rows)
        assert says in str(caught.value)


def test_a_row_counts_as_many_empty_rows_as_limits_allow(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(*[GOOD_TEXT] * 9, {"text": " "}))
    source = DataSource(source="a.jsonl", limits={"dropped": 0.1})
    assert load_rows("train", {"train": source}, tmp_path, 0).notes == {"read": 10, "empty": 1, "used": 9}
    with pytest.raises(DataError, match="a.jsonl:10: the row is empty"):
        load_rows("train", {"train": DataSource(source="a.jsonl", limits={"dropped": 0.09})}, tmp_path, 0)
