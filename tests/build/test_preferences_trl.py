"""The loss on pairs against TRL's DPOTrainer: same model, same reference, same pairs. Runs where TRL is installed."""

import json

import pytest
import torch
from tests.twins import twin

from llmops.build.preferences import Pairs, answer_log_probs, pair_loss, pair_rows
from llmops.data.options import Limits
from llmops.data.pairs import encode_pairs
from llmops.data.sources import rows_from
from llmops.methods.finetune.options import Dpo
from llmops.models.packed_rows import use_packed_attention

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

TURNS = [{"prompt": [{"role": "user", "content": f"Where is bridge {number}?"}],
          "chosen": [{"role": "assistant", "content": "near the sea" + "!" * number}],
          "rejected": [{"role": "assistant", "content": "north" + " of the river" * number}]} for number in range(4)]
#: TRL's name of a loss -> ours
LOSSES = {"sigmoid": {"loss": "sigmoid"}, "hinge": {"loss": "hinge"},
          "ipo": {"loss": "ipo", "average_log_probs": True},
          "sigmoid_norm": {"loss": "sigmoid", "average_log_probs": True}}


def ours() -> tuple[torch.nn.Module, torch.nn.Module, Pairs]:
    """The model, another one as its reference, and the pairs as we tokenize them."""
    model, tokenizer = twin("llama", torch.float32)
    reference, _ = twin("llama", torch.float32, seed=1)
    encoded = encode_pairs(rows_from("pairs", json.loads(json.dumps(TURNS))), tokenizer, max_length=128,
                           limits=Limits())
    return model, reference, Pairs(encoded.chosen, encoded.rejected, [0, 1, 2, 3], [], tokenizer.pad_token_id)


def theirs(tmp_path, kind: str):
    """TRL's trainer on the same, and its one batch of all pairs."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = twin("llama", torch.float32)
    reference, _ = twin("llama", torch.float32, seed=1)
    config = DPOConfig(output_dir=str(tmp_path), loss_type=[kind], beta=0.3, per_device_train_batch_size=4,
                       report_to=[], use_cpu=True, bf16=False, max_length=128, disable_dropout=True,
                       gradient_checkpointing=False)
    trainer = DPOTrainer(model=model, ref_model=reference, args=config, train_dataset=Dataset.from_list(TURNS),
                         processing_class=tokenizer)
    trainer.model.train()
    return trainer, trainer.data_collator([trainer.train_dataset[number] for number in range(4)])


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradient_are_those_of_trl(tmp_path, kind):
    trainer, batch = theirs(tmp_path, kind)
    model, reference, pairs = ours()
    for number, side in enumerate([*pairs.chosen, *pairs.rejected]):
        size = len(side["input_ids"])
        assert batch["input_ids"][number, :size].tolist() == side["input_ids"]
        trained = [label != -100 for label in side["labels"]]
        assert batch["completion_mask"][number, :size].bool().tolist() == trained
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    rows = pair_rows(pairs, pairs.train, answer_log_probs(reference, pairs, pairs.train))
    with use_packed_attention(model):
        found = pair_loss(model, rows.batch(pairs.train), options=Dpo(method="dpo", data="pairs", beta=0.3,
                                                                      **LOSSES[kind])) / 4
        found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-5)
    names = dict(trainer.model.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in names.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, names[name].grad, rtol=1e-4, atol=1e-5 * largest, msg=name)
