"""bitsandbytes' two ways to store a linear layer, as steps of their own: NF4 (4 bits) and LLM.int8.

    nf4        one of 16 values, the quantiles of a normal distribution, times the largest magnitude of its block of 64,
               kept in float32, or with `double_quant` in 8 bits (Dettmers et al. 2023, arXiv 2305.14314, section 3).
               Multiplied out for every product. The layer is `nf4.Linear4bit`, as under an adapter.
    llm_int8   one of 255 steps of the row's largest magnitude; activations are rounded to 8 bits token by token, but
               for the features in which one of them exceeds `threshold`, which stay in 16 (Dettmers et al. 2022,
               arXiv 2208.07339, section 3).

Written as transformers writes such a model (`quant_method: bitsandbytes`), so that `from_pretrained` reads the folder
unchanged; its codes are the ones that transformers makes of the same weights. Experts of a mixture are refused: they
are no linear layers there, and would stay in 16 bit in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import nn as bnb
from torch import Tensor, nn

from llmops.models.nf4 import BLOCK, Linear4bit

__all__ = ["Linear8bit", "config_block", "load_bitsandbytes", "quantized_layer", "save_bitsandbytes"]


class Linear8bit(bnb.Linear8bitLt):  # type: ignore[misc]
    """bitsandbytes' layer, which also lists what it holds in memory."""

    bits = 8

    @property
    def kernel(self) -> str:
        """What runs it, for people."""
        return "bitsandbytes:int8 (activations in 8 bits)"

    def packed_tensors(self) -> dict[str, Tensor]:
        """What lies in memory for the weight: codes and a scale a row."""
        scales = self.state.SCB if self.state.SCB is not None else self.weight.SCB
        codes = self.weight.data if self.state.CB is None else self.state.CB
        return {"codes": codes, "scales": scales}


def quantized_layer(layer: nn.Linear, scheme: str, *, double_quant: bool = False, threshold: float = 6.0) -> nn.Module:
    """What takes the place of `layer`, on its device. scheme: "nf4" or "llm_int8"."""
    weight, device = layer.weight.detach().cpu(), layer.weight.device
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    if scheme == "nf4":
        return Linear4bit(weight, bias, "nf4", double_quant, layer.weight.dtype).to(device)
    made = Linear8bit(layer.in_features, layer.out_features, bias=bias is not None, has_fp16_weights=False,
                      threshold=threshold, device="meta")
    made.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made.to(device).eval()


def config_block(scheme: str, *, dtype: torch.dtype, dense: list[str], double_quant: bool = False,
                 threshold: float = 6.0) -> dict[str, Any]:
    """The `quantization_config` block of config.json. dtype: in which 4-bit layers compute; dense: full names of the
    linear layers left as they are."""
    from transformers import BitsAndBytesConfig

    four = scheme == "nf4"
    config = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, llm_int8_threshold=threshold,
                                llm_int8_skip_modules=dense, bnb_4bit_compute_dtype=dtype if four else None,
                                bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=four and double_quant)
    return {name: getattr(value, "value", value) for name, value in config.to_dict().items()}


def save_bitsandbytes(model: Any, folder: Path, block: Mapping[str, Any], tokenizer: Any = None) -> None:
    """Write config.json, model.safetensors (sharded above 5 GB), generation config and, when given, the tokenizer."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures, config.quantization_config = [type(model).__name__], dict(block)
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    save_torch_state_dict(_state(model), folder, max_shard_size="5GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor by the name that transformers gives it; a tied one once."""
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    layers = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        layer = layers.get(name.rpartition(".")[0])
        if isinstance(layer, Linear4bit | Linear8bit) and not name.endswith(".bias"):
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        state[name] = tensor.detach().cpu().contiguous()
    for name, layer in layers.items():
        if isinstance(layer, Linear4bit):
            state[f"{name}.weight"] = layer.weight.data.cpu()
            state |= {f"{name}.weight.{part}": tensor.cpu().clone()
                      for part, tensor in layer.weight.quant_state.as_dict(packed=True).items()}
        elif isinstance(layer, Linear8bit):
            held = layer.packed_tensors()
            state |= {f"{name}.weight": held["codes"].cpu(), f"{name}.SCB": held["scales"].cpu(),
                      f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return state


def load_bitsandbytes(folder: Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu",
                      kernel: str = "auto", trust_remote_code: bool = False) -> Any:
    """The model of a folder, by transformers, its layers ones that say what they hold.

    dtype: of all that is not in few bits, and what 4-bit layers compute in; "auto" as stored. kernel: of 4-bit layers,
    as in `ops/int_matmul.py`; "torch" and "reference" are bitsandbytes' own.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": str(device)},
                                                 use_safetensors=True, trust_remote_code=trust_remote_code)
    for module in model.modules():
        if type(module) is bnb.Linear4bit and module.weight.quant_state.blocksize == BLOCK:
            module.__class__ = Linear4bit
            module.asked = kernel
            module.compute_dtype = module.weight.quant_state.dtype = model.dtype
            module.compute_type_is_set = True
            module.support_avx512bf16_for_cpu = False
        elif type(module) is bnb.Linear8bitLt:
            module.__class__ = Linear8bit
    return model.eval()
