import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llmops.errors import LlmopsError
from llmops.methods.distill import attention_loss, attention_map


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_map_is_what_torch_attends_with():
    q, k, v = drawn(0, 4, 6, 8), drawn(1, 2, 6, 8), drawn(2, 2, 6, 8)  # grouped heads
    expected = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    found = attention_map(q, k, 8**-0.5).exp()
    torch.testing.assert_close(found @ v.repeat_interleave(2, 0), expected)
    assert bool((found.triu(1) == 0).all())


def test_a_window_hides_what_is_long_ago():
    found = attention_map(drawn(0, 1, 5, 4), drawn(1, 1, 5, 4), 0.5, window=2).exp()[0]
    assert [(row > 0).nonzero()[:, 0].tolist() for row in found] == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]


def maps(seed: int, heads: int = 2, length: int = 4) -> torch.Tensor:
    return attention_map(drawn(seed, heads, length, 8), drawn(seed + 50, heads, length, 8), 1.0)


def test_the_loss_is_the_mean_kl_of_heads_and_queries_written_out():
    s, t = maps(0), maps(1)
    expected = sum(math.exp(t[h, i, j]) * float(t[h, i, j] - s[h, i, j])
                   for h in range(2) for i in range(4) for j in range(i + 1)) / 8
    assert float(attention_loss([s], [t])) == pytest.approx(expected, rel=1e-5)
    assert float(attention_loss([s, t], [t, t])) == pytest.approx(expected / 2, rel=1e-5)
    assert float(attention_loss([t], [t])) == 0


def test_as_many_heads_as_not_are_compared_by_their_mean():
    t = maps(1, heads=4)
    assert float(attention_loss([t.exp().mean(0, keepdim=True).log()], [t])) == pytest.approx(0, abs=1e-6)
    assert float(attention_loss([maps(0, heads=2)], [t])) > 0.01


def test_the_gradient_passes_what_is_never_seen():
    q = drawn(0, 2, 4, 8).requires_grad_()
    attention_loss([attention_map(q, drawn(1, 2, 4, 8), 1.0)], [maps(3)]).backward()
    assert q.grad.isfinite().all() and float(q.grad.abs().max()) > 0


def test_maps_over_other_rows_are_refused():
    for student, teacher in (([], []), ([maps(0)], [maps(0, length=5)]), ([maps(0)], [])):
        with pytest.raises(LlmopsError, match="expected pairs over the same rows"):
            attention_loss(student, teacher)
