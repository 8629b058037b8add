"""2:4 weights run packed: the same logits in little more than half of the bytes, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from tests.twins import tokens, twin

import llmops
from llmops.measure.memory import weights_bytes
from llmops.models import sparse24
from llmops.models.parity import count_parameters, sparsity
from llmops.models.sparse24 import Sparse24Linear, is_24, run_as_pruned
from llmops.models.zeros import lost_zeros, zero_bits
from llmops_kernels.reference.sparse24_linear import places_width

PAIRS = {"prune": {"method": "magnitude", "pattern": "2:4"}}


def test_packed_pairs_give_what_the_dense_model_gives_and_count_as_it_does() -> None:
    model, tokenizer = twin("llama-untied-bias")
    sparse = llmops.apply(model, tokenizer, PAIRS)
    ids, held = tokens(2, 12), zero_bits(sparse)
    before = sparsity(sparse), count_parameters(sparse), weights_bytes(sparse).value
    with torch.no_grad():
        expected = sparse(ids).logits.float()
        done = run_as_pruned(sparse, everywhere=True)
        found = sparse(ids).logits.float()
    assert len(done) == 28 and "lm_head" not in done
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    assert (sparsity(sparse), count_parameters(sparse)) == before[:2] and lost_zeros(sparse, held)[0] == 0
    saved = sum(module.out_features * (module.in_features - places_width(module.in_features))
                for module in sparse.modules() if isinstance(module, Sparse24Linear))
    assert before[2] - weights_bytes(sparse).value == saved  # two bytes for one, and four bits a group


def test_only_pairs_in_half_precision_on_a_gpu_are_packed() -> None:
    model, tokenizer = twin("llama")
    assert run_as_pruned(model, everywhere=True) == []  # dense
    sparse = llmops.apply(model, tokenizer, PAIRS)
    assert run_as_pruned(sparse) == []  # on a CPU
    assert run_as_pruned(sparse.float(), everywhere=True) == []
    assert not is_24(torch.ones(2, 8)) and not is_24(torch.zeros(2, 6)) and is_24(torch.zeros(2, 8))


def test_a_layer_whose_packed_product_is_wrong_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = twin("llama")
    sparse = llmops.apply(model, tokenizer, PAIRS)
    monkeypatch.setattr(Sparse24Linear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
    assert run_as_pruned(sparse, everywhere=True) == []
    monkeypatch.setattr(sparse24, "find_spec", lambda name: None)
    assert run_as_pruned(sparse, everywhere=True) == []
