"""Rows of tokens that the tests of the loop train on."""

from __future__ import annotations

import torch


def examples(count: int, seed: int = 0) -> list[dict]:
    """Rows of 4, 5, 6, ... random tokens, the first two without a loss."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, 64, (4 + number,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made
