"""Two processes train what one trains, and neither waits for a failure of the other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.train import rank_worker

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0",
                           "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "kernels", ROOT)))}
    workers = [subprocess.Popen([sys.executable, "-m", "tests.train.rank_worker", str(folder)], cwd=ROOT,
                                env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
               for rank in range(2)]
    try:
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", rank_worker.SCHEDULES)
def test_two_processes_equal_one(both, case):
    alone = rank_worker.trained(case)
    for found in (one["trained"][case] for one in both):
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert found["looks"] == [[step, pytest.approx(loss, rel=1e-6)] for step, loss in alone["looks"]]
        assert found["tokens"] == alone["tokens"]
        torch.testing.assert_close(torch.tensor(found["weights"]), torch.tensor(alone["weights"]), rtol=1e-5,
                                   atol=1e-7)
    assert both[0]["trained"][case]["weights"] == both[1]["trained"][case]["weights"]


def test_memory_that_runs_out_on_one_rank_halves_the_passes_of_all(both):
    events = [one["failures"]["memory"] for one in both]
    assert all(event.count("memory ran out at step 1") == 1 for event in events)
    assert "(CUDA out of memory)" in events[1] and "(on another rank)" in events[0]


@pytest.mark.parametrize(("kind", "here", "there"), [
    ("error", "ValueError: only here", "RankError: rank 1 of 2: ValueError: only here"),
    ("nan", "RankError: the loss became nan at optimizer step 1, on the batch of row",
     "RankError: rank 1 of 2: the loss became nan at optimizer step 1, on the batch of row"),
])
def test_a_rank_that_fails_tells_the_other(both, kind, here, there):
    assert both[1]["failures"][kind].startswith(here)
    assert both[0]["failures"][kind].startswith(there)


def test_a_checkpoint_that_rank_0_cannot_write_ends_the_training_of_both(both):
    said = both[0]["failures"]["store"], both[1]["failures"]["store"]
    assert said[0].startswith("StoreError") and "could not be written" in said[0]
    assert said[1].startswith("RankError: rank 0 of 2: StoreError") and "could not be written" in said[1]


def test_a_training_of_two_goes_on_from_the_checkpoint_of_rank_0(both):
    assert both[0]["resumed"] == both[1]["resumed"] and len(both[0]["resumed"]) == 6


def test_orders_reach_the_other_ranks(both):
    assert [one["heard"] for one in both] == ["begin", "begin"]
