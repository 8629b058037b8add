"""Tables of tiles: which entry a call takes, and what a broken table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmops_kernels import config


def test_the_nearest_number_of_rows_in_log_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = config.key(4096, 4096, bits=4)
    assert shape == "N=4096,K=4096,bits=4"
    rows = {"1": {"BLOCK_M": 16}, "16": {"BLOCK_M": 17}, "256": {"BLOCK_M": 64}}
    (tmp_path / "an_op.json").write_text(json.dumps({"a_device": {shape: rows}}))
    monkeypatch.setenv("LLMOPS_KERNEL_CONFIGS", str(tmp_path))
    config.entries.cache_clear()
    taken = {m: config.pick("an_op", shape, m, "a_device")["BLOCK_M"] for m in (0, 1, 3, 4, 5, 63, 64, 65, 5000)}  # type: ignore[index]
    assert taken == {0: 16, 1: 16, 3: 16, 4: 16, 5: 17, 63: 17, 64: 17, 65: 64, 5000: 64}  # a tie takes the smaller
    assert config.pick("an_op", shape, 1, "another") is None
    assert config.pick("an_op", config.key(1, 1), 1, "a_device") is None
    assert config.pick("no_such_op", shape, 1, "a_device") is None
    config.entries.cache_clear()


@pytest.mark.parametrize("text, message", [
    ("[]", "expected {device"), ('{"d": {"s": {"x": {}}}}', "expected {device"), ("{", "expected {device"),
    ('{"d": {"s": {"0": {}}}}', "d: s: M = 0"), ('{"d": {"s": {"1": {"BLOCK_M": "16"}}}}', "whole numbers")])
def test_a_broken_table_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "op.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        config.table(path)
    assert str(path) in str(error.value)


def test_the_packaged_tables_are_sound() -> None:
    for path in config.PACKAGED.glob("*.json"):
        config.table(path)
