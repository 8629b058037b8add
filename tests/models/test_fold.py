"""Folding: every architecture's links are found, confirmed by the block, and change nothing that it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.twins import NAMES, tokens, twin
from torch import nn

from llmops import calibrate
from llmops.models.arch import decoder_layers
from llmops.models.fold import Link, find_links, fold


def links_of(model: Any) -> dict[str, list[Link]]:
    found: dict[str, list[Link]] = {}
    calibrate.walk_blocks(model, tokens(2, 24), lambda block: found.update(
        {block.name: find_links(block.module, block.run)}), ignore=["lm_head"])
    return found


def factors(width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(seed)) * 3 + 0.2


@pytest.mark.parametrize("name", NAMES)
def test_four_links_a_block_are_found_and_the_model_is_as_it_was(name: str) -> None:
    model, _ = twin(name, torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = links_of(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fed = "pre_feedforward_layernorm" if name.startswith("gemma") else "post_attention_layernorm"
    for links in found.values():
        assert {(link.source, tuple(sorted(link.targets))) for link in links} == {
            ("self_attn.v_proj", ("self_attn.o_proj",)), ("mlp.up_proj", ("mlp.down_proj",)),
            ("input_layernorm", ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")),
            (fed, ("mlp.gate_proj", "mlp.up_proj"))}
        assert all(link.offset == float(name.startswith("gemma")) for link in links if link.norm)
        shares = model.config.num_attention_heads // model.config.num_key_value_heads
        assert [link.repeat for link in links if link.source == "self_attn.v_proj"] == [shares]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_folding_everything_leaves_the_function_unchanged(name: str) -> None:
    model, _ = twin(name, torch.float32)
    exact = model(tokens()).logits
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    _, blocks = decoder_layers(model)
    for block, links in zip(blocks, links_of(model).values(), strict=True):
        for number, link in enumerate(links):
            width = block.get_submodule(link.targets[0]).in_features
            fold(block, link, link.shared(factors(width, number)))
    moved = [key for key, value in model.state_dict().items() if not torch.allclose(value, weights[key])]
    assert len(moved) >= 4 * 9  # two norms and seven layers a block
    assert (model(tokens()).logits - exact).abs().max() <= 1e-5 * exact.abs().max()


@torch.no_grad()
def test_what_a_norm_in_bfloat16_cannot_hold_goes_into_the_columns() -> None:
    model, _ = twin("llama", torch.float32)
    _, blocks = decoder_layers(model)
    norm, q = blocks[0].input_layernorm, blocks[0].self_attn.q_proj
    norm.weight.copy_(norm.weight.bfloat16())
    product = norm.weight.double() * q.weight.double()
    s = factors(128)
    used = fold(blocks[0], Link("input_layernorm", ("self_attn.q_proj",)), s, torch.bfloat16)
    assert torch.equal(norm.weight, norm.weight.bfloat16().float())
    assert not torch.equal(used, s) and torch.allclose(used, s, rtol=1e-2)
    torch.testing.assert_close(norm.weight.double() * q.weight.double(), product, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_a_norm_that_something_else_reads_is_not_a_link() -> None:
    model, _ = twin("llama", torch.float32)
    _, blocks = decoder_layers(model)

    class Leaky(nn.Module):
        """An MLP that also passes its input on, as experts or a second branch would."""

        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.inner = mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 0.3 * x.roll(1, -1)

    blocks[1].mlp = Leaky(blocks[1].mlp)
    found = links_of(model)
    sources = {name: {link.source for link in links} for name, links in found.items()}
    assert "post_attention_layernorm" in sources["model.layers.0"]
    assert "post_attention_layernorm" not in sources["model.layers.1"]
    assert "mlp.inner.up_proj" in sources["model.layers.1"]
