"""Joined layers give the rows of the layers they are made of, and a served model writes what it wrote before."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.twins import tokens, twin
from torch import nn
from transformers import CompileConfig

from llmops.errors import LlmopsError
from llmops.measure.memory import kv_bytes_per_token
from llmops.methods.quantize import rtn
from llmops.methods.quantize.floats import FLOATS, AnyWeight
from llmops.models.fused import NORMS, fuse
from llmops.models.joined import Joined, Part, join, joined
from llmops.models.kernel_tiles import tiles_used
from llmops.models.kv_cache import attach, attached
from llmops.models.parity import count_parameters, sparsity
from llmops.models.quantized import kernels, pack
from llmops.models.serving import StepGraph, as_served, serve, serving
from llmops.models.sparse24 import Sparse24Linear
from llmops.models.static_kv import StaticKVCache, StaticQuantizedLayer, use

GENERATE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True,
            "return_dict_in_generate": True}
Round = Callable[[torch.Tensor], AnyWeight]
SCHEMES: dict[str, Round] = {
    "w4a16 in groups of 32, zero points": lambda W: rtn(W, bits=4, group_size=32, symmetric=False),
    "w3a16": lambda W: rtn(W, bits=3, group_size=64), "w8a16": lambda W: rtn(W, bits=8),
    "w8a8": lambda W: replace(rtn(W, bits=8), activation_bits=8),
    **{kind: (lambda W, kind=kind: rtn(W, bits=FLOATS[kind])) for kind in ("fp8-tensor", "fp8-channel", "fp8-block",
                                                                          "mxfp4")}}


def packed(name: str, scheme: str, kernel: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    model, _ = twin(name, dtype)
    weights = {layer: SCHEMES[scheme](module.weight.data) for layer, module in model.named_modules()
               if isinstance(module, nn.Linear) and layer != "lm_head"}
    return pack(model, weights, kernel)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens(2, 24)).logits.float()
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_format_runs_on_the_ops_of_the_kernels_as_on_the_current_path(scheme: str) -> None:
    current, ops = packed("qwen2", scheme, "reference"), packed("qwen2", scheme, "ops")
    if scheme != "mxfp4":  # has no kernel
        assert all(name.startswith("ops") for name in kernels(ops)) and sum(kernels(ops).values()) == 28
    wanted, found = logits(current), logits(ops)
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2  # bfloat16 rounds elsewhere
    wide = [packed("qwen2", scheme, kernel, torch.float32).model.layers[0].mlp.down_proj
            for kernel in ("reference", "ops")]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, other = (layer(x).float() for layer in wide)
    assert float((one - other).norm() / one.norm()) < 4e-3


@pytest.mark.parametrize("scheme", [*SCHEMES, "dense"])
@pytest.mark.parametrize("name", ["qwen2", "llama-untied-bias"])
def test_joined_layers_change_no_bit(scheme: str, name: str) -> None:
    model = twin(name, torch.float32)[0] if scheme == "dense" else packed(name, scheme, "reference", torch.float32)
    before = model.model.layers[0].self_attn.k_proj
    wanted = logits(model)
    assert join(model) == 8  # qkv and gate-up of four blocks
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, Part) and attention.k_proj.out_features == before.out_features
    found = logits(model)
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
    x = torch.randn(2, 3, 128)
    alone = attention.k_proj(x)  # asked alone, and out of order
    assert torch.allclose(alone, before(x), atol=1e-5) and torch.allclose(attention.k_proj(x), alone)
    attention.q_proj(x), attention.v_proj(x)
    assert attention.q_proj.whole.x is None  # nothing is kept alive between calls


def test_what_does_not_fit_together_is_not_joined() -> None:
    def linear(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
        return nn.Linear(columns, rows, dtype=dtype)

    assert joined([linear(4, 8), linear(4, 9)]) is None and joined([linear(4, 8), linear(4, 8, torch.float64)]) is None
    model = packed("qwen2", "w3a16", "reference")
    block = model.model.layers[0].mlp
    assert joined([block.gate_proj, linear(256, 128)]) is None
    other = packed("qwen2", "w8a16", "reference").model.layers[0].mlp
    assert joined([block.gate_proj, other.up_proj]) is None and joined([block.gate_proj, block.up_proj]) is not None


def test_a_joined_model_compiles_whole() -> None:
    whole = Joined(nn.Linear(8, 6), (4, 2))
    parts = [Part(whole, index, 8) for index in range(2)]

    def run(x: torch.Tensor) -> torch.Tensor:
        return parts[0](x).sum(-1) + parts[1](x).sum(-1)

    x = torch.randn(3, 8)
    made = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.allclose(made(x), whole.linear(x).sum(-1), atol=1e-6)
    assert whole.x is None


@pytest.mark.parametrize("kv", [None, "int8", "int4"])
@torch.inference_mode()
def test_a_served_model_writes_what_it_wrote_before(kv: str | None) -> None:
    """Through `generate`, which asks for a compiled forward at decode and gets the step with its buffers."""
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :5] = 0
    model = packed("llama", "w8a16", "reference", torch.float64)
    if kv is not None:
        attach(model, kv)
    wanted = model.generate(ids, attention_mask=mask, **GENERATE)
    step = serving(serve(model)).step
    assert not step.capture and serving(serve(model)).joined == 8
    compiled = CompileConfig()
    compiled._compile_all_devices = True
    for _ in range(2):
        found = model.generate(ids, attention_mask=mask, compile_config=compiled, **GENERATE)
        assert torch.equal(found.sequences, wanted.sequences)
        limit = 1e-5 if kv is None else 2e-2  # norms differ in float32's last bit, and codes fall apart at ties
        assert all(torch.allclose(a, b, atol=limit) for a, b in zip(found.logits, wanted.logits, strict=True))
        assert step.buffers and serving(model).kv == kv
    with torch.inference_mode(False), torch.no_grad():  # what is kept may be written to in another mode
        again = model.generate(ids, attention_mask=mask, compile_config=compiled, **GENERATE)
    assert torch.equal(again.sequences, wanted.sequences)


@torch.inference_mode()
def test_measuring_runs_a_served_model_on_its_own_cache() -> None:
    from llmops.measure.workload import Runner

    plain = Runner(packed("llama", "w8a16", "reference", torch.float64))
    served = Runner(serve(packed("llama", "w8a16", "reference", torch.float64)), 6)
    prompt = tokens(2, 9)
    written = []
    for runner in (plain, served):
        token, cache = runner.prefill(prompt)
        found = [token]
        for _ in range(5):
            token, cache = runner.step(token, cache)
            found.append(token)
        written.append(torch.cat(found, 1))
    assert torch.equal(*written)
    assert type(cache).__name__ == "StaticCache" and runner.request(prompt, 3).decode_s > 0
    assert serving(served.model).cache(2, 128) is cache and int(cache.get_seq_length()) == 0


def test_a_step_keeps_its_buffers_and_starts_anew_where_shapes_change() -> None:
    seen: list[int] = []

    def forward(x: torch.Tensor, scale: float) -> torch.Tensor:
        seen.append(x.data_ptr())
        return x * scale

    step = StepGraph(forward, capture=False)
    for value in (1.0, 2.0):
        assert torch.equal(step(x=torch.full((3,), value), scale=2.0), torch.full((3,), 2 * value))
    assert torch.equal(step(x=torch.ones(4), scale=2.0), torch.full((4,), 2.0))
    assert torch.equal(step(x=torch.ones(4), scale=3.0), torch.full((4,), 3.0))
    assert seen[0] == seen[1] != seen[2] != seen[3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv", [None, "int8"])
@torch.inference_mode()
def test_a_recorded_step_writes_the_same_on_the_gpu(kv: str | None) -> None:
    model = packed("llama", "w8a16", "auto").cuda()
    if kv is not None:
        attach(model, kv)
    ids = tokens(2, 20).cuda()
    wanted = model.generate(ids, **GENERATE).sequences
    serve(model)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **GENERATE).sequences, wanted)
    assert serving(model).step.recorded == 1


def test_a_row_tells_the_tiles_of_its_kernels() -> None:
    found = tiles_used(packed("qwen2", "w4a16 in groups of 32, zero points", "ops"))
    assert sum(entry["layers"] for entry in found.values()) == 28
    assert found["int_linear N=256,K=128,bits=4,group=32"]["from"] == "rule"
    assert {"BLOCK_M", "num_warps"} <= set(found["int_linear N=256,K=128,bits=4,group=32"]["tiles"])
    assert "int8_linear N=128,K=256" in tiles_used(packed("qwen2", "w8a8", "ops"))
    assert "fp8_linear N=128,K=256,scales=block" in tiles_used(packed("qwen2", "fp8-block", "ops"))
    assert tiles_used(packed("qwen2", "w8a8", "reference")) == {} == tiles_used(twin("llama")[0])


def test_the_api_serves_where_it_is_asked_to() -> None:
    import llmops

    plain, served = (llmops.load("builtin:tiny", fast=fast)[0] for fast in (None, True))
    assert serving(plain) is None and serving(served) is not None
    with torch.inference_mode():
        one, other = (model.generate(tokens(1, 8), max_new_tokens=4, do_sample=False) for model in (plain, served))
    assert torch.equal(one, other)
    with pytest.raises(LlmopsError, match="load it with llmops.load.*fast=False"):
        llmops.apply(served, None, {"quantize": {"method": "rtn", "scheme": "w8a16"}})


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@torch.inference_mode()
def test_fused_steps_are_the_steps_they_stand_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms exactly, in float32; attention with RoPE in the append, token by token, against the steps apart."""
    plain, fused = (use(twin(name, torch.float64)[0], "int8") for _ in range(2))
    turned: list[int] = []
    update = StaticQuantizedLayer.update_turned
    monkeypatch.setattr(StaticQuantizedLayer, "update_turned",
                        lambda self, *args: turned.append(1) or update(self, *args))
    norms = sum(type(module).__name__ in NORMS for module in fused.modules())
    assert fuse(fused) == norms + 4 == fuse(fused) + 4
    x = torch.randn(2, 5, 128)
    one, other = (model.float().model.norm(x) for model in (plain, fused))
    assert torch.allclose(one, other, atol=1e-6)
    ids = tokens(2, 20)
    written = [model.double().generate(ids, **GENERATE) for model in (plain, fused)]
    assert torch.equal(*(out.sequences for out in written)) and len(turned) == 4 * 6
    assert all(torch.allclose(a, b, atol=2e-2) for a, b in zip(*(out.logits for out in written), strict=True))


