"""A frozen base in 4 bits (QLoRA: Dettmers et al. 2023, arXiv 2305.14314), and the record of which base it was.

NF4 keeps each weight as one of 16 values, the quantiles of a normal distribution, times the largest magnitude of its
block of 64; with double quantization those magnitudes are kept in 8 bits, in blocks of 256 (section 3). bitsandbytes
does the arithmetic; what is ours:

- One layer at a time goes to float32, is rounded and takes the dense layer's place: the whole base never lies in
  memory in float32. The codes are computed on the CPU whatever the device, so that every machine gets the same.
- An adapter is worth what its base is worth. `record` writes `base.json` beside an adapter: how the base was rounded,
  where it came from, and the SHA-256 of its weights; `rebuild` makes the base again, or refuses another one.
- `dense` writes the trained model out in 16 bits, adapters folded into the very values they were trained on.

Where the base was not q(W) but q(W - s B A) (PiSSA, LoftQ: `methods/finetune/starts.py`), that A and B are stored too,
`base_shift.safetensors`. Left out: a CPU's bf16 kernels (AVX512-BF16), which round activations that training did not.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from bitsandbytes import functional as bits
from bitsandbytes import nn as bnb
from torch import Tensor, nn

from llmops.errors import ModelError
from llmops.methods.finetune.lora import NAME, adapted_weight, adapters, lora_delta
from llmops.methods.finetune.starts import difference_pair
from llmops.models.nf4_joined import product
from llmops.ops.int8_matmul import OPS, TRITON, triton_here

__all__ = ["RECORD", "SHIFT", "Base", "Linear4bit", "dense", "dequantized", "fill", "fingerprint", "four_bit_layers",
           "quantize_base", "rebuild", "record", "round_trip"]

RECORD, SHIFT = "base.json", "base_shift.safetensors"
BLOCK = 64
Shift = Mapping[str, tuple[Tensor, Tensor]]  # layer name -> (A, B) with Q = q(W - scaling B A)


class Linear4bit(bnb.Linear4bit):  # type: ignore[misc]  # PEFT knows it by this name
    """bitsandbytes' layer, which also lists what it holds in memory and keeps to one way of computing."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quant: str, double_quant: bool,
                 compute: torch.dtype) -> None:
        super().__init__(1, 1, bias=False, compute_dtype=compute, compress_statistics=double_quant, quant_type=quant)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.to(compute), requires_grad=False)
        held = bnb.Params4bit(weight, requires_grad=False, compress_statistics=double_quant, quant_type=quant,
                              blocksize=BLOCK, module=self)
        self.weight = held.to("cpu")
        self.weight.quant_state.dtype = compute
        self.support_avx512bf16_for_cpu = False

    bits = 4
    asked = "auto"  # which kernel: auto, torch (bitsandbytes' own), triton or ops, as `ops/int_matmul.py` names them

    def forward(self, x: Tensor) -> Tensor:
        """The kernel of `llmops_kernels` where there is a GPU and nothing to differentiate; else bitsandbytes' own, but
        where a CPU would misread it (see `_multiplied_out`)."""
        if self.kernel_name and not (torch.is_grad_enabled() and x.requires_grad):
            return product(x, self.weight.data, self.weight.quant_state, self.bias, self.compute_dtype)
        if x.device.type != "cpu" or self.in_features % BLOCK == 0:
            y: Tensor = super().forward(x)
            return y
        weight = dequantized(self).to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return nn.functional.linear(x.to(self.compute_dtype), weight, bias).to(x.dtype)

    @property
    def kernel_name(self) -> str:
        """"triton" or "ops" where the op of `llmops_kernels` runs it, "" where bitsandbytes does."""
        if self.out_features * self.in_features % BLOCK:
            return ""  # the last block is not full
        on_gpu = self.weight.device.type == "cuda"
        if self.asked == "ops" and not on_gpu:
            return OPS
        return TRITON if on_gpu and self.asked in ("auto", "triton", "ops") and triton_here() else ""

    @property
    def kernel(self) -> str:
        """What runs it, for people."""
        if self.kernel_name:
            return f"{self.kernel_name} ({self.weight.quant_state.quant_type} codes as bitsandbytes stores them)"
        return f"bitsandbytes:{self.weight.quant_state.quant_type} (multiplied out for every product)"

    def packed_tensors(self) -> dict[str, Tensor]:
        """What lies in memory for the weight: codes and the scales of the blocks."""
        state = self.weight.quant_state
        held = {"codes": self.weight.data, "absmax": state.absmax}
        return held | ({"absmax_scale": state.state2.absmax} if state.nested else {})


