"""Rotations: the function of every architecture that allows one stays, and the others are told what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.twins import COMMON, NAMES, tokens, twin

from llmops.errors import ModelError, StepError
from llmops.methods.quantize import hadamard, randomized
from llmops.models.rotate import find_rotation, rotate

POST_NORM = ("gemma2", "gemma3")
PRE_NORM = tuple(name for name in NAMES if name not in POST_NORM)
WITHOUT_HEAD_DIM = {key: value for key, value in COMMON.items() if key != "head_dim"}


def other(kind: str, **changes: Any) -> Any:
    """A float32 model of a kind that has no twin, its norms away from one."""
    import transformers as t

    config = getattr(t, f"{kind}Config")(**WITHOUT_HEAD_DIM | {"num_hidden_layers": 2} | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += torch.randn_like(parameter) * 0.1
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens(3, 40)).logits
    return found


@pytest.mark.parametrize(("name", "parts"), [*((name, ("r1", "r2")) for name in PRE_NORM), ("qwen3", ("r1",)),
                                             *((name, ("r2",)) for name in ("llama", *POST_NORM))])
def test_the_function_stays_and_every_layer_it_concerns_moves(name: str, parts: tuple[str, ...]) -> None:
    model, _ = twin(name, torch.float32)
    exact, before = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    rotate(model, parts, seed=1)
    assert (logits(model) - exact).abs().max() <= 1e-4
    moved = {key.split(".")[-2] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    wanted = {"v_proj", "o_proj"} if parts == ("r2",) else {
        "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "q_proj", "k_proj", "v_proj",
        "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert moved == wanted
    if "r1" in parts:
        assert bool((model.model.norm.weight == 1).all()) and not model.config.tie_word_embeddings


@pytest.mark.parametrize(("kind", "changes"), [
    ("Gemma", {"head_dim": 64}), ("Phi3", {"num_key_value_heads": 4}),
    ("Granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.2, "logits_scaling": 8.0}),
    ("Llama", {"hidden_size": 184, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True})])
def test_other_architectures_and_sizes_without_a_hadamard_matrix(kind: str, changes: dict[str, Any]) -> None:
    model = other(kind, **changes)
    exact = logits(model)
    parts = ("r1",) if kind == "Phi3" else ("r1", "r2")  # its values come out of one layer with queries and keys
    found = find_rotation(model, parts)
    rotate(model, parts)
    assert (logits(model) - exact).abs().max() <= 1e-4
    if kind == "Gemma":  # its gains are 1 + weight
        assert bool((model.model.layers[0].input_layernorm.weight == 0).all())
    assert ("23 blocks of order 8" in found.describe()[0]) == (kind == "Llama")


def test_weights_are_the_products_of_the_papers() -> None:
    model, _ = twin("llama-untied-bias", torch.float32)
    old = {key: value.double() for key, value in model.state_dict().items()}
    rotate(model, seed=4)
    new = {key: value.double() for key, value in model.state_dict().items()}

    def dense(size: int, seed: int) -> torch.Tensor:
        return torch.diag(randomized(size, seed).signs).double() @ hadamard(size).double() / size ** 0.5

    Q, R = dense(128, 4), torch.block_diag(*[dense(64, 4 + 1 + 2)] * 4)  # layer 2, four heads
    at = "model.layers.2."
    g_in, g_mlp = old[f"{at}input_layernorm.weight"], old[f"{at}post_attention_layernorm.weight"]
    wanted = {
        "model.embed_tokens.weight": old["model.embed_tokens.weight"] @ Q,
        "lm_head.weight": old["lm_head.weight"] * old["model.norm.weight"] @ Q,
        f"{at}self_attn.q_proj.weight": old[f"{at}self_attn.q_proj.weight"] * g_in @ Q,
        f"{at}self_attn.q_proj.bias": old[f"{at}self_attn.q_proj.bias"],
        f"{at}self_attn.v_proj.weight": R.t() @ old[f"{at}self_attn.v_proj.weight"] * g_in @ Q,
        f"{at}self_attn.v_proj.bias": old[f"{at}self_attn.v_proj.bias"] @ R,
        f"{at}self_attn.o_proj.weight": Q.t() @ old[f"{at}self_attn.o_proj.weight"] @ R,
        f"{at}self_attn.o_proj.bias": old[f"{at}self_attn.o_proj.bias"] @ Q,
        f"{at}mlp.up_proj.weight": old[f"{at}mlp.up_proj.weight"] * g_mlp @ Q,
        f"{at}mlp.down_proj.weight": Q.t() @ old[f"{at}mlp.down_proj.weight"]}
    for key, value in wanted.items():
        torch.testing.assert_close(new[key], value, rtol=1e-5, atol=1e-6)


def test_a_tied_head_stays_tied_where_the_last_gain_is_one_and_is_untied_and_told_where_not() -> None:
    model, _ = twin("llama", torch.float32)
    told = rotate(model)
    assert told == ["the output head is untied from the embedding: the final norm's gain is folded into it, which "
                    f"takes {512 * 128 * 4:,} bytes more on disk"]
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model, _ = twin("llama", torch.float32)
    model.model.norm.weight.data.fill_(1)
    exact = logits(model)
    assert rotate(model) == [] and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings and (logits(model) - exact).abs().max() <= 1e-4


def test_what_stands_out_in_the_stream_is_spread() -> None:
    model, _ = twin("llama", torch.float32)
    model.model.embed_tokens.weight.data[:, [5, 77]] *= 40

    @torch.no_grad()
    def worst() -> float:
        x = model(tokens(), output_hidden_states=True).hidden_states[0]
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())

    before = worst()
    rotate(model)
    assert before > 7 and worst() < 3.5


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    states = []
    for seed in (1, 1, 2):
        model, _ = twin("qwen3", torch.float32)
        rotate(model, seed=seed)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_plain_transformers_reads_it_back(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = twin(name, torch.float32)
    rotate(model)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not read.config.tie_word_embeddings and torch.equal(logits(read), logits(model))


@pytest.mark.parametrize(("model", "parts", "said"), [
    (lambda: twin("gemma2", torch.float32)[0], ("r1", "r2"),
     r"layers\.0\.post_attention_layernorm of Gemma2DecoderLayer scales.*\(a post-norm\).*write rotate: \[r2\]"),
    (lambda: twin("gemma3", torch.float32)[0], ("r1",), r"Gemma3DecoderLayer scales.*\(a post-norm\)"),
    (lambda: other("Starcoder2"), ("r1",), r"layers\.0\.input_layernorm of Starcoder2.* is not an RMS norm"),
    (lambda: other("OPT", ffn_dim=256, word_embed_proj_dim=128), ("r1",), "is not the token embedding times one"),
    (lambda: other("Mixtral", num_local_experts=4), ("r1",), "beside the linear layers behind input_layernorm"),
    (lambda: other("Phi3", num_key_value_heads=4), ("r2",), r"no v_proj beside an o_proj.*write rotate: \[r1\]")])
def test_what_stands_in_the_way_is_told_and_nothing_changes(model: Any, parts: tuple[str, ...], said: str) -> None:
    made = model()
    before = {key: value.clone() for key, value in made.state_dict().items()}
    with pytest.raises(ModelError, match=said):
        rotate(made, parts)
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_a_gate_on_the_values_and_a_second_reader_of_the_last_norm_are_found_out() -> None:
    model, _ = twin("llama", torch.float32)
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: (args[0] * torch.linspace(0.5, 2, args[0].shape[-1]),))
    with pytest.raises(ModelError, match=r"r2: model\.layers\.1 .* changes when its values are rotated"):
        find_rotation(model, ("r2",))
    model, _ = twin("llama", torch.float32)
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 1.0,))
    with pytest.raises(ModelError, match="no norm outside the blocks was found"):
        find_rotation(model, ("r1",))


def test_nan_is_named_before_it_spreads() -> None:
    model, _ = twin("llama", torch.float32)
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(StepError, match=r"model\.layers\.2\.mlp\.up_proj: the weight holds NaN"):
        rotate(model)
