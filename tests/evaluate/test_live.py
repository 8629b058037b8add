import pytest
import torch
from tests.twins import twin

from llmops.evaluate import live


def test_losses_equal_cross_entropy_however_they_are_sliced(monkeypatch):
    logits = torch.randn(37, 101, generator=torch.Generator().manual_seed(0)) * 5
    targets = torch.randint(0, 101, (37,), generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(live.token_losses(logits, targets).double(), expected, rtol=1e-6, atol=1e-6)
    whole = live.token_losses(logits, targets)
    monkeypatch.setattr(live, "SLICE", 101 * 5)
    torch.testing.assert_close(live.token_losses(logits, targets), whole, rtol=0, atol=0)


def test_batches_shrink_as_logits_grow():
    assert live.batch_rows(64, 30, 2048) == 64
    assert live.batch_rows(8, 2048, 150_000) == 1
    rows = live.batch_rows(64, 128, 150_000)
    assert 1 < rows < 64 and rows * 128 * 150_000 <= live.MAX_LOGITS


def test_item_ids_tell_token_ids_and_boundaries_apart():
    ids = {live.item_id([1, 2, 3]), live.item_id([1, 2], [3]), live.item_id([1], [2, 3]), live.item_id([1, 2, 4])}
    assert len(ids) == 4 and all(len(each) == 16 for each in ids)
    assert live.item_id([1, 2, 3]) == live.item_id(torch.tensor([1, 2, 3]).tolist())


def test_the_tokenizer_hash_ignores_padding_and_sees_the_vocabulary():
    _, tokenizer = twin("llama")
    before = live.tokenizer_sha256(tokenizer)
    tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=4)
    assert live.tokenizer_sha256(tokenizer) == before
    tokenizer.add_tokens(["brand-new"])
    assert live.tokenizer_sha256(tokenizer) != before


def test_scoring_puts_train_and_eval_back():
    model, other = torch.nn.Dropout().train(), torch.nn.Dropout().eval()
    with pytest.raises(KeyError), live.scoring(model, other):
        assert not model.training and torch.is_inference_mode_enabled()
        raise KeyError
    assert model.training and not other.training and not torch.is_inference_mode_enabled()


def test_stop_ids_are_the_models_and_the_tokenizers():
    model, tokenizer = twin("llama")
    model.generation_config.eos_token_id = [4, 3]
    assert live.stop_ids(model, tokenizer) == {1, 3, 4}