@dataclass(frozen=True)
class Base:
    """The base of an adapter: how it was rounded, and which it was.

    source: hub id or folder as the recipe names it; parent_key: of the build in the store that it was, or None for
    the model itself. scaling: of the shift, where there is one. layers: how many linear layers are in 4 bits.
    """

    quant: str
    double_quant: bool
    blocksize: int
    layers: int
    sha256: str
    source: str = ""
    revision: str | None = None
    parent_key: str | None = None
    scaling: float | None = None


def round_trip(weight: Tensor, quant: str, double_quant: bool) -> Tensor:
    """The values that 4 bits keep of a weight, in float32. weight: (out, in), on the CPU."""
    codes, state = bits.quantize_4bit(weight.float().contiguous(), blocksize=BLOCK, quant_type=quant,
                                      compress_statistics=double_quant)
    return _multiplied_out(codes, state).reshape(weight.shape)


def dequantized(layer: nn.Module) -> Tensor:
    """(out, in): the weight a 4-bit layer multiplies by, in the type it computes in."""
    weight = _multiplied_out(layer.weight.data, layer.weight.quant_state)
    return weight.reshape(layer.out_features, layer.in_features)


def _multiplied_out(codes: Tensor, state: Any) -> Tensor:
    """(1, n): the values of all codes, as one row. bitsandbytes 0.50 on a CPU with AVX512 takes the scales of wrong
    blocks where a row is no multiple of a block, and a single row cannot be misread."""
    flat = copy.copy(state)
    flat.shape = torch.Size((1, math.prod(state.shape)))
    kept: Tensor = bits.dequantize_4bit(codes, flat)
    return kept


def quantize_base(model: Any, *, quant: str, double_quant: bool, compute: torch.dtype, device: torch.device,
                  rest: Callable[[str, Tensor], Tensor] | None = None) -> Base:
    """Put 4-bit layers in the place of all linear layers but the output head, in place, and freeze everything.

    The model should lie on the CPU in the type it is stored in; it ends on `device`, what is not in 4 bits in
    `compute`. rest: (layer name, its weight in float32) -> what is rounded instead of the weight. Returns its record.
    """
    digest = fingerprint(model)
    head = model.get_output_embeddings()
    chosen = [(name, module) for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and module is not head]
    for name, module in chosen:
        weight = module.weight.detach().cpu().float()
        weight = rest(name, weight) if rest is not None else weight
        made = Linear4bit(weight, None if module.bias is None else module.bias.detach(), quant, double_quant, compute)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made.to(device))
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no linear layer but its head; expected a decoder to round")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device, compute)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer if buffer is None else buffer.to(device)
    model.is_loaded_in_4bit = True  # what PEFT asks
    return Base(quant, double_quant, BLOCK, len(chosen), digest)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters, in the order of their names."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(memoryview(raw.numpy()))
    return found.hexdigest()


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """{name in the plain model: layer} of the 4-bit layers, with or without adapters around them."""
    return {name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
            for name, module in model.named_modules() if isinstance(module, bnb.Linear4bit)}


# ------------------------------------------------------------------------------------------------ to 16 bits and back


def fill(model: nn.Module, adapted: nn.Module, *, keep_base: bool, starts: Shift = MappingProxyType({})) -> nn.Module:
    """Write what `adapted` (adapters on a 4-bit base) computes with into the dense `model` of the same shape, in place.

    keep_base: fold what was trained into the weights that are there, instead of into what 4 bits kept of them. For
    adapters that did not start at zero (starts: where, by layer name) that is B A - B0 A0: the model began at W, not at
    W + s B0 A0. One layer at a time in float32; the values are stored in the type of `model`.
    """
    layers, held = dict(model.named_modules()), adapters(adapted)
    with torch.no_grad():
        for name, four_bit in four_bit_layers(adapted).items():
            weight = layers[name].weight
            W = weight.float() if keep_base else dequantized(four_bit).to(weight.device).float()
            start = starts.get(name) if keep_base else None
            weight.copy_(_folded(W, held[name], start) if name in held else W)
    return model


