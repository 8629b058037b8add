"""Width pruning beyond Llama: fused queries, keys and values, layer norms, norms over all heads, mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.prune.test_width import everything, logits
from tests.twins import COMMON, MIXTURES, tokenizer, tokens, twin
from torch import nn

import llmops
from llmops.build.cutting import cut_to
from llmops.build.shape_search import paths
from llmops.errors import LlmopsError
from llmops.importance import width_importance
from llmops.models.arch import decoder_layers
from llmops.models.experts import fuse_experts, split_experts
from llmops.models.narrow import Cut, narrow
from llmops.models.widths import check_shape, head_norms_of, parameters_of, resized, shape_of

FAMILIES = ("gpt2", "gpt_neox", "gpt_neox-sequential", "olmo2")


def made(name: str, seed: int = 0) -> Any:
    """A model in float32 with biases and gains that are not what they begin as; experts taken apart."""
    import transformers as t

    if name in MIXTURES:
        model = twin(name, torch.float32)[0]
        split_experts(model)
        return model
    given = {key: value for key, value in COMMON.items() if key not in ("head_dim", "num_key_value_heads")}
    config: Any = {
        "gpt2": lambda: t.GPT2Config(vocab_size=512, n_embd=128, n_layer=2, n_head=4, n_positions=256, n_inner=None,
                                     initializer_range=0.08, pad_token_id=0, bos_token_id=1, eos_token_id=1),
        "gpt_neox": lambda: t.GPTNeoXConfig(**given | {"num_hidden_layers": 2}),
        "gpt_neox-sequential": lambda: t.GPTNeoXConfig(**given | {"num_hidden_layers": 2}, use_parallel_residual=False),
        "llama-odd-heads": lambda: t.LlamaConfig(**given | {
            "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3},
            head_dim=32),
        "olmo2": lambda: t.Olmo2Config(**given | {"num_hidden_layers": 2, "num_key_value_heads": 2})}[name]()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = t.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if name == "olmo2":  # whose layers read the stream as it is: beside a norm's epsilon it is not to be small
            model.get_input_embeddings().weight.mul_(12)
    return model.eval()


def norms(model: nn.Module, width: int) -> list[nn.Module]:
    return [module for module in model.modules() if "norm" in type(module).__name__.lower()
            and module.weight.shape == (width,)]


@pytest.mark.parametrize("name", [*FAMILIES, *MIXTURES])
def test_a_narrow_model_reloads_and_generates(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = made(name), tokens(4, 20)
    full = shape_of(model)
    to = resized(full, hidden=64 if full.tied else 96, intermediate=full.intermediate // 2,
                 heads=full.heads // 2, kv_heads=max(1, full.kv_heads // 2))
    found = cut_to(model, to, width_importance(model, ids))
    assert shape_of(found) == to and parameters_of(model, to) == sum(p.numel() for p in found.parameters())
    expected = logits(found, ids)
    fuse_experts(found)
    found.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(again, ids), logits(found, ids))
    with torch.no_grad():
        by_step, at_once = (again.generate(ids[:1, :8], attention_mask=torch.ones(1, 8), max_new_tokens=5,
                                           do_sample=False, use_cache=cache) for cache in (True, False))
    assert torch.equal(by_step, at_once)


@pytest.mark.parametrize("name", [*FAMILIES, *MIXTURES])
@torch.no_grad()
def test_cut_channels_are_the_dense_model_with_them_zeroed(name: str) -> None:
    model, ids = made(name), tokens(2, 20)
    full, cut = shape_of(model), everything(model)
    seen = width_importance(model, ids)
    downs = ("down_proj", "mlp.c_proj", "dense_4h_to_h")
    generator, channels = torch.Generator().manual_seed(1), []
    for layer in seen.channels:  # others in each FFN
        channels.append({name: torch.randperm(len(each), generator=generator)[:len(each) // 2].sort().values
                         for name, each in layer.items()})
    to = resized(full, intermediate=full.intermediate // 2)
    found = logits(narrow(model, Cut(to, cut.hidden, channels, cut.heads, cut.kv_heads), {}), ids)
    for block, kept in zip(decoder_layers(model)[1], channels, strict=True):
        for path, module in block.named_modules():
            if path.endswith(downs):
                weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
                gone = torch.ones(weight.shape[1], dtype=torch.bool)
                gone[kept[path.rpartition(".")[0]]] = False
                weight[:, gone] = 0
    torch.testing.assert_close(found, logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES[:3])
@torch.no_grad()
def test_features_that_double_others_and_heads_that_nobody_reads_change_nothing(name: str) -> None:
    """A layer norm's mean and variance are those of either half; what nobody reads of the other half can go."""
    model, ids = made(name), tokens(2, 20)
    keep, gone = torch.arange(64), torch.arange(64, 128)
    for embedding in (module for module in model.modules() if isinstance(module, nn.Embedding)):
        embedding.weight[:, gone] = embedding.weight[:, keep]
    for norm in norms(model, 128):
        norm.weight[gone], norm.bias[gone] = 0, 0
    for block in decoder_layers(model)[1]:
        attention, ffn = (block.attn.c_proj, block.mlp.c_proj) if name == "gpt2" else \
            (block.attention.dense, block.mlp.dense_4h_to_h)
        for out in (attention, ffn):
            weight = out.weight if isinstance(out, nn.Linear) else out.weight.t()
            weight[gone], out.bias[gone] = weight[keep], out.bias[keep]
            if out is attention:
                weight[:, gone] = 0  # of heads 2 and 3
    full, cut, seen = shape_of(model), everything(model), width_importance(model, ids)
    for heads in ([0, 1], [2, 3]):  # the second are not the same: the cut is of those that are named
        found = narrow(model, Cut(resized(full, hidden=64), keep, cut.channels, [heads] * 2, [heads] * 2),
                       seen.squares, seen.means)
        assert found.config.hidden_size == 64 and found.config.num_attention_heads == 2
        same = torch.allclose(logits(found, ids), logits(model, ids), rtol=1e-3, atol=1e-3)
        assert same == (heads == [0, 1])


