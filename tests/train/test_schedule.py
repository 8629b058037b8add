"""The learning rate: its curve over the steps, its groups, and where it comes from when it is looked for."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmops.errors import StepError
from llmops.methods.finetune.lora import lora_plus_scale
from llmops.train import Schedule, token_rows
from llmops.train.finder import choose_rate, find_rate
from llmops.train.schedule import make_optimizer, rate_factor


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64,
                                        num_attention_heads=2, num_key_value_heads=1))


def rows():
    drawn = torch.Generator().manual_seed(0)
    made = [torch.randint(3, 64, (8,), generator=drawn).tolist() for _ in range(4)]
    return token_rows([{"input_ids": ids, "labels": ids} for ids in made], pad_id=0)


def test_the_rate_rises_for_the_warmup_reaches_its_peak_and_is_never_zero():
    cosine = [rate_factor(step, 10, Schedule(schedule="cosine", warmup=0.2)) for step in range(10)]
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(later < earlier for earlier, later in zip(cosine[2:], cosine[3:], strict=False)) and cosine[-1] > 0
    linear = [rate_factor(step, 4, Schedule(schedule="linear", warmup=0.0)) for step in range(4)]
    assert linear == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert [rate_factor(step, 3, Schedule(schedule="constant", warmup=0.0)) for step in range(3)] == [1.0] * 3


def test_groups_keep_their_own_factor_and_vectors_are_not_decayed():
    named = [("x.lora_A.default.weight", torch.ones(2, 2)), ("x.lora_B.default.weight", torch.ones(2, 2)),
             ("norm", torch.ones(2))]
    made = make_optimizer(named, Schedule(weight_decay=0.1), 1e-3, lora_plus_scale(16.0))
    found = {(group["scale"], group["weight_decay"]): (len(group["params"]), group["lr"]) for group in
             made.param_groups}
    assert found == {(1.0, 0.1): (1, 1e-3), (16.0, 0.1): (1, 1.6e-2), (1.0, 0.0): (1, 1e-3)}


def test_a_tenth_of_the_rate_of_the_lowest_smoothed_loss_is_chosen():
    assert choose_rate([(10.0**at, loss) for at, loss in enumerate([5.0, 4.0, 1.0, 1.0, 9.0])]) == pytest.approx(100.0)


def test_the_search_leaves_weights_gradients_mode_and_random_numbers_as_they_were():
    net = model().eval()
    net.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = find_rate(net, rows(), Schedule(batch_size=4, optimizer="adamw"), seed=0)
    assert torch.equal(torch.rand(3), expected) and not net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(value.grad is None for value in net.parameters())
    assert [value.requires_grad for name, value in net.named_parameters() if name == "lm_head.weight"] == [False]
    rates = [rate for rate, _ in found.curve]
    assert rates == sorted(rates) and 1e-6 < found.rate < 1.0
    assert min(loss for _, loss in found.curve) < found.curve[0][1]


def test_a_loss_that_no_rate_lowers_is_an_error_with_a_cure():
    def flat(net, batch):
        return 0 * net(input_ids=batch["input_ids"]).logits.sum() + batch["input_ids"].numel()

    with pytest.raises(StepError, match="lowered the loss .* give learning_rate as a number"):
        find_rate(model(), token_rows([{"input_ids": [3, 4], "labels": [3, 4]}], pad_id=0, packed=False),
                  Schedule(batch_size=1), seed=0, loss=flat, steps=4)