def test_a_class_that_is_not_known_is_left_as_it_is() -> None:
    model = twin("gemma2")[0]
    before = logits(model)
    assert fuse(model) == 0 and torch.equal(logits(model), before)


def test_a_decode_step_compiles_whole() -> None:
    """Codes in, RoPE and append fused, attention over codes: one graph without a break."""
    model = use(twin("llama", torch.float32)[0], "int4")
    join(model), fuse(model)
    found = []
    with torch.no_grad():
        for forward in (model, torch.compile(model.forward, fullgraph=True, backend="aot_eager")):
            cache = StaticKVCache(model.config, "int4", 128)
            token = model(input_ids=tokens(1, 9), past_key_values=cache).logits[:, -1:].argmax(-1)
            for _ in range(3):
                out = forward(input_ids=token, past_key_values=cache).logits
                found.append(out)
                token = out[:, -1:].argmax(-1)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))


@pytest.mark.parametrize("scheme", ["w8a8", "fp8-tensor", "fp8-channel", "fp8-block"])
@torch.no_grad()
def test_norms_and_the_middle_of_the_mlp_hand_codes_to_layers_that_take_them(
        scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The served model against the same layers apart; and what is rounded where no other kernel has done it."""
    plain, model = (packed("llama", scheme, "ops") for _ in range(2))
    counted: list[str] = []

    def count(module: str, name: str) -> None:
        home = importlib.import_module(f"llmops_kernels.{module}")
        op = getattr(home, name)
        monkeypatch.setattr(home, name, lambda *args, **more: counted.append(name) or op(*args, **more))

    for name in ("rms_norm_quantize", "add_rms_norm_quantize", "add_rms_norm"):
        count("rms_norm", name)
    for name in ("swiglu_quantize", "quantize_tokens"):
        count(name, name)
    exact = logits(packed("llama", scheme, "reference", torch.float32))
    wanted = logits(plain)
    assert counted == ["quantize_tokens"] * 28
    counted.clear()
    found = logits(serve(model))
    assert {name: counted.count(name) for name in counted} == {
        "rms_norm_quantize": 1, "quantize_tokens": 4, "add_rms_norm_quantize": 7, "add_rms_norm": 1,
        "swiglu_quantize": 4}
    apart, here = (float((y - exact).norm() / exact.norm()) for y in (wanted, found))
    # no farther from the same layers in float32 than what rounds at every step
    assert here < 1.15 * apart < (0.06 if scheme == "w8a8" else 0.2)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.whole.given is None and attention.q_proj.whole.x is None


@torch.no_grad()
def test_blocks_that_take_no_codes_add_and_norm_in_one() -> None:
    plain, model = (packed("qwen3", "w4a16 in groups of 32, zero points", "ops") for _ in range(2))
    wanted, found = logits(plain), logits(serve(model))
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2
    assert isinstance(model.model.layers[0].forward, partial)
    wide = packed("qwen3", "w8a8", "reference", torch.float32)  # float32: as before, to the last bits
    wanted = logits(wide)
    assert torch.allclose(logits(serve(wide)), wanted, atol=2e-3 * float(wanted.abs().max()))


@torch.no_grad()
def test_codes_are_what_a_norm_and_a_rounding_give() -> None:
    """Of one layer, against float64: closer than what rounds to 16 bits in between."""
    model = serve(packed("llama", "w8a8", "ops"))
    block = model.model.layers[0]
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    codes = block.input_layernorm(x)
    whole = block.self_attn.q_proj.whole
    scale, dtype = whole.given
    assert codes.dtype == torch.int8 and codes.shape == x.shape and dtype == torch.bfloat16
    exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + block.input_layernorm.variance_epsilon).rsqrt()
    exact = exact * block.input_layernorm.weight.double()
    assert bool(((codes.double() * scale.view(2, 3, 1) - exact).abs() <= 0.51 * scale.view(2, 3, 1)).all())
    y = torch.cat([getattr(block.self_attn, name)(codes).float() for name in ("q_proj", "k_proj", "v_proj")], -1)
    wanted = exact @ whole.linear.dequantized().double().t()
    assert float((y - wanted).norm() / wanted.norm()) < 1.5e-2 and whole.given is None


def test_two_of_four_weights_are_joined_and_packed() -> None:
    import llmops

    model, tokenizer = twin("llama-untied-bias")
    sparse = llmops.apply(model, tokenizer, {"prune": {"method": "magnitude", "pattern": "2:4"}})
    counts = sparsity(sparse), count_parameters(sparse)
    wanted = logits(sparse)
    served = as_served(sparse, "ops")
    layers = [module for module in served.modules() if isinstance(module, Sparse24Linear)]
    assert len(layers) == 4 * 4 and serving(served).joined == 8  # qkv, o, gate-up and down of four blocks
    assert (sparsity(served), count_parameters(served)) == counts
    found = logits(served)
    assert float((found - wanted).norm() / wanted.norm()) < 2e-2
    dense = as_served(twin("llama")[0])
    assert serving(dense) is None  # on a CPU, unless it is asked for


@pytest.mark.parametrize("kv", ["int8", "int4"])
@torch.no_grad()
def test_scoring_a_text_rounds_keys_of_a_served_model_too(kv: str) -> None:
    ids = tokens(2, 20)
    model = attach(twin("llama", torch.float64)[0], kv)
    wanted, plain = model(ids, use_cache=False).logits, twin("llama", torch.float64)[0](ids).logits
    bytes_ = kv_bytes_per_token(model).value
    serve(model)
    found = model(ids, use_cache=False).logits
    assert attached(model) == kv and kv_bytes_per_token(model).value == bytes_
    assert float((found - wanted).norm()) < 0.1 * float((found - plain).norm())


@pytest.mark.parametrize("kv", [None, "int8"])
def test_answers_of_a_served_model_are_written_on_its_static_cache(kv: str | None) -> None:
    from llmops.evaluate.exact_match import greedy

    model = packed("llama", "w8a16", "reference", torch.float64)
    if kv is not None:
        attach(model, kv)
    ids = tokens(3, 12, seed=3).tolist()
    prompts, more = [ids[0], ids[1][:5], ids[2][:9]], {"pad": 0, "max_new_tokens": 8}
    with torch.inference_mode():
        free = greedy(model, prompts, stops=set(), **more)
        stops = {free[0][3], free[2][1]}
        wanted = greedy(model, prompts, stops=stops, **more)
        step = serving(serve(model)).step
        assert greedy(model, prompts, stops=set(), **more) == free and step.buffers
        assert greedy(model, prompts, stops=stops, **more) == wanted and min(map(len, wanted)) < 8
