"""The parity check: is what lies on disk what was built, and is it what the recipe asked for?

The commonest failure of this field is a model that was good in the trainer and bad after export: another template, a
stop token lost, an adapter merged onto the wrong base, a "quantized" folder that is not. So every variant is read back
from disk and held against a snapshot of the model in memory:

- the next-token distributions on a probe, KL(memory || disk), mean and max over tokens; where keys and values are
  rounded, with them as they are shipped, and once more with them as they are computed: a rounding turns another op's
  last bit into a step now and then, and may change as much as the rounding itself does, but no weight may;
- the bytes of the chat template with their SHA-256, and the stop tokens;
- the data type, the bits, the sparsity and the number of layers that the step asked for, counted in the weights
  themselves; for an adapter, its rank, and the data type of the 4-bit base it was trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmops.models.kv_cache import attached, unrounded
from llmops.models.sparse24 import Sparse24Linear
from llmops.models.zeros import lost_zeros, off_pattern
from llmops.quantity import Quantity

__all__ = ["KL_MEAN_LIMIT", "Expected", "Snapshot", "check", "count_parameters", "divergence", "log_probabilities",
           "snapshot", "sparsity"]

KL_MEAN_LIMIT = 0.01  # nats a token: rounding to 16 bit and another op's summation order stay well below it


@dataclass(frozen=True)
class Expected:
    """What the step promised: bits of each packed layer by its full name (or of all of them), fraction of zeros in the
    pruned layers, decoder layers.

    dtype: of the weights on disk. adapter_rank: of a PEFT folder. base: (data type, double quantization) of the 4-bit
    base under an adapter. kv_cache: type of keys and values. zeros: of a pruned parent, by layer (`zeros.zero_bits`),
    all of which have to be there; pattern: N:M of every linear layer but `ignore`.
    """

    bits: int | Mapping[str, int] | None = None
    number_format: str | None = None
    sparsity: float | None = None
    layers: int | None = None
    dtype: torch.dtype | None = None
    adapter_rank: int | None = None
    base: tuple[str, bool] | None = None
    kv_cache: str | None = None
    zeros: Mapping[str, Tensor] | None = None
    pattern: str | None = None
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """The model in memory: log-probabilities (tokens, vocabulary) on the probe, template, stop tokens.

    unrounded: log_p with keys and values as they are computed, None where that is what log_p is.
    """

    probe: Tensor
    log_p: Tensor
    template: str
    stops: tuple[int, ...]
    unrounded: Tensor | None = None


def snapshot(model: Any, tokenizer: Any, probe: Tensor) -> Snapshot:
    """probe: (rows, length) token ids."""
    return Snapshot(probe, log_probabilities(model, probe), _template(tokenizer), _stops(model, tokenizer),
                    _unrounded(model, probe))


def check(before: Snapshot, model: Any, tokenizer: Any, folder: Path, expected: Expected) -> dict[str, Any]:
    """The `parity` group of a row: {"ok", "kl_mean", "kl_max", "checks": [{"name", "ok", "detail"}]}."""
    log_q = log_probabilities(model, before.probe)
    mean, worst = divergence(before.log_p, log_q)
    template, wanted = _template(tokenizer), _hash(before.template)
    plain = before.unrounded
    limit = KL_MEAN_LIMIT if plain is None else KL_MEAN_LIMIT + divergence(plain, before.log_p)[0]
    checks = [_entry("logits", bool(torch.isfinite(log_q).all()) and mean <= limit,
                     f"mean KL {mean:.2e} nats a token, at most {limit:.3g}"),
              *_same_weights(before, model),
              _entry("template", template == before.template,
                     f"chat template sha256 {wanted} in memory, {_hash(template)} on disk"),
              _entry("stop tokens", _stops(model, tokenizer) == before.stops,
                     f"{before.stops} in memory, {_stops(model, tokenizer)} on disk")]
    checks += _promised(model, folder, expected)
    count = len(log_q)
    how = f"KL(memory || disk) on {count} probe tokens"
    return {"ok": all(entry["ok"] for entry in checks), "checks": checks,
            "kl_mean": Quantity.measured(mean, "nats", how, n=count).as_dict(),
            "kl_max": Quantity.measured(worst, "nats", how, n=count).as_dict()}


def log_probabilities(model: Any, rows: Iterable[Tensor]) -> Tensor:
    """(tokens, vocabulary) on the CPU: next-token log-probabilities after each token of `rows`, each (length,)."""
    device = next(iter(model.parameters())).device
    with torch.inference_mode():
        found = [model(input_ids=row[None].to(device)).logits[0].float().log_softmax(-1).cpu() for row in rows]
    return torch.cat(found)


def _unrounded(model: Any, rows: Iterable[Tensor]) -> Tensor | None:
    if attached(model) is None:
        return None
    with unrounded(model):
        return log_probabilities(model, rows)


def _same_weights(before: Snapshot, model: Any) -> list[dict[str, Any]]:
    """Nothing to add where keys and values are not rounded: the check of the logits is this one."""
    if before.unrounded is None:
        return []
    with unrounded(model):
        mean, _ = divergence(before.unrounded, log_probabilities(model, before.probe))
    return [_entry("weights", mean <= KL_MEAN_LIMIT,
                   f"mean KL {mean:.2e} nats a token with keys and values as computed, at most {KL_MEAN_LIMIT}")]


def divergence(log_p: Tensor, log_q: Tensor) -> tuple[float, float]:
    """(mean, max) over tokens of KL(p || q) in nats. log_p, log_q: (tokens, vocabulary)."""
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
    return float(kl.mean()), float(kl.max())


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, a packed weight counted as the dense one it stands for."""
    packed = [module for module in model.modules() if hasattr(module, "packed_tensors")
              and not getattr(module, "tied", False)]
    held = {id(module._parameters["weight"]) for module in packed if "weight" in module._parameters}
    dense: int = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in held)
    return dense + sum(int(module.in_features) * int(module.out_features) for module in packed)


