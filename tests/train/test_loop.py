import pytest
import torch
from tests.train.makers import examples
from transformers import LlamaConfig, LlamaForCausalLM

from llmops.errors import StepError
from llmops.models.token_loss import next_token_loss
from llmops.train import Hooks, Schedule, fit, token_rows


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64,
                                        num_attention_heads=2, num_key_value_heads=1))


def weights(trained) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trained.parameters()])


def test_loss_is_the_sum_over_trained_tokens_written_out():
    net = model()
    rows = examples(2)
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (length - len(row["labels"])) for row in rows])
    attention = (ids != 0).long()
    batch = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    expected = 0.0
    for row in rows:
        log_p = net(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        expected -= sum(float(log_p.detach()[t - 1, row["input_ids"][t]]) for t in range(2, len(row["input_ids"])))
    assert float(next_token_loss(net, batch).detach()) == pytest.approx(expected, rel=1e-4)


def test_accumulation_equals_the_big_batch_also_with_rows_of_different_length():
    big, small = model(), model()
    schedule = {"epochs": 2, "learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0}
    one = fit(big, token_rows(examples(8), pad_id=0), Schedule(**schedule, batch_size=8), seed=1)
    two = fit(small, token_rows(examples(8), pad_id=0), Schedule(**schedule, batch_size=2, accumulate=4), seed=1)
    assert one.steps == two.steps == 2
    assert [loss for _, loss in one.loss] == pytest.approx([loss for _, loss in two.loss], rel=1e-4)
    torch.testing.assert_close(weights(big), weights(small), rtol=1e-3, atol=2e-4)


def test_same_seed_same_weights_and_the_loss_falls():
    first, second = model(), model()
    schedule = Schedule(epochs=20, learning_rate=1e-2, batch_size=4)
    found = fit(first, token_rows(examples(8), pad_id=0), schedule, seed=5)
    fit(second, token_rows(examples(8), pad_id=0), schedule, seed=5)
    assert torch.equal(weights(first), weights(second))
    assert found.loss[-1][1] < 0.5 * found.loss[0][1]
    assert found.steps == 40 and found.tokens == 20 * sum(len(row["input_ids"]) for row in examples(8))


def test_a_loss_that_is_not_finite_stops_and_names_the_rows():
    net = model()
    with torch.no_grad():
        net.model.embed_tokens.weight[7] = float("nan")
    rows = examples(6)
    for row in rows:
        row["input_ids"] = [token if token != 7 else 8 for token in row["input_ids"]]
    rows[4]["input_ids"][1] = 7
    with pytest.raises(StepError, match=r"became nan at optimizer step \d+, on the batch of row 5;"):
        fit(net, token_rows(rows, pad_id=0), Schedule(epochs=1, batch_size=1), seed=0)


def test_after_step_runs_after_every_optimizer_step():
    net, calls = model(), []
    fit(net, token_rows(examples(8), pad_id=0), Schedule(epochs=1, batch_size=4), seed=0,
        hooks=Hooks(after_step=lambda: calls.append(1)))
    assert len(calls) == 2