def dense(adapted: Any, dtype: torch.dtype) -> nn.Module:
    """The plain model in `dtype`, adapters folded into the dequantized base; `adapted` is taken apart for it."""
    held = adapters(adapted)
    folded: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, layer in four_bit_layers(adapted).items():
            W = dequantized(layer).float()
            folded[name] = (_folded(W, held[name]) if name in held else W).to(dtype)
    plain: nn.Module = adapted.unload() if hasattr(adapted, "unload") else adapted
    for name, weight in folded.items():
        parent, _, last = name.rpartition(".")
        four_bit = plain.get_submodule(name)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=four_bit.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight)
        if four_bit.bias is not None:
            layer.bias = nn.Parameter(four_bit.bias.detach().to(dtype))
        setattr(plain.get_submodule(parent), last, layer)
    plain.is_loaded_in_4bit = False  # type: ignore[assignment]
    for parameter in plain.parameters():  # buffers (rotary frequencies) keep their type
        parameter.data = parameter.data.to(dtype)
    return plain


def _folded(W: Tensor, layer: Any, start: tuple[Tensor, Tensor] | None = None) -> Tensor:
    pair = layer.lora_A[NAME].weight.to(W), layer.lora_B[NAME].weight.to(W)
    if start is not None:
        pair = difference_pair(pair, (start[0].to(W), start[1].to(W)))
    magnitude = layer.lora_magnitude_vector[NAME].weight.to(W) if NAME in layer.lora_magnitude_vector else None
    return adapted_weight(W, *pair, layer.scaling[NAME], magnitude)


# ------------------------------------------------------------------------------------------------ which base it was


def record(folder: Path, base: Base, shift: Shift) -> None:
    """Write `base.json` (and the shift, where there is one) beside an adapter."""
    from safetensors.torch import save_file

    (folder / RECORD).write_text(json.dumps({"format": 1, **asdict(base)}, indent=1) + "\n", encoding="utf-8")
    if shift:
        save_file({f"{name}.{part}": tensor.contiguous() for name, pair in shift.items()
                   for part, tensor in zip("AB", pair, strict=True)}, folder / SHIFT)


def shifted(shift: Shift, scaling: float) -> Callable[[str, Tensor], Tensor]:
    """What is rounded instead of W: W - scaling B A, for the layers that have a shift."""
    def rest(name: str, weight: Tensor) -> Tensor:
        return weight - lora_delta(*shift[name], scaling) if name in shift else weight

    return rest


def rebuild(folder: Path, model: Any, *, compute: torch.dtype, device: torch.device) -> Any:
    """Make the 4-bit base that the adapter in `folder` records, from the dense `model`, in place.

    Raises ModelError when the model is not the recorded one, or the record cannot be read.
    """
    from safetensors.torch import load_file

    path = folder / RECORD
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        wanted = Base(**{key: value for key, value in body.items() if key != "format"})
        if body["format"] != 1 or wanted.blocksize != BLOCK:
            raise ValueError(f"format {body['format']}, blocks of {wanted.blocksize}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); expected format 1 with the record of the 4-bit base that "
                         "this adapter was trained on: copy the whole folder again") from error
    shift: dict[str, tuple[Tensor, Tensor]] = {}
    if wanted.scaling is not None:
        stored = load_file(folder / SHIFT)
        shift = {name[:-2]: (stored[name], stored[f"{name[:-2]}.B"]) for name in stored if name.endswith(".A")}
    found = quantize_base(model, quant=wanted.quant, double_quant=wanted.double_quant, compute=compute, device=device,
                          rest=shifted(shift, wanted.scaling) if wanted.scaling is not None else None)
    if (found.sha256, found.layers) != (wanted.sha256, wanted.layers):
        came = f"{wanted.source}{'@' + wanted.revision if wanted.revision else ''}"
        raise ModelError(f"{folder}: given a base with weights {found.sha256[:16]} ({found.layers} linear layers); "
                         f"expected {wanted.sha256[:16]} ({wanted.layers}), the {wanted.quant} base of {came} that the "
                         "adapter was trained on: name that base in adapter_config.json (base_model_name_or_path, "
                         "revision), or take a variant whose adapters are merged")
    return model
