"""NEFTune: how large the noise is, on what, and when."""

import pytest
import torch
from tests.twins import twin

from llmops.methods.finetune.neftune import noisy_embeddings, row_lengths, with_noise
from llmops.models.packed_rows import pack


def test_noise_is_uniform_of_the_papers_size_for_each_row():
    x = torch.zeros(2, 400, 64)
    lengths = torch.tensor([[100] * 400, [400] * 400])
    noise = with_noise(x, lengths, 5.0)
    for row, length in ((0, 100), (1, 400)):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.99 * bound < float(noise[row].abs().max()) <= bound
        assert float(noise[row].std()) == pytest.approx(bound / 3**0.5, rel=0.03)
        assert abs(float(noise[row].mean())) < 0.02 * bound


def test_a_packed_and_a_padded_batch_know_the_same_lengths():
    rows = [{"input_ids": list(range(length)), "labels": list(range(length))} for length in (3, 5)]
    assert row_lengths(pack(rows)).tolist() == [[3] * 3 + [5] * 5]
    padded = {"attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    assert row_lengths(padded).tolist() == [[3] * 5, [5] * 5]


@pytest.mark.parametrize("packed", [True, False])
def test_noise_of_a_model_is_per_row_off_in_eval_and_follows_the_seed(packed):
    model, _ = twin("llama", torch.float32)
    ids = [list(range(5, 9)), list(range(5, 105))]
    if packed:
        batch = pack([{"input_ids": row, "labels": row} for row in ids])
        short, long = (0, slice(0, 4)), (0, slice(4, 104))
    else:
        batch = {"input_ids": torch.tensor([ids[0] + [0] * 96, ids[1]]),
                 "attention_mask": torch.tensor([[1] * 4 + [0] * 96, [1] * 100])}
        short, long = (0, slice(0, 4)), (1, slice(0, 100))
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        plain = embedding(batch["input_ids"])

        def noisy(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            return embedding(batch["input_ids"]) - plain

        noise = noisy_embeddings(model, 5.0)
        with noise:
            noise.see(batch)
            model.train()
            first, again, other = noisy(1), noisy(1), noisy(2)
            model.eval()
            assert not noisy(1).any()
        model.train()
        assert not noisy(1).any()  # and gone afterwards
    assert torch.equal(first, again) and not torch.equal(first, other)
    for place, length in ((short, 4), (long, 100)):
        bound = 5.0 / (length * 128) ** 0.5
        assert 0.95 * bound < float(first[place].abs().max()) <= bound * (1 + 1e-4)


def test_no_noise_for_alpha_zero():
    assert noisy_embeddings(twin("llama")[0], 0.0) is None
