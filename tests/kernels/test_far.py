"""Packed weights of more than 2^31 words: what the interpreter makes of the last of them is what it has to be."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from tests.kernels.processes import interpreted

CASES: list[list[Any]] = [
    *(["integers", bits] for bits in (2, 3, 4, 8)), *(["integers made dense", bits] for bits in (3, 4)),
    ["general", 4], ["general", 8], ["pairs"], ["pairs made dense"], ["sparse", False], ["sparse", True],
    ["sparse int4", False], ["sparse int4", True], ["parts"], ["joined"]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reserves addresses without memory as Linux does")
def test_offsets_past_2_to_the_31_are_right() -> None:
    pytest.importorskip("triton")
    for case, result in zip(CASES, interpreted("interpret_far.py", CASES), strict=True):
        assert result["equal"] and result["any"], case
