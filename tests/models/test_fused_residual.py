"""The addition that ends a block, in the kernel of the norm that begins the next: who looks sees no difference."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from tests.models.test_serving import logits, packed
from tests.twins import tokens, twin
from torch import nn

from llmops.models import fused
from llmops.models.fused import Ready, fuse
from llmops.models.joined import join

MODELS = {"dense": lambda name: twin(name, torch.bfloat16)[0],
          "w4a16": lambda name: packed(name, "w4a16 in groups of 32, zero points", "ops"),
          "w8a8": lambda name: packed(name, "w8a8", "ops"), "fp8-block": lambda name: packed(name, "fp8-block", "ops")}


def ready(model: Any, wanted: bool = True) -> Any:
    """The model joined and fused; wanted False: with the second norm of a block alone, as if nothing followed."""
    model.eval()
    join(model)
    if wanted:
        fuse(model)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "_first_norm", lambda following: None)
            fuse(model)
    return model


def held(model: Any) -> list[Ready]:
    """The places where a norm may wait."""
    return [part for module in model.modules() for part in getattr(module.forward, "args", ())
            if isinstance(part, Ready)]


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_blocks_return_the_same_bits_and_the_norms_are_those_of_what_they_return(name: str, kind: str) -> None:
    """Hidden states of a model that adds in the norms beside those of one that adds on its own, from equal inputs."""
    apart, together = (ready(MODELS[kind](name), wanted) for wanted in (False, True))
    assert not held(apart) and len(held(together)) == 2 * 4  # at the block that adds and at the norm that takes
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    places = together.model.rotary_emb(x, torch.arange(5)[None])
    for number, (one, other) in enumerate(zip(apart.model.layers, together.model.layers, strict=True)):
        wanted, found = (block(x, position_embeddings=places, attention_mask=None) for block in (one, other))
        assert torch.equal(found, wanted)
        following = [*together.model.layers[1:], together.model][number]
        norm = following.input_layernorm if number < 3 else following.norm
        taken, anew = norm(found), norm(found.clone())
        if taken.dtype == anew.dtype == torch.bfloat16:
            assert float((taken.float() - anew.float()).norm() / anew.float().norm()) < 3e-3
        else:
            assert taken.dtype == anew.dtype and int((taken.float() - anew.float()).abs().max()) <= (
                1 if kind == "w8a8" else 32)
            following.self_attn.q_proj.whole.given = None
        x = wanted
    assert all(place.held is None for place in held(together))


@torch.no_grad()
def test_a_whole_model_computes_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    home = importlib.import_module("llmops_kernels.rms_norm")
    op = home.add_rms_norm
    monkeypatch.setattr(home, "add_rms_norm", lambda *args: counted.append("add") or op(*args))
    apart, together = (ready(MODELS["dense"]("mistral"), wanted) for wanted in (False, True))
    wanted = logits(apart)
    assert len(counted) == 4
    found = logits(together)
    assert len(counted) == 4 + 8  # both of each block
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2
    seen = [model(tokens(2, 24), output_hidden_states=True).hidden_states for model in (apart, together)]
    assert torch.equal(seen[0][0], seen[1][0]) and len(seen[1]) == 5
    for one, other in zip(*seen, strict=True):
        assert float((one.float() - other.float()).norm() / one.float().norm()) < 1e-2
    assert torch.equal(logits(together), found)


@torch.no_grad()
def test_what_takes_the_place_of_a_blocks_output_is_normed_itself() -> None:
    apart, together = (ready(MODELS["w8a8"]("llama"), wanted) for wanted in (False, True))
    for model in (apart, together):
        model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 0.5)
    wanted, found = logits(apart), logits(together)
    assert float((found - wanted).norm() / wanted.norm()) < 3e-2
    assert together.model.layers[2].self_attn.q_proj.whole.given is None
    del together.model.layers[3]  # a shorter model: what was ready for the last block is not taken by the norm
    together.config.num_hidden_layers = 3
    assert logits(together).isfinite().all()


def test_other_types_and_other_classes_add_as_before() -> None:
    wide = ready(twin("llama", torch.float32)[0])
    plain = twin("llama", torch.float32)[0]
    assert torch.allclose(logits(wide), logits(plain), atol=1e-4) and all(place.held is None for place in held(wide))
    other = ready(twin("gemma2", torch.bfloat16)[0])
    assert not held(other)
    empty = nn.Module()
    empty.layers = nn.ModuleList()
    assert fuse(empty) == 0


@torch.no_grad()
def test_two_blocks_compile_whole() -> None:
    model = ready(MODELS["w8a8"]("llama"))
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    places = model.model.rotary_emb(x, torch.arange(3)[None])

    def run(x: torch.Tensor) -> torch.Tensor:
        for block in model.model.layers[:2]:
            x = block(x, position_embeddings=places, attention_mask=None)
        return model.model.layers[2].input_layernorm(x).float()

    wanted = run(x)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), wanted)