@torch.no_grad()
def test_a_layer_norm_over_fewer_features_keeps_the_scale_and_the_level_of_what_it_gave() -> None:
    model, ids = made("gpt2"), tokens(6, 40)
    model.transformer.wpe.weight[:, 64:] += torch.linspace(0.5, 2, 64)  # those that go stand apart
    seen, full, cut = width_importance(model, ids), shape_of(model), everything(model)
    to = Cut(resized(full, hidden=64), torch.arange(64), cut.channels, [[0, 1]] * 2, [[0, 1]] * 2)
    found, plain = narrow(model, to, seen.squares, seen.means), narrow(
        model, to, {name: torch.ones(128) for name in seen.squares}, {})
    norm, place = model.transformer.h[0].ln_1, model.transformer.wte(ids) + model.transformer.wpe(torch.arange(40))
    exact = norm(place)[..., :64]
    errors = [float((each.transformer.h[0].ln_1(place[..., :64]) - exact).square().mean()) for each in (found, plain)]
    assert errors[0] < 0.1 * errors[1]


@torch.no_grad()
def test_a_norm_over_all_heads_keeps_its_scale_when_some_go() -> None:
    model, ids = made("olmo2"), tokens(2, 20)
    for block in decoder_layers(model)[1]:  # heads 2 and 3 are KV group 1's
        attention = block.self_attn
        attention.q_proj.weight[64:], attention.k_proj.weight[32:] = 0, 0
        attention.o_proj.weight[:, 64:] = 0
    full, cut, seen = shape_of(model), everything(model), width_importance(model, ids)
    assert set(head_norms_of(model).values()) == {"Q", "K"}
    found = narrow(model, Cut(resized(full, heads=2, kv_heads=1), cut.hidden, cut.channels, [[0, 1]] * 2, [[0]] * 2),
                   seen.squares, seen.means)
    torch.testing.assert_close(logits(found, ids), logits(model, ids), rtol=1e-3, atol=1e-3)
    gains = [each.model.layers[0].self_attn.q_norm.weight[:64] for each in (found, model)]
    torch.testing.assert_close(gains[0], gains[1] * 2**0.5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["olmo2", *MIXTURES])
