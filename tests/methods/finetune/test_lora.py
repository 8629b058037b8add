import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmops.methods.finetune import add_lora, lora_delta, masked_lora_linear, merge_lora, zero_masks

IDS = torch.arange(3, 27).view(2, 12)


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
                                        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)).eval()


def trained(adapted, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def test_delta_is_the_outer_products_summed():
    A, B = torch.randn(3, 5), torch.randn(4, 3)
    expected = 2.0 * sum(torch.outer(B[:, r], A[r]) for r in range(3))
    torch.testing.assert_close(lora_delta(A, B, 2.0), expected)


def test_masked_linear_is_the_linear_of_the_masked_product():
    x, A, B = torch.randn(2, 6, 5), torch.randn(3, 5), torch.randn(4, 3)
    mask = torch.rand(4, 5) > 0.5
    expected = torch.einsum("bti,oi->bto", x, torch.where(mask, 0.5 * B @ A, 0.0))
    torch.testing.assert_close(masked_lora_linear(x, A, B, mask, 0.5), expected)


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_at_the_start_an_adapter_is_the_identity(keep_zeros):
    plain = model()(input_ids=IDS).logits
    adapted = add_lora(model(), rank=4, alpha=8, keep_zeros=keep_zeros).eval()
    torch.testing.assert_close(adapted(input_ids=IDS).logits, plain, rtol=0, atol=0)


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_merged_equals_unmerged(keep_zeros):
    base = model()
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, torch.nn.Linear) and module is not base.lm_head:
                module.weight.mul_(torch.rand(module.weight.shape) > 0.5)
    adapted = trained(add_lora(base, rank=4, alpha=8, keep_zeros=keep_zeros)).eval()
    unmerged = adapted(input_ids=IDS).logits
    torch.testing.assert_close(merge_lora(adapted)(input_ids=IDS).logits, unmerged, rtol=1e-4, atol=1e-5)


def test_zeros_survive_training_and_merge_exactly():
    base = model()
    q_proj = base.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        q_proj.weight[::2, 1::3] = 0
    zeros = q_proj.weight == 0
    merged = merge_lora(trained(add_lora(base, rank=4, alpha=8, keep_zeros=True)))
    weight = merged.model.layers[0].self_attn.q_proj.weight
    assert bool((weight[zeros] == 0).all()) and bool((weight[~zeros] != 0).all())
    dense = merge_lora(trained(add_lora(model(), rank=4, alpha=8)))
    assert bool((dense.model.layers[0].self_attn.q_proj.weight[zeros] != 0).any())


def test_gradients_of_masked_entries_do_not_reach_the_adapter():
    x, mask = torch.randn(1, 5), torch.zeros(4, 5, dtype=torch.bool)
    A, B = torch.randn(3, 5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    masked_lora_linear(x, A, B, mask, 1.0).sum().backward()
    assert float(A.grad.abs().sum() + B.grad.abs().sum()) == 0


def test_same_seed_same_adapter_and_the_output_head_is_left_out():
    first, second = add_lora(model(), rank=4, alpha=8, seed=3), add_lora(model(), rank=4, alpha=8, seed=3)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not any("lm_head" in name for name, p in first.named_parameters() if p.requires_grad)


def test_zero_masks_names_only_layers_with_zeros():
    base = model()
    assert zero_masks(base) == {}
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[0, 0] = 0
    (name,) = zero_masks(base)
    assert name == "model.layers.1.mlp.up_proj"
