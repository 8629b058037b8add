"""How a step is cut into forward passes for several processes."""

import pytest

from llmops.train.rows import share, shrunk


@pytest.mark.parametrize("step", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3, 4], [5]]])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_row_goes_to_one_process_and_none_is_idle(step, size):
    shares = [share(step, rank, size) for rank in range(size)]
    rows = [sorted(index for one in part for index in one) for part in shares]
    assert sorted(sum(rows, [])) == sorted(sum(step, []))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_passes_that_were_cut_to_single_rows_are_still_shared_out():
    step = shrunk([[0, 1, 2, 3]], 2)
    assert [len(share(step, rank, 4)) for rank in range(4)] == [1, 1, 1, 1]