def test_features_that_are_zero_everywhere_change_nothing(name: str) -> None:
    model, ids = made(name), tokens(2, 20)
    keep, gone = torch.arange(0, 128, 2), torch.arange(1, 128, 2)
    model.get_input_embeddings().weight.mul_(4)[:, gone] = 0
    for path, module in model.named_modules():
        if path.endswith(("o_proj", "down_proj")):
            module.weight[gone] = 0
    full, cut, seen = shape_of(model), everything(model), width_importance(model, ids)
    channels = [{path: torch.arange(len(each)) for path, each in layer.items()} for layer in seen.channels]
    heads, groups = cut.heads, cut.kv_heads
    if full.tied:  # whose heads go along: those that nobody reads
        heads, groups = [[0, 1]] * 2, [[0]] * 2
        for block in decoder_layers(model)[1]:
            block.self_attn.q_proj.weight[64:], block.self_attn.k_proj.weight[32:] = 0, 0
            block.self_attn.o_proj.weight[:, 64:] = 0
        seen = width_importance(model, ids)
    found = narrow(model, Cut(resized(full, hidden=64), keep, channels, heads, groups), seen.squares)
    torch.testing.assert_close(logits(found, ids), logits(model, ids), rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_an_experts_channels_are_as_important_as_its_own_tokens_make_them() -> None:
    model, ids, heard = made("qwen2_moe"), tokens(3, 24), {}
    layer = model.model.layers[1].mlp
    for number, expert in enumerate(layer.experts):
        expert.down_proj.register_forward_pre_hook(
            lambda _, args, number=number: heard.setdefault(number, []).append(args[0].abs()))
    logits(model, ids)
    expected = {number: torch.cat(each).mean(0) for number, each in heard.items()}
    heard.clear()
    found = width_importance(model, ids, batch_size=2)
    assert expected and not found.unseen
    for number, each in expected.items():
        torch.testing.assert_close(found.channels[1][f"mlp.experts.{number}"], each, rtol=1e-4, atol=1e-5)
    assert set(found.channels[0]) == {"mlp"} and "mlp.shared_expert" in found.channels[1]
    few = width_importance(model, ids[:1, :1])  # a token reaches two of four
    for path in few.unseen:
        number = int(path.rpartition(".")[2])
        torch.testing.assert_close(few.channels[1][f"mlp.experts.{number}"],
                                   layer.experts[number].down_proj.weight.norm(dim=0))
    assert len(few.unseen) == 2


def test_tied_heads_follow_hidden_and_shared_experts_the_others() -> None:
    full = shape_of(made("gpt2"))
    assert full.tied and full.intermediate == 512 and resized(full, hidden=96).heads == 3
    assert resized(full, heads=2) == resized(full, hidden=64, heads=2)
    with pytest.raises(LlmopsError, match="hidden is 100 with 3 heads of 32; expected hidden = heads x 32"):
        check_shape(resized(full, hidden=100), full)
    for name, shapes in paths(full, ["hidden", "intermediate", "heads"], 24).items():
        assert all(shape.hidden == 32 * shape.heads for shape in shapes), name
    mixed = shape_of(made("qwen2_moe"))
    assert (mixed.intermediate, dict(mixed.beside)) == (128, {"F": 256, "S": 128})
    assert dict(resized(mixed, intermediate=96).beside) == {"F": 192, "S": 96}


@pytest.mark.parametrize(("name", "more"), [
    ("gpt2", {}), ("qwen3_moe", {}), ("llama-odd-heads", {"axes": ["hidden"]}),
    ("llama-odd-heads", {"axes": ["hidden", "heads"], "steps": 2})])
def test_a_share_of_the_parameters_is_met_by_the_step_itself(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = made(name)
    fuse_experts(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    rows = [{"text": "The old river runs north. " * 20}] * 8
    found = llmops.apply(model, tokenizer(), {"prune": {"method": "width", "parameters": 0.7, "data": "calib",
                                                        "length": 32, "multiple": 16, **more}}, {"calib": rows})
    after = sum(parameter.numel() for parameter in found.parameters())
    assert 0.4 * before < after <= 0.7 * before
    found.save_pretrained(tmp_path)
    ids = tokens(2, 16)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(found, ids))
