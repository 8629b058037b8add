"""Folders through the `datasets` library, and what is said when the hub cannot be reached."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from llmops.data.options import DataSource
from llmops.data.sources import Rows, load_rows
from llmops.errors import DataError

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(1, 7)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's cache nor the network."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def load(folder: Path, source: str, **options: Any) -> Rows:
    return load_rows("data", {"data": DataSource(source=source, **options)}, folder, 0)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The layout of the hub: shards of each split under `data`."""
    jsonl(tmp_path / "set" / "data" / "train-00000-of-00002.jsonl", PAIRS[:2])
    jsonl(tmp_path / "set" / "data" / "train-00001-of-00002.jsonl", PAIRS[2:4])
    jsonl(tmp_path / "set" / "data" / "test-00000-of-00001.jsonl", PAIRS[4:])
    return tmp_path


def test_a_folder_of_shards(shards: Path) -> None:
    train, test = load(shards, "set"), load(shards, "set", split="test[50%:]")
    assert train.rows == PAIRS[:4] and train.places[2] == "set[train]:3"
    assert test.rows == PAIRS[5:] and test.places == ("set[test]:2",)
    with pytest.raises(DataError, match='set: unknown split "tset"; expected one of train, test; did you mean "test"'):
        load(shards, "set", split="tset")


def test_shards_beside_each_other(tmp_path: Path) -> None:
    for part in (0, 1):
        jsonl(tmp_path / "set" / f"train-0000{part}-of-00002.jsonl", PAIRS[2 * part:2 * part + 2])
    assert load(tmp_path, "set").rows == PAIRS[:4]


def test_a_bad_row_of_a_folder_is_named(tmp_path: Path) -> None:
    jsonl(tmp_path / "set" / "data" / "train.jsonl", [*PAIRS, {"prompt": "x", "completion": ""}])
    with pytest.raises(DataError, match=r"^set\[train\]:7: the row is empty"):
        load(tmp_path, "set")


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(PAIRS)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert load(tmp_path, "one").rows == PAIRS
    assert load(tmp_path, "two", split="test").rows == PAIRS[:1]


def test_subsets_have_to_be_chosen(tmp_path: Path) -> None:
    jsonl(tmp_path / "set" / "data" / "easy.jsonl", PAIRS[:1])
    jsonl(tmp_path / "set" / "data" / "hard.jsonl", PAIRS[1:])
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: data/easy.jsonl\n- config_name: hard\n"
        "  data_files: data/hard.jsonl\n---\n")
    assert load(tmp_path, "set", subset="hard").rows == PAIRS[1:]
    for options in ({}, {"subset": "hrad"}):
        with pytest.raises(DataError, match="easy.*hard.*choose one of them with `subset`"):
            load(tmp_path, "set", **options)


def test_folders_that_are_no_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing: the folder cannot be read as a data set.*as train.jsonl and "
                                        "test.jsonl"):
        load(tmp_path, "nothing")


def test_archives_that_can_hold_tensors_or_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "0.txt").write_text("x")
    with tarfile.open(tmp_path / "set" / "train.tar", "w") as archive:
        archive.add(tmp_path / "0.txt", "0.txt")
    with pytest.raises(DataError, match='the builder "webdataset"; expected plain data.*convert it to parquet or '
                                        'jsonl'):
        load(tmp_path, "set")


def test_a_script_beside_the_data_is_never_run(tmp_path: Path) -> None:
    jsonl(tmp_path / "set" / "data" / "train.jsonl", PAIRS)
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="scripts are no longer supported.*expected files named after their splits"):
        load(tmp_path, "set")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["json", "csv", "text", "webdataset"])
def test_the_name_of_a_format_does_not_read_the_current_folder(name: str, shards: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards / "set")
    with pytest.raises(DataError, match=f"{name}: is the name of a file format.*owner/name"):
        load(shards, name)


@pytest.mark.parametrize("options", [{}, {"revision": "abc"}])
def test_a_data_set_that_cannot_be_fetched_says_what_to_do(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, "nobody/no-such-data", **options)
    message = str(caught.value)
    assert message.startswith("nobody/no-such-data: no such file or folder, and the hub data set")
    assert "check the name and the network" in message and "name the folder" in message
    assert ("at revision abc" in message) == bool(options)
