"""Files, folders, splits and built-in data, as rows with their places."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmops.data.fingerprint import fingerprint, unpinned
from llmops.data.options import DataSource
from llmops.data.sources import Rows, load_rows
from llmops.data.splits import parse_split
from llmops.errors import DataError

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}", "level": i} for i in range(1, 11)]


def load(folder: Path, source: str, seed: int = 0, **options: Any) -> Rows:
    return load_rows("data", {"data": DataSource(source=source, **options)}, folder, seed)


def numbers(rows: Rows) -> list[int]:
    return [int(row["prompt"].split()[1]) for row in rows.rows]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ten.jsonl").write_text("\n\n".join(json.dumps(row) for row in PAIRS))
    return tmp_path


# formats -------------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": 'say "a, b"\nand ☂', "completion": "a, b"}, {"prompt": "\u2028 x", "completion": "é" * 200_000}]
    written = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(written), encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text("\n".join(json.dumps(row) for row in rows))  # lines under the name of an array
    write_csv(tmp_path / "d.csv", rows)
    write_parquet(tmp_path / "e.parquet", rows)
    (tmp_path / "f.tsv").write_text("prompt\tcompletion\n" + "".join(
        "\t".join('"' + text.replace('"', '""') + '"' for text in row.values()) + "\n" for row in rows))
    loaded = [load(tmp_path, name) for name in ("a.jsonl", "b.json", "c.json", "d.csv", "e.parquet", "f.tsv")]
    for table in loaded:
        assert table.rows == rows and table.kind == "prompt_completion"
    assert len({table.sha256 for table in loaded}) == 1
    places = [[place.split(":")[1] for place in table.places] for table in loaded]
    assert places == [["1", "2"], ["2", "6"], ["1", "2"], ["2", "4"], ["1", "2"], ["2", "4"]]


def test_numbers_in_csv_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,zip\nnumber,007,0123\n")
    assert load(tmp_path, "a.csv").rows == [{"prompt": "number", "completion": "007", "zip": "0123"}]


def test_a_text_file_is_one_document_cut_by_lines(tmp_path: Path) -> None:
    text = "".join(f"line {i}\x0c{i}\n" for i in range(1, 11))
    (tmp_path / "a.txt").write_text(text)
    sources = {"all": DataSource(source="a.txt"), "train": DataSource(source="a.txt", split="[:90%]"),
               "test": DataSource(source="a.txt", split="[90%:]"), "half": DataSource.model_validate(
                   {"from": "train", "split": "[3:]"})}
    whole, train, test, half = (load_rows(name, sources, tmp_path, 0) for name in sources)
    assert whole.rows == [{"text": text}] and whole.kind == "text"
    assert train.rows[0]["text"] + test.rows[0]["text"] == text
    assert test.rows[0]["text"] == "line 10\x0c10\n" and test.places == ("a.txt:10",)
    assert half.rows[0]["text"].startswith("line 4") and half.places == ("a.txt:4",)


def test_chats_keep_their_turns_and_further_columns(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    write_parquet(tmp_path / "a.parquet", [{"messages": [{**turn, "name": None} for turn in turns], "topic": "x"}])
    (tmp_path / "b.csv").write_text('dialog,topic\n"' + json.dumps(turns).replace('"', '""') + '",x\n')
    for rows in (load(tmp_path, "a.parquet"), load(tmp_path, "b.csv", columns={"messages": "dialog"})):
        assert rows.kind == "messages" and rows.rows == [{"messages": turns, "topic": "x"}]


@pytest.mark.parametrize(("answer", "index"), [(1, 1), ("1", 1), ("B", 1), ("five", 1), ("A", 0), (" six ", 2)])
def test_the_answer_of_a_choice(answer: Any, index: int, tmp_path: Path) -> None:
    row = {"question": "Two and three?", "choices": ["four", "five", "six"], "answer": answer}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert load(tmp_path, "a.jsonl").rows[0]["answer"] == index


def test_choices_as_two_lists_with_labels(tmp_path: Path) -> None:
    row = {"question": "Two?", "choices": {"text": ["4", "5"], "label": ["1", "2"]}, "answerKey": "2"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert load(tmp_path, "a.jsonl", columns={"answer": "answerKey"}).rows == [
        {"question": "Two?", "choices": ["4", "5"], "answer": 1}]


def test_columns_rename_and_choose_the_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": "a", "text": "t"}))
    rows = load(tmp_path, "a.jsonl", columns={"prompt": "question", "completion": "answer"})
    assert rows.kind == "prompt_completion" and rows.rows == [{"prompt": "q", "completion": "a", "text": "t"}]
    assert load(tmp_path, "a.jsonl").kind == "text"
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a", "text": "t"}))
    assert load(tmp_path, "b.jsonl", columns={"text": "text"}).kind == "text"


# parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "expected"), [
    ("train", range(1, 11)), ("train[:90%]", range(1, 10)), ("[90%:]", [10]), ("[2:4]", [3, 4]), ("[-2:]", [9, 10]),
    ("[:-70%]", [1, 2, 3]), ("[25%:35%]", [4]), ("[33.3%:50%]", [4, 5])])
def test_ranges(split: str, expected: list[int], folder: Path) -> None:
    rows = load(folder, "ten.jsonl", split=split)
    assert numbers(rows) == list(expected)
    assert rows.places == tuple(f"ten.jsonl:{2 * i - 1}" for i in expected)


def test_ranges_that_meet_share_nothing_and_lose_nothing() -> None:
    for count in range(1, 60):
        for percent in range(1, 100):
            try:
                left = parse_split(f"[:{percent}%]").range(count)
                right = parse_split(f"[{percent}%:]").range(count)
            except ValueError:
                continue
            assert left[0] == 0 and left[1] == right[0] and right[1] == count


@pytest.mark.parametrize("split", ["", " ", "[", "[:]", "train[90%", "train[:x]", "[:101%]", "a b", "train[1:2]+test",
                                   "[1.5:]"])
def test_a_split_that_cannot_be_read_is_refused_with_the_recipe(split: str) -> None:
    with pytest.raises(ValidationError, match=r'split|bound'):
        DataSource(source="a.jsonl", split=split)


@pytest.mark.parametrize(("options", "says"), [
    ({}, 'either "source".*or "from"'), ({"source": "a", "from": "b"}, "not both"),
    ({"from": "b", "columns": {"text": "x"}}, '"columns" belongs to the source'),
    ({"from": "b", "split": "test"}, "only be a range"),
    ({"source": "a", "columns": {"promt": "x"}}, 'unknown standard column "promt".*did you mean "prompt"')])
def test_options_that_contradict_each_other(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        DataSource.model_validate(options)


def test_shuffle_then_range_then_samples(folder: Path) -> None:
    shuffled = numbers(load(folder, "ten.jsonl", seed=3, shuffle=True))
    assert sorted(shuffled) == list(range(1, 11)) and shuffled != list(range(1, 11))
    assert shuffled == numbers(load(folder, "ten.jsonl", seed=3, shuffle=True))
    assert shuffled != numbers(load(folder, "ten.jsonl", seed=4, shuffle=True))
    train = load(folder, "ten.jsonl", seed=3, shuffle=True, split="[:80%]", samples=5)
    test = load(folder, "ten.jsonl", seed=3, shuffle=True, split="[80%:]")
    assert numbers(train) == shuffled[:5] and numbers(test) == shuffled[8:]
    assert train.notes == {"read": 10, "empty": 0, "used": 5}
    assert train.places == tuple(f"ten.jsonl:{2 * i - 1}" for i in shuffled[:5])


def test_from_takes_the_finished_rows_of_another(folder: Path) -> None:
    sources = {"train": DataSource(source="ten.jsonl", split="[:50%]"), "calib": DataSource.model_validate(
        {"from": "train", "samples": 2}), "some": DataSource.model_validate({"from": "calib", "split": "[1:]"})}
    assert numbers(load_rows("calib", sources, folder, 0)) == [1, 2]
    assert numbers(load_rows("some", sources, folder, 0)) == [2]
    assert load_rows("some", sources, folder, 0).name == "some"


def test_names_that_lead_nowhere(folder: Path) -> None:
    circle = {name: DataSource.model_validate({"from": other}) for name, other in (("a", "b"), ("b", "a"), ("c", "d"))}
    with pytest.raises(DataError, match="a from b from a"):
        load_rows("a", circle, folder, 0)
    with pytest.raises(DataError, match='unknown data source "d".*it is what "c" is from'):
        load_rows("c", circle, folder, 0)
    with pytest.raises(DataError, match='unknown data source "trian".*did you mean "train"'):
        load_rows("trian", {"train": DataSource(source="ten.jsonl")}, folder, 0)


def test_a_folder_of_splits(folder: Path) -> None:
    (folder / "set").mkdir()
    (folder / "set" / "train.jsonl").write_text(json.dumps(PAIRS[0]))
    write_csv(folder / "set" / "test.csv", PAIRS[1:3])
    (folder / "set" / "README.md").write_text("about")
    assert numbers(load(folder, "set")) == [1]
    test = load(folder, "set", split="test[1:]")
    assert numbers(test) == [3] and test.places == ("set/test.csv:3",)
    with pytest.raises(DataError, match='set: unknown split "tset"; expected one of test, train; did you mean "test"'):
        load(folder, "set", split="tset")
    (folder / "set" / "test.jsonl").write_text(json.dumps(PAIRS[3]))
    with pytest.raises(DataError, match='test.csv and test.jsonl, both the split "test"'):
        load(folder, "set")


def test_a_folder_without_train_has_to_be_asked_for_a_split(folder: Path) -> None:
    (folder / "set").mkdir()
    for name in ("easy", "hard"):
        (folder / "set" / f"{name}.jsonl").write_text(json.dumps(PAIRS[0]))
    with pytest.raises(DataError, match="holds the splits easy, hard; choose one with `split`"):
        load(folder, "set")


# built in ------------------------------------------------------------------------------------------------------------


def test_builtin_data(tmp_path: Path) -> None:
    facts = load(tmp_path, "builtin:facts", split="test", samples=5)
    quiz = load(tmp_path, "builtin:choices", split="test", samples=5)
    assert facts.kind == "messages" and quiz.kind == "choices" and facts.places[0] == "builtin:facts[test]:1"
    for fact, choice in zip(facts.rows, quiz.rows, strict=True):
        assert fact["messages"][0]["content"] == choice["question"]
        assert fact["messages"][-1]["content"] == choice["choices"][choice["answer"]]
    first, other = (load(tmp_path, "builtin:world", seed=seed, samples=7) for seed in (0, 1))
    assert first.kind == "text" and len(first.rows) == 7 and first.rows != other.rows
    with pytest.raises(DataError, match='builtin:facts: unknown split "tset".*did you mean "test"'):
        load(tmp_path, "builtin:facts", split="tset")
    with pytest.raises(DataError, match='unknown built-in data "builtin:fact".*did you mean "builtin:facts"'):
        load(tmp_path, "builtin:fact")


# fingerprints --------------------------------------------------------------------------------------------------------


def prints(folder: Path, **sources: dict[str, Any]) -> list[str]:
    made = {name: DataSource.model_validate(options) for name, options in sources.items()}
    return [fingerprint(name, made, folder) for name in made]


def test_a_fingerprint_follows_bytes_and_options_not_names(folder: Path) -> None:
    (folder / "copy.jsonl").write_bytes((folder / "ten.jsonl").read_bytes())
    same = prints(folder, a={"source": "ten.jsonl"}, b={"source": "copy.jsonl"},
                  c={"source": str(folder / "ten.jsonl")}, d={"source": "ten.jsonl", "limits": {"dropped": 0.5}})
    assert len(set(same)) == 1
    differ = prints(folder, a={"source": "ten.jsonl"}, b={"source": "ten.jsonl", "split": "[:90%]"},
                    c={"source": "ten.jsonl", "shuffle": True}, d={"source": "ten.jsonl", "samples": 3},
                    e={"from": "a"}, f={"from": "a", "samples": 2}, g={"from": "b", "samples": 2},
                    h={"source": "ten.jsonl", "columns": {"text": "prompt"}}, i={"source": "builtin:facts"},
                    j={"source": "builtin:world"}, k={"source": "org/set"}, l={"source": "org/set", "revision": "abc"})
    assert len(set(differ)) == len(differ)
    (folder / "copy.jsonl").write_text((folder / "ten.jsonl").read_text().replace("answer 7", "answer 8"))
    assert prints(folder, b={"source": "copy.jsonl"}) != same[:1]


def test_a_changed_file_is_seen_although_its_hash_is_remembered(folder: Path) -> None:
    before = prints(folder, a={"source": "ten.jsonl"})
    (folder / "ten.jsonl").write_text(json.dumps(PAIRS[0]))
    assert prints(folder, a={"source": "ten.jsonl"}) != before


def test_the_fingerprint_of_a_folder_covers_every_file(folder: Path) -> None:
    for nested in ("set", "deep/data"):
        (folder / nested).mkdir(parents=True)
        (folder / nested / "train.jsonl").write_text("1")
    for source, file in (("set", "set/test.jsonl"), ("deep", "deep/data/test.parquet")):
        before = prints(folder, a={"source": source})
        (folder / file).write_text("2")
        after = prints(folder, a={"source": source})
        assert before != after
        (folder / source / ".cache").write_text("3")
        assert prints(folder, a={"source": source}) == after


def test_a_missing_file_has_no_fingerprint(folder: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        prints(folder, a={"source": "missing.jsonl"})


def test_only_the_hub_can_be_unpinned(folder: Path) -> None:
    sources = {"hub": DataSource(source="org/set"), "pinned": DataSource(source="org/set", revision="abc"),
               "file": DataSource(source="ten.jsonl"), "built": DataSource(source="builtin:facts"),
               "derived": DataSource.model_validate({"from": "hub"})}
    assert [name for name in sources if unpinned(name, sources, folder)] == ["hub", "derived"]


def test_reading_files_and_their_fingerprints_needs_no_torch(folder: Path) -> None:
    program = ("import sys; from pathlib import Path; from llmops.data.options import DataSource; "
               "from llmops.data.sources import fingerprint, load_rows; s = {'a': DataSource(source='ten.jsonl'), "
               "'b': DataSource(source='builtin:facts')}; "
               "[(fingerprint(n, s, Path('.')), load_rows(n, s, Path('.'), 0)) for n in s]; "
               "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(Path(__file__).parents[2] / "src")})
    assert done.stdout.strip() == "[]"


# prompts without answers ---------------------------------------------------------------------------------------------


def test_a_prompt_alone_is_a_row_without_answer_and_a_completion_beside_it_makes_a_pair(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."},
             {"role": "user", "content": "Why?"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in ("Where?", turns)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "Where?", "completion": "Here."}))
    rows = load(tmp_path, "a.jsonl")
    assert rows.kind == "prompts" and rows.rows == [{"prompt": "Where?"}, {"prompt": turns}]
    assert load(tmp_path, "b.jsonl").kind == "prompt_completion"


def test_a_prompt_that_ends_with_an_answer_is_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": turns}))
    with pytest.raises(DataError, match=r'a\.jsonl:1: the prompt ends with the turn of "assistant"'):
        load(tmp_path, "a.jsonl")
