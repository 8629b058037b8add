"""Early stopping: what counts as a gain, what it may cost, and what looking may cost."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmops.train import Hooks, Schedule, Stopping, fit, token_rows


def seen(looks: list[tuple[float, float]], **rule: object) -> list[bool]:
    """Whether each of the looks, (loss, energy), ends the training."""
    stopping = Stopping(**rule)  # type: ignore[arg-type]
    return [stopping.see(step, loss, energy) for step, (loss, energy) in enumerate(looks, 1)]


def test_it_stops_when_nothing_was_gained_as_often_as_patience_says():
    losses = [3.0, 2.0, 2.1, 1.9, 1.95, 1.9]
    assert seen([(loss, 10.0 * at) for at, loss in enumerate(losses)], patience=2) == [False] * 5 + [True]


def test_it_stops_when_a_gain_costs_too_much():
    """0.1 nats for 100 J are 1 nat a kilojoule."""
    looks = [(3.0 - 0.1 * at, 100.0 * at) for at in range(5)]
    assert seen(looks, patience=2, min_gain_per_kilojoule=0.9) == [False] * 5
    assert seen(looks, patience=2, min_gain_per_kilojoule=1.1) == [False, False, True, True, True]


@pytest.mark.parametrize(("bound", "ends"), [(0.9, False), (1.1, True)])
def test_a_counter_that_moves_less_often_than_looks_are_taken_gives_the_same_price(bound, ends):
    """The same training, 1 nat a kilojoule, whose counter moves at every fourth look."""
    looks = [(3.0 - 0.1 * at, 100.0 * (at // 4 * 4)) for at in range(17)]
    assert any(seen(looks, patience=2, min_gain_per_kilojoule=bound)) is ends


@pytest.mark.parametrize(("steps", "every"), [(4, 50), (20, 5), (21, 20)])
def test_looking_costs_no_more_than_its_share_of_the_training_however_short_that_is(steps, every):
    net = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64,
                                       num_attention_heads=2, num_key_value_heads=1))
    ids = torch.randint(3, 64, (10,)).tolist()
    rows = token_rows([{"input_ids": ids, "labels": ids}] * 40, pad_id=0)
    done = fit(net, rows, Schedule(max_steps=steps, batch_size=4), seed=0, held_out=rows,
               stopping=Stopping(patience=99, every=every, share=0.25))
    assert 0 < done.held_out_tokens / 3 <= 0.25 * done.tokens  # a training pass is three forward passes


@pytest.mark.parametrize(("joules", "told"), [(None, True), (5.0, False)])
def test_a_price_in_joules_that_nobody_measured_is_told(joules, told):
    net = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64,
                                       num_attention_heads=2, num_key_value_heads=1))
    rows = token_rows([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4, pad_id=0)
    done = fit(net, rows, Schedule(max_steps=1, batch_size=4), seed=0, held_out=rows, hooks=Hooks(spent=lambda: joules),
               stopping=Stopping(min_gain_per_kilojoule=1.0, every=1, share=1.0))
    assert any("a second counted as 100 J" in event for event in done.events) is told
