"""The same model with its channels in another order: what makes the chance of one rounding a thing with an interval.

A quantizer that errs by 0.05 nats a token may land a few per cent above or below another in perplexity by where its
errors happen to point, and windows of text do not hold that: they all see the same errors. A draw is the same function
in other numbers. Its residual stream, the neurons of each MLP and the values within each head are permuted at random,
so that other weights share a group, are rounded and (in GPTQ) solved together; calibration crops are cut by its own
seed. Draw 0 is the model as it is. All contenders of a draw get the same model and crops, those that use no data too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _quantize_case import Case

__all__ = ["code", "drawn", "permuted"]

#: What our answers hang on, in src/llmops: files and folders.
SOURCES = ("methods/quantize", "build/quantizing.py", "build/preparing.py", "build/layer_schemes.py",
           "build/solving.py", "calibrate.py", "gathering.py", "block_stream.py", "models/fold.py", "models/rotate.py",
           "ops/float32.py")


def code(sources: Sequence[str] = SOURCES) -> str:
    """A name of our quantizers as they stand, which changes whenever a letter of them does. sources: of others."""
    root, found = Path(__file__).parents[1] / "src" / "llmops", hashlib.sha256()
    for name in sources:
        for path in sorted((root / name).rglob("*.py")) or [root / name]:
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def drawn(case: Case, draw: int) -> dict[str, Any]:
    """What differs from `case` in a draw: the model's folder, the file of calibration tokens, the seed. Made beside
    those of draw 0 where they are not there yet; nothing differs in draw 0."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from _quantize_models import calibration

    if draw == 0:
        return {}
    model, kept = (Path(f"{name}-draw-{draw}") for name in (case.model, case.calibration.removesuffix(".safetensors")))
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    if not (model / "config.json").exists():
        tokenizer.save_pretrained(model)
        permuted(AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32), draw).save_pretrained(model)
    kept = kept.with_suffix(".safetensors")
    save_file({"tokens": calibration(Path(case.rows), tokenizer, case.samples, case.length, draw)}, kept)
    return {"model": str(model), "calibration": str(kept), "seed": draw}


@torch.no_grad()  # type: ignore[untyped-decorator]
def permuted(model: Any, draw: int) -> Any:
    """A Llama (`model.layers`, RMSNorm, SwiGLU, GQA) with its channels permuted, in place; as it is where draw is 0.

    What it computes is the same but for the order of sums. No channel of a head that rotary embeddings turn is moved.
    """
    if draw == 0:
        return model
    random = torch.Generator().manual_seed(draw)
    stream = torch.randperm(model.config.hidden_size, generator=random)
    body, size = model.model, model.config.head_dim
    tied = model.lm_head.weight is body.embed_tokens.weight
    _put(body.embed_tokens, body.embed_tokens.weight[:, stream])
    if not tied:
        _put(model.lm_head, model.lm_head.weight[:, stream])
    body.norm.weight.copy_(body.norm.weight[stream])
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[stream])
        kept = len(attention.v_proj.weight) // size  # heads of values; each serves some heads of queries
        values = torch.stack([torch.randperm(size, generator=random) for _ in range(kept)])
        inside = values.repeat_interleave(attention.o_proj.weight.shape[1] // size // kept, 0)
        neurons = torch.randperm(len(mlp.up_proj.weight), generator=random)
        for linear in (attention.q_proj, attention.k_proj):
            _put(linear, linear.weight[:, stream])
        _put(attention.v_proj, attention.v_proj.weight[_flat(values, size)][:, stream])
        _put(attention.o_proj, attention.o_proj.weight[stream][:, _flat(inside, size)])
        for linear in (mlp.gate_proj, mlp.up_proj):
            _put(linear, linear.weight[neurons][:, stream])
        _put(mlp.down_proj, mlp.down_proj.weight[stream][:, neurons])
    return model


def _flat(within: Tensor, size: int) -> Tensor:
    """(heads, size) orders within heads as one order of heads * size channels."""
    return (within + size * torch.arange(len(within)).unsqueeze(1)).flatten()


def _put(layer: Any, weight: Tensor) -> None:
    layer.weight.copy_(weight.clone())
