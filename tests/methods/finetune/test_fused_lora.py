import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmops.methods.finetune import add_lora, merge_lora
from llmops.methods.finetune.fused_lora import fuse, fused_lora_linear

IDS = torch.arange(3, 43).view(2, 20)


def adapted_model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
                                         num_attention_heads=4, num_key_value_heads=2, attention_bias=True)).to(dtype)
    adapted = add_lora(model, rank=4, alpha=8, **options)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return adapted


def gradients(adapted, ids=IDS):
    adapted.zero_grad(set_to_none=True)
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert found and all(gradient is not None for gradient in found.values())
    return loss.detach(), found


def written_out(x, W, bias, A, B, scaling):
    return nn.functional.linear(x, W, bias) + scaling * (x @ A.t() @ B.t())


@pytest.mark.parametrize("tokens", [3, 50])  # below and above the number from which the adapter is folded in
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_are_those_of_the_sum_written_out(tokens, with_bias, dtype):
    torch.manual_seed(0)
    W, A, B = torch.randn(12, 20), torch.randn(4, 20), torch.randn(12, 4)
    x, bias, weight = torch.randn(2, tokens, 20), torch.randn(12) if with_bias else None, torch.randn(2, tokens, 12)
    results = []
    for function in (fused_lora_linear, written_out):
        leaves = [tensor.clone().to(dtype if function is fused_lora_linear else torch.float64).requires_grad_()
                  for tensor in (x, A, B)]
        given = leaves[0].dtype
        y = function(leaves[0], W.to(given), None if bias is None else bias.to(given), *leaves[1:], 0.5)
        (y * weight.to(given)).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused.double(), plain, rtol=0, atol=2e-6 * float(plain.abs().max()))


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 5, requires_grad=True)
    y = fused_lora_linear(x, torch.randn(4, 5), None, torch.randn(2, 5), torch.randn(4, 2, requires_grad=True), 1.0)
    slope, = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("ids", [IDS, IDS[:, :4]])
def test_a_model_has_peft_s_loss_and_gradients(ids):
    adapted = adapted_model()
    loss, expected = gradients(adapted, ids)
    assert fuse(adapted) == 14
    fused_loss, found = gradients(adapted, ids)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * max(1.0, float(gradient.abs().max())))


def test_in_bfloat16_autocast_it_is_no_further_from_the_exact_gradient_than_peft():
    adapted = adapted_model()
    _, exact = gradients(adapted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, by_peft = gradients(adapted)
        fuse(adapted)
        _, fused = gradients(adapted)

    def off(found):
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        return sum(float((found[name] - exact[name]).norm()) for name in exact)

    assert 0 < off(fused) < 1.2 * off(by_peft)


def test_twice_computes_the_same_bits():
    adapted = adapted_model()
    fuse(adapted)
    first, second = gradients(adapted), gradients(adapted)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_switching_off_and_merging_stay_with_peft():
    adapted = adapted_model().eval()
    unmerged = adapted(input_ids=IDS).logits
    with adapted.disable_adapter():
        without = adapted(input_ids=IDS).logits
    fuse(adapted)
    torch.testing.assert_close(adapted(input_ids=IDS).logits, unmerged)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(input_ids=IDS).logits, without, rtol=0, atol=0)
    copied = copy.deepcopy(adapted)
    torch.testing.assert_close(merge_lora(adapted)(input_ids=IDS).logits, unmerged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copied(input_ids=IDS).logits, unmerged)


def test_a_hook_on_the_base_layer_is_called():
    adapted = adapted_model().eval()
    fuse(adapted)
    seen = []
    layer = adapted.get_base_model().model.layers[0].mlp.down_proj.base_layer
    with torch.no_grad():
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        adapted(input_ids=IDS)
    assert seen == [(2, 20, 32)]


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"keep_zeros": True}])
def test_other_layers_are_left_alone(options):
    adapted = adapted_model(**options)
    forwards = [module.forward for module in adapted.modules()]
    assert fuse(adapted) == 0
    assert [module.forward for module in adapted.modules()] == forwards


def test_types_that_differ_are_peft_s_affair():
    adapted = adapted_model(torch.bfloat16).eval()
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        assert fuse(adapted) == 14
        torch.testing.assert_close(adapted(input_ids=IDS).logits, expected, rtol=0, atol=0)
