"""The end-to-end part of benchmarks/gpu.py: decode of a Llama of the shape of Llama-3-8B with random weights, batch 1.

Random weights cost what trained ones cost: nothing here depends on their values. Every kind is made on the device layer
by layer (packed words are drawn as they are stored, so no dense model is ever there), served (`models/serving.py`), and
then writes tokens one after the other with the recorded step. `lm_head` is in the same bits as the layers.

Joules come from the GPU's own energy counter (NVML), over the same tokens that are timed; without pynvml, null.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmops.models.kernel_tiles import tiles_used
from llmops.models.kv_cache import attach
from llmops.models.packed import PackedLinear
from llmops.models.serving import serve, serving
from llmops.ops.bitstream import words

KINDS = ("bf16", "w8", "w4", "w4+kv8")
LEAST_S = 30.0  # left of the budget, to begin a kind
WINDOW_S = 5.0  # of decode; the counter is updated every 0.1 s
PROMPT, ROOM = 512, 2048
EIGHT_B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256}


def measure(kind: str, device: str, dry: bool) -> dict[str, Any]:
    """Tokens a second, joules a token and bytes of weights of one kind. dry: a tiny model, two tokens."""
    model = build(kind, device, dry)
    served = serving(model)
    assert served is not None, "the model could not be served"
    prompt, room = (8, 128) if dry else (PROMPT, ROOM)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
    cache = served.cache(1, room)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    for _ in range(1 if dry else 4):  # records the graph
        token = _step(served, token, cache)
    energy = _counter(device)
    _sync(device)
    before, began, count = energy(), time.perf_counter(), 0
    while count < (1 if dry else room - prompt - 8) and (count == 0 or time.perf_counter() - began < WINDOW_S):
        token = _step(served, token, cache)
        count += 1
        if count % 16 == 0:
            _sync(device)
    _sync(device)
    wall, after = time.perf_counter() - began, energy()
    assert bool(out.logits.isfinite().all()), "the logits are not finite"
    return {"kind": kind, "tokens_per_s": count / wall, "tokens": count, "wall_s": wall, "context": prompt,
            "joules_per_token": None if before is None or after is None else (after - before) / count,
            "weights_bytes": sum(_bytes(module) for module in model.modules()), "joined": served.joined,
            "recorded": served.step.recorded, "tiles": tiles_used(model)}


def _step(served: Any, token: Tensor, cache: Any) -> Tensor:
    out = served.step(input_ids=token, past_key_values=cache, use_cache=True)
    found: Tensor = out.logits[:, -1:].argmax(-1)
    return found


def build(kind: str, device: str, dry: bool) -> Any:
    """The model of a kind, served."""
    config = LlamaConfig(**(TINY if dry else EIGHT_B), tie_word_embeddings=False, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    bits = {"b": 0, "w": int(kind[1])}[kind[0]] if kind != "bf16" else 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _linear(module, bits, device, "ops" if dry else "auto"))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.device.type == "meta":
                filled = torch.ones if parameter.dim() == 1 else torch.randn
                module._parameters[name] = nn.Parameter(filled(parameter.shape, device=device, dtype=torch.bfloat16),
                                                        requires_grad=False)
    model.eval()
    if kind.endswith("+kv8"):
        attach(model, "int8")
    serve(model)
    return model


def _linear(like: nn.Linear, bits: int, device: str, kernel: str) -> nn.Module:
    rows, columns = like.out_features, like.in_features
    if not bits:
        made = nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
        made.weight.data.normal_(std=columns ** -0.5)
        return made.requires_grad_(False)
    group = -1 if bits == 8 else 32 if columns < 128 else 128
    packed = torch.randint(-(1 << 31), 1 << 31, (rows, words(columns, bits)), device=device, dtype=torch.int64)
    groups = 1 if group == -1 else columns // group
    spread = columns ** -0.5 / (1 << (bits - 1)) * math.sqrt(3)  # uniform codes: weights of the usual size
    scale = torch.full((rows, groups), spread, device=device, dtype=torch.bfloat16)
    return PackedLinear({"weight_packed": packed.to(torch.int32), "weight_scale": scale,
                         "weight_shape": torch.tensor([rows, columns])}, bits=bits, group_size=group, kernel=kernel)


def _bytes(module: nn.Module) -> int:
    own = module.packed_tensors().values() if hasattr(module, "packed_tensors") else module._parameters.values()
    return sum(part.numel() * part.element_size() for part in own if part is not None)


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _counter(device: str) -> Any:
    """() -> joules since some time, or None where there is no counter."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # no driver, no module, no counter: the figure is null
        return lambda: None
