"""Load a model and its tokenizer from the built-in one, a folder or the hub, as it will be run.

A folder is one of four kinds, told apart by what lies in it: dense weights, codes (compressed-tensors, GPTQ or AWQ,
which come back as `PackedLinear` or `FormattedLinear` and are never expanded), a PEFT adapter beside the model it
belongs to, or an adapter with the record of the 4-bit base it was trained on (`base.json`), which is made again from
the weights that it names and from no others. Weights are safetensors or the load is refused: a pickle runs code.
A config.json that keeps keys and values in 8 or 4 bits (`kv_cache.py`) is obeyed, whatever the weights are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmops.errors import ModelError
from llmops.methods.finetune.peft_library import hush_bitsandbytes, library
from llmops.models.builtin import config_of, local_folder
from llmops.models.kv_cache import restore
from llmops.models.layouts import COMPRESSED
from llmops.models.packed import PackedLinear

__all__ = ["DTYPES", "computed_in", "hub_config", "hush", "load", "load_tokenizer", "merged", "pick_device"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(source: str | Path, *, base_dir: Path | None = None, revision: str | None = None, dtype: str = "auto",
         device: str = "auto", kernel: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer), in evaluation mode, ready to generate.

    dtype: "float32", "bfloat16", "float16", "stored" (the checkpoint's), or "auto": the checkpoint's where the device
    multiplies matrices of that type itself, float32 on a CPU that would only imitate it, several times slower.
    device: "auto" (a GPU where there is one).
    kernel: for packed layers, "auto", "torch", "reference" or "triton".
    Raises ModelError when there is no such model, it is not a causal language model, or it holds no safetensors.
    """
    folder = local_folder(str(source), base_dir)
    where = pick_device(device)
    try:
        if folder is not None and (folder / "adapter_config.json").exists():
            model = _load_adapter(folder, dtype, where, kernel, trust_remote_code)
        elif folder is not None and _is_packed(folder):
            from llmops.models.quantized import load_quantized

            model = load_quantized(folder, dtype=computed_in(dtype, config_of(folder).get("dtype"), where),
                                   device=where, kernel=kernel)
        elif folder is not None and _is_bitsandbytes(folder):
            hush_bitsandbytes()
            from llmops.models.bnb import load_bitsandbytes

            wanted = computed_in(dtype, config_of(folder).get("dtype"), where)
            model = load_bitsandbytes(folder, dtype=DTYPES.get(wanted, wanted), device=where,
                                      kernel=kernel, trust_remote_code=trust_remote_code)
        else:
            model = _load_dense(folder or str(source), revision, dtype, where, trust_remote_code)
        tokenizer = load_tokenizer(folder or str(source), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(_cannot_load(str(source), folder, error)) from error
    if not hasattr(model, "peft_config"):  # an adapter's base has been through here
        restore(model)
    if model.generation_config is not None and tokenizer.pad_token_id is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _load_dense(source: str | Path, revision: str | None, dtype: str, device: torch.device,
                trust_remote_code: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=DTYPES.get(dtype, "auto"),
                                                 use_safetensors=True, trust_remote_code=trust_remote_code)
    wanted = computed_in(dtype, str(model.dtype), device)
    return model.to(device) if wanted == "auto" else model.to(device, DTYPES[wanted])


def computed_in(dtype: str, stored: str | None, device: torch.device) -> str:
    """What `dtype` means on a device for a checkpoint of type `stored`: "auto" (as stored) or a name in DTYPES."""
    if dtype == "stored":
        return "auto"
    if dtype != "auto" or device.type != "cpu":
        return dtype
    native = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    asked = native.get(str(stored).removeprefix("torch."))
    return "float32" if asked is not None and not getattr(torch.ops.mkldnn, asked)() else "auto"


def load_tokenizer(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id, always with a padding token (the end token where none was set)."""
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def hub_config(source: str, revision: str | None = None) -> Path | None:
    """The config.json of a hub id, fetched where it is not cached; None where it cannot be, which loading will tell."""
    from transformers.utils import cached_file

    try:
        found = cached_file(source, "config.json", revision=revision)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def hush() -> None:
    """No progress bars of transformers: a run has its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def merged(model: Any) -> Any:
    """The plain model, with an adapter folded in if it carries one.

    A base in 4 bits, or packed, is written out in the type it computes in: what the adapter was trained on, not rounded
    again.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    if getattr(model.get_base_model(), "is_loaded_in_4bit", False):
        from llmops.models.nf4 import dense

        return dense(model, model.dtype)
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        from llmops.models.packed_lora import dense as written_out

        return written_out(model)
    return model.merge_and_unload()


def pick_device(device: str = "auto") -> torch.device:
    """Raises ModelError when a GPU is asked for and there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f'device "{device}" was asked for, but torch sees no GPU; expected auto or cpu here')
    return torch.device(device)


def _is_packed(folder: Path) -> bool:
    """Whether the weights are codes in one of the layouts of `layouts.py`. ModelError when only the file beside the
    config says so, as the first GPTQ tools wrote it: transformers would fill the layers with noise."""
    quantization = config_of(folder).get("quantization_config") or {}
    if not quantization and (folder / "quantize_config.json").exists():
        raise ModelError(f"{folder}: has a quantize_config.json that its config.json does not know of; expected the "
                         'same under "quantization_config" in config.json, with "quant_method": "gptq": put it there')
    coded = quantization.get("quant_method") == "compressed-tensors" and quantization.get("format") in COMPRESSED
    return coded or quantization.get("quant_method") in ("gptq", "awq")


def _is_bitsandbytes(folder: Path) -> bool:
    return (config_of(folder).get("quantization_config") or {}).get("quant_method") == "bitsandbytes"


def _load_adapter(folder: Path, dtype: str, device: torch.device, kernel: str, trust_remote_code: bool) -> nn.Module:
    if not (folder / "adapter_model.safetensors").exists():
        raise ModelError(f"{folder}: holds no adapter_model.safetensors; expected a PEFT adapter saved as safetensors "
                         "(other formats can run code when they are loaded, and are refused)")
    source, revision = _adapter_base(folder)
    four_bit = (folder / "base.json").exists()
    model, _ = load(source, revision=revision, dtype="stored" if four_bit else dtype,
                    device="cpu" if four_bit else str(device), kernel=kernel, trust_remote_code=trust_remote_code)
    model = merged(model)
    if four_bit:
        hush_bitsandbytes()
        from llmops.models.nf4 import rebuild

        wanted = computed_in(dtype, str(model.dtype), device)
        model = rebuild(folder, model, compute=DTYPES.get(wanted, model.dtype), device=device)
    config = None
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        from llmops.models.packed_lora import CUSTOM

        config = library().PeftConfig.from_pretrained(folder)
        config._register_custom_module(CUSTOM)
    adapted: nn.Module = library().PeftModel.from_pretrained(model, folder, config=config)
    return adapted


def _adapter_base(folder: Path) -> tuple[str, str | None]:
    """(model, revision) that an adapter belongs to: the build beside it in the store, else what it names itself."""
    manifest = folder / "llmops.json"
    if manifest.exists():
        parent = json.loads(manifest.read_text(encoding="utf-8")).get("parent_key")
        if parent and (folder.parent / parent).is_dir():
            return str(folder.parent / parent), None
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not config.get("base_model_name_or_path"):
        raise ModelError(f"{folder}: its adapter_config.json names no base model; set base_model_name_or_path")
    return str(config["base_model_name_or_path"]), config.get("revision")


def _cannot_load(source: str, folder: Path | None, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if folder is None:
        return (f'model "{source}" cannot be loaded from the hub ({reason}); expected a hub id you can reach, a folder '
                "that exists, or builtin:tiny. Private models need HF_TOKEN in the environment")
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    cure = ("its weights are pickles, which can run code when loaded: convert them to safetensors"
            if pickled and not any(folder.glob("*.safetensors"))
            else "expected config.json, *.safetensors and a tokenizer of a transformers causal language model")
    return f"{folder}: cannot be loaded ({reason}); {cure}"
