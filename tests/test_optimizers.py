"""8-bit optimizers: near the ones they stand for, refused where they do not run, resumed bit for bit."""

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmops.errors import StepError
from llmops.train import Checkpoints, Hooks, Schedule, fit, token_rows
from llmops.train.schedule import OPTIMIZERS


def model(seed: int = 0) -> LlamaForCausalLM:
    """Matrices of 4096 entries and more, the least that bitsandbytes keeps in 8 bits."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=64,
                                        num_attention_heads=2, num_key_value_heads=2))


def rows(count: int = 16):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 64, (12,), generator=generator).tolist() for _ in range(count)]
    return token_rows([{"input_ids": ids, "labels": ids} for ids in drawn], pad_id=0)


def schedule(optimizer: str, **more) -> Schedule:
    return Schedule(**{"epochs": 6, "batch_size": 4, "learning_rate": 3e-3, "weight_decay": 0.01,
                       "optimizer": optimizer, **more})


def weights(net) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def test_adamw_in_8_bits_follows_adamw():
    whole = fit(model(), rows(), schedule("adamw"), seed=1).loss
    small = fit(model(), rows(), schedule("adamw_8bit"), seed=1).loss
    assert [loss for _, loss in small] == pytest.approx([loss for _, loss in whole], rel=0.03)
    assert whole[-1][1] < 0.8 * whole[0][1] and small != whole


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_its_state_is_in_8_bits_and_survives_a_kill_bit_for_bit(name, tmp_path):
    rate = {"learning_rate": 3e-4} if name == "lion_8bit" else {}
    undisturbed = model()
    fit(undisturbed, rows(), schedule(name, **rate), seed=1)

    class Killed(Exception):
        pass

    def kill(step, figures):
        if step == 13:
            raise Killed

    killed = model()
    with pytest.raises(Killed):
        fit(killed, rows(), schedule(name, **rate), seed=1, checkpoints=Checkpoints(tmp_path, every_steps=5),
            hooks=Hooks(log=kill))
    _, saved = Checkpoints(tmp_path).latest()
    states = [entry for one in saved.optimizer.values()
              for entry in (one, *(value for value in one.values() if isinstance(value, dict)))]
    assert any("state1" in entry and entry["state1"].dtype == torch.uint8 for entry in states)
    resumed = model(seed=9)
    done = fit(resumed, rows(), schedule(name, **rate), seed=1, checkpoints=Checkpoints(tmp_path, every_steps=5))
    assert any("checkpoint of step 10" in event for event in done.events)
    assert torch.equal(weights(resumed), weights(undisturbed))


def test_a_paged_one_is_refused_on_a_cpu_before_anything_is_trained():
    net = model()
    before = weights(net).clone()
    with warnings.catch_warnings(), pytest.raises(StepError, match="does not run on cpu; expected a device of cuda, xpu"
                                                  ": use optimizer: adamw_8bit or adamw"):
        fit(net, rows(), schedule("paged_adamw_8bit"), seed=1)
    assert torch.equal(weights(net), before)


def test_a_device_without_8_bit_optimizers_says_so():
    group = [{"params": [torch.nn.Parameter(torch.empty(4, device="meta"))]}]
    with pytest.raises(StepError, match="does not run on meta; .* use optimizer: adamw$"):
        OPTIMIZERS["adamw_8bit"](group, 1e-3)