def sparsity(model: nn.Module) -> tuple[int, int]:
    """(zeros, weights) of the linear layers that are not the output head and hold no codes, fused experts included."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head
               and not hasattr(module, "packed_tensors")]
    weights += [parameter for module in model.modules() if hasattr(module, "down_proj")
                for parameter in module._parameters.values() if parameter is not None and parameter.dim() == 3]
    pairs = [(int(module.in_features * module.out_features), module.values) for module in model.modules()
             if isinstance(module, Sparse24Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    zeros += sum(size - int(values.count_nonzero()) for size, values in pairs)
    return zeros, sum(weight.numel() for weight in weights) + sum(size for size, _ in pairs)


def _promised(model: Any, folder: Path, expected: Expected) -> list[dict[str, Any]]:
    checks = []
    if expected.bits is not None:
        checks.append(_bits(model, expected.bits))
    if expected.number_format is not None:
        checks.append(_number_format(model, folder, expected.number_format))
    if expected.kv_cache is not None:
        kept = attached(model) or "16 bit"
        checks.append(_entry("kv cache", kept == expected.kv_cache, f"{expected.kv_cache} asked for, {kept} loaded"))
    if expected.sparsity is not None:
        zeros, total = sparsity(model)
        found = zeros / max(1, total)
        checks.append(_entry("sparsity", found >= expected.sparsity - 0.005,
                             f"{expected.sparsity:.3f} asked for, {found:.3f} of the linear weights are zero on disk"))
    if expected.zeros:
        lost, held, first = lost_zeros(model, expected.zeros)
        checks.append(_entry("zeros", not lost, f"{held:,} weights of the parent are zero, {held - lost:,} of them on "
                                                f"disk" + (f"; {first} first lost some" if lost else "")))
    if expected.pattern is not None:
        wrong = off_pattern(model, expected.pattern, expected.ignore)
        checks.append(_entry("pattern", not wrong, f"{expected.pattern} asked for, "
                             + (f"{wrong} has it not" if wrong else "in every layer on disk")))
    if expected.layers is not None:
        found_layers = _config(folder).get("num_hidden_layers")
        checks.append(_entry("layers", found_layers == expected.layers,
                             f"{expected.layers} asked for, {found_layers} on disk"))
    if expected.dtype is not None:
        types = _stored_types(folder)
        checks.append(_entry("dtype", types == {_SAFETENSORS[expected.dtype]},
                             f"{_SAFETENSORS[expected.dtype]} asked for, {', '.join(sorted(types))} on disk"))
    if expected.adapter_rank is not None:
        body = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        checks.append(_entry("adapter", body["r"] == expected.adapter_rank,
                             f"rank {expected.adapter_rank} asked for, {body['r']} on disk"))
    if expected.base is not None:
        states = [module.weight.quant_state for module in model.modules()
                  if hasattr(getattr(module, "weight", None), "quant_state")]
        found_bases = {(str(state.quant_type), bool(state.nested)) for state in states}
        checks.append(_entry("base", found_bases == {expected.base},
                             f"{_said(expected.base)} asked for, "
                             f"{'; '.join(sorted(map(_said, found_bases))) or 'no 4-bit layer'} loaded"))
    return checks


def _bits(model: Any, asked: int | Mapping[str, int]) -> dict[str, Any]:
    """Layer by layer, of what was read back; the reader has made sure that the packed width of each fits its bits."""
    found = {name: int(module.bits) for name, module in model.named_modules() if hasattr(module, "packed_tensors")
             and hasattr(module, "bits")}
    wanted = dict.fromkeys(found, asked) if isinstance(asked, int) else dict(asked)
    wrong = [f"{name}: {wanted.get(name, 'none')} asked for, {found.get(name, 'none')} on disk"
             for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if not wrong and found:
        return _entry("bits", True, f"{_counted(wanted)} asked for and on disk")
    return _entry("bits", False, "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
                  or f"{_counted(wanted) or asked} asked for, no packed layer on disk")


def _number_format(model: Any, folder: Path, asked: str) -> dict[str, Any]:
    """The kind of every packed layer, and the type in which the file holds its numbers."""
    kinds = {name: str(module.kind) for name, module in model.named_modules() if hasattr(module, "kind")}
    part, wanted = _NUMBERS[asked.split("-")[0]]
    stored = _types_by_name(folder)
    wrong = [f"{name}: {kind} in {stored.get(f'{name}.{part}', 'nothing')}" for name, kind in sorted(kinds.items())
             if kind != asked or stored.get(f"{name}.{part}") != wanted]
    said = "; ".join(wrong[:3]) or f"{len(kinds)} layers of {asked} in {wanted} on disk"
    return _entry("number format", bool(kinds) and not wrong, f"{asked} asked for, {said}")


def _counted(bits: Mapping[str, int]) -> str:
    counts = {each: sum(value == each for value in bits.values()) for each in sorted(set(bits.values()))}
    return ", ".join(f"{each} bits in {count}" for each, count in counts.items())


def _said(base: tuple[str, bool]) -> str:
    return f"{base[0]}{', double quantization' if base[1] else ''}"


#: Which part of a layer holds its numbers, and in what type, as safetensors names it.
_NUMBERS = {"w8a8": ("weight", "I8"), "fp8": ("weight", "F8_E4M3"), "mxfp4": ("weight_packed", "U8"),
            "nvfp4": ("weight_packed", "U8")}
_SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _stored_types(folder: Path) -> set[str]:
    """Data types of the floating tensors in a folder, as the headers of its safetensors name them."""
    return {kind for kind in _types_by_name(folder).values() if "F" in kind}


def _types_by_name(folder: Path) -> dict[str, str]:
    types: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        types |= {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return types


def _entry(name: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": detail}


def _template(tokenizer: Any) -> str:
    return json.dumps(tokenizer.chat_template, sort_keys=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stops(model: Any, tokenizer: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return tuple(sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None}))


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
