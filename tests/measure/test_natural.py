"""Natural length: the tokens are those of `generate`, the energy is that of the passes, nothing is left changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.measure.replay import ReplaySensor
from tests.measure.test_decode import Bill, llama

from llmops.measure.intervals import mean_interval
from llmops.measure.meter import Meter
from llmops.measure.natural import natural, stop_tokens
from llmops.measure.sensors import NullSensor

PROMPTS = [[5, 6, 7], [9, 8], [3, 20, 30, 40], [11]]


def generated(model: Any, stop: int, most: int) -> list[int]:
    """How many tokens transformers' own greedy generation writes, the stop token included."""
    counts = []
    for ids in PROMPTS:
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=most,
                             do_sample=False, eos_token_id=stop, pad_token_id=0)
        counts.append(out.shape[1] - len(ids))
    return counts


@pytest.mark.parametrize("most", [1, 6, 20])
def test_the_tokens_are_those_of_generate(most: int) -> None:
    model = llama(1, seed=3)
    first = int(model.generate(torch.tensor([PROMPTS[0]]), attention_mask=torch.ones(1, 3), max_new_tokens=3,
                               do_sample=False, pad_token_id=0)[0, -1])
    wanted = generated(model, first, most)
    found = natural(model.train(), PROMPTS, {first}, most, Meter(NullSensor("none here")))
    assert found["tokens_per_request"]["value"] == pytest.approx(sum(wanted) / 4) and model.training
    assert found["tokens_per_request"]["n"] == 4 and found["joules_per_request"]["method"] == "none here"
    again = natural(model, PROMPTS, {first}, most, Meter(NullSensor("none here")))
    assert again == found and 0 <= found["stopped"]["value"] <= 1


def test_the_energy_is_that_of_all_passes() -> None:
    bill = Bill()
    model = bill.watch(llama(1), "variant", 0.5, 1.0)
    found = natural(model, PROMPTS, set(), 5, Meter(ReplaySensor(lambda: {"gpu0": bill.joules})))
    prefills = sum(0.5 * len(ids) if len(ids) > 1 else 1.0 for ids in PROMPTS)
    assert found["joules_per_request"]["value"] == pytest.approx((prefills + 4 * 4 * 1.0) / 4)
    assert found["tokens_per_request"]["value"] == 5 and found["stopped"]["value"] == 0


def test_long_prompts_are_cut_to_leave_room() -> None:
    found = natural(llama(1), [list(range(2, 60))], set(), 8, Meter(NullSensor("no")))  # a context of 32
    assert found["tokens_per_request"]["value"] == 8 and found["tokens_per_request"]["ci95"] is None


def test_stop_tokens_are_those_of_both() -> None:
    model = llama(1)
    model.generation_config.eos_token_id = [4, 5]
    assert stop_tokens(model, type("T", (), {"eos_token_id": 9})()) == {4, 5, 9}
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, object()) == set()


def test_a_mean_has_its_t_interval() -> None:
    middle, (low, high) = mean_interval([1.0, 2.0, 3.0])
    assert (middle, high - middle) == (2.0, pytest.approx(4.302653 / 3 ** 0.5)) and middle - low == high - middle
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
