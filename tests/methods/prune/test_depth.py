"""Depth pruning: the even choice against its definition, block influence against a loop, models cut and reloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.twins import NAMES, tokens, twin

from llmops.errors import LlmopsError
from llmops.methods.prune.depth import block_influence, even_layers, influential_layers
from llmops.models.arch import decoder_layers, renumber_layers


def test_even_layers_are_distinct_ascending_and_evenly_spaced_for_every_size() -> None:
    for total in range(1, 40):
        for keep in range(1, total + 1):
            chosen = even_layers(total, keep)
            assert len(chosen) == len(set(chosen)) == keep and chosen == sorted(chosen)
            assert chosen[0] == 0 and (keep == 1 or chosen[-1] == total - 1)
            gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
            assert not gaps or max(gaps) - min(gaps) <= 1
    assert even_layers(8, 4) == [0, 2, 5, 7]


def test_block_influence_matches_a_loop() -> None:
    x, y = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind(0)
    cosines = [float(torch.dot(a, b) / (a.norm() * b.norm())) for a, b in zip(x, y, strict=True)]
    assert block_influence(x[None], y[None]) == pytest.approx(1 - sum(cosines) / 5, abs=1e-6)
    assert block_influence(x, x * 3) == pytest.approx(0, abs=1e-12)
    assert block_influence(x, -x) == pytest.approx(2)
    assert block_influence(torch.zeros(2, 3), torch.ones(2, 3)) == 1.0


def test_influential_layers_keeps_the_highest_and_the_earlier_of_equals() -> None:
    assert influential_layers([0.1, 0.9, 0.3, 0.3, 0.3], 3) == [1, 2, 3]
    with pytest.raises(LlmopsError, match="6 layers to keep of a model with 5; expected 1 to 5"):
        influential_layers([0.1] * 5, 6)
    with pytest.raises(LlmopsError, match="expected 1 to 4"):
        even_layers(4, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_model_is_an_ordinary_model_that_reloads(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = twin(name, torch.float32)
    ids, keep = tokens(2, 40), [0, 1, 3]
    _, layers = decoder_layers(model)
    skipped = layers[2]
    skipped.forward = lambda hidden_states, *args, **kwargs: hidden_states  # brute force: the layer does nothing
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    del skipped.forward
    cut = renumber_layers(model, keep)
    assert cut.config.num_hidden_layers == 3
    with torch.no_grad():
        assert torch.equal(cut(ids, use_cache=False).logits, expected)
        by_step = cut.generate(ids[:1, :8], max_new_tokens=6, do_sample=False, use_cache=True)
        at_once = cut.generate(ids[:1, :8], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(by_step, at_once)  # the cache is addressed by layer_idx
    cut.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)


def test_layer_types_and_windows_follow_their_layers() -> None:
    gemma, _ = twin("gemma3")
    renumber_layers(gemma, [1, 2])
    assert gemma.config.layer_types == ["full_attention", "sliding_attention"]
    qwen, _ = twin("qwen3")  # max_window_layers=3: layers 0, 1, 2 come before the windowed ones
    renumber_layers(qwen, [0, 3])
    assert qwen.config.max_window_layers == 1


def test_refuses_what_cannot_be_kept() -> None:
    model, _ = twin("llama")
    for keep in ([], [0, 4], [1, 0], [2, 2]):
        with pytest.raises(LlmopsError, match="expected ascending indices within 0..3"):
            renumber_layers(model, keep)
    model.config.num_kv_shared_layers = 2
    with pytest.raises(LlmopsError, match="num_kv_shared_layers=2, which ties layers to their places"):
        renumber_layers(model, [0, 1])
