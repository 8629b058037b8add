"""A step in a few words, as it stands in every table, tree and card: `rtn w4a16 g128`, `lora r16 2 ep`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmops.report.reading import Row, group, parent_of

__all__ = ["ZEROS_NOTE", "healed", "marked", "what", "zeros_note"]

#: What † stands for, wherever a row with zeros of its own or of an ancestor is shown beside others.
ZEROS_NOTE = ("† zeros in dense tensors: no time saved (N:M only where a kernel for it runs), bytes only when "
              "compressed on disk")


def what(row: Row) -> str:
    """The step in a few words: `rtn w4a16 g128`, `lora r16 2 ep`, `wanda 50%`, `full 1 ep qat`."""
    method = group(row, "transform").get("method")
    options = group(row, "transform", "options")
    if not method:
        return "as it came" if parent_of(row) is None else "no step"
    words = WORDS.get(str(method), _any_words)(options)
    words = [*words, f"kv {options['kv_cache']}"] if options.get("kv_cache") else words
    simulated = ["simulated"] if group(row, "transform").get("simulated") else []
    return " ".join([str(method), *words, *(["qat"] if healed(row) else []), *simulated])


def marked(row: Row) -> str:
    """`what`, with a † where the row has zeros that save nothing by themselves: `wanda 50% †`."""
    return what(row) + (" †" if group(row, "transform").get("sparsity_saves") else "")


def zeros_note(rows: Iterable[Row]) -> list[str]:
    """`ZEROS_NOTE`, where one of the rows is marked by it."""
    return [ZEROS_NOTE] if any(group(row, "transform").get("sparsity_saves") for row in rows) else []


def healed(row: Row) -> bool:
    """Whether the step trained a quantized parent through its rounding: what it made lies in integers again."""
    transform = group(row, "transform")
    return (transform.get("kind") in ("finetune", "distill")
            and str(transform.get("storage_dtype") or "").startswith("int"))


def _training(options: Mapping[str, Any]) -> list[str]:
    if options.get("max_steps"):
        return [f"{options['max_steps']} steps"]
    return [f"{options['epochs']:g} ep"] if isinstance(options.get("epochs"), int | float) else []


def _adapters(options: Mapping[str, Any]) -> list[str]:
    """Rank, then what is not as plain LoRA has it: `r8 dora nf4 apart`."""
    words = [f"r{options['rank']}"] if "rank" in options else []
    words += [name for name in ("rslora", "dora") if options.get(name)]
    words += [options["init"]] if options.get("init") not in (None, "default") else []
    words += [f"lora+{options['lora_plus_ratio']:g}"] if options.get("lora_plus_ratio") else []
    words += [str(options["quant"])] if options.get("quant") else []
    merge = options.get("merge")
    return words + (["apart"] if merge is False else [merge] if isinstance(merge, str) else [])


def _zeros(options: Mapping[str, Any]) -> list[str]:
    pattern, sparsity = options.get("pattern"), options.get("sparsity")
    if pattern not in (None, "unstructured"):
        return [str(pattern)]
    words = [f"{100 * sparsity:.4g}%"] if isinstance(sparsity, int | float) else []
    plain = (None, "layer", "uniform")
    return words + [str(options[key]) for key in ("scope", "ratios") if options.get(key) not in plain]


def _size(options: Mapping[str, Any]) -> list[str]:
    """What a structural step leaves, or what share it is to reach, and how its layers were chosen: `3 layers by
    perplexity`, `hidden 192`, `0.7x parameters`."""
    kept = options.get("layers")
    words = [f"{len(kept) if isinstance(kept, list) else kept} layers"] if kept is not None else []
    widths = ("hidden", "intermediate", "heads", "kv_heads")
    words += [f"{name} {options[name]}" for name in widths if options.get(name)]
    words += [f"{options[name]:g}x {name}" for name in ("parameters", "latency", "joules") if options.get(name)]
    words += [f"by {str(options['choose']).replace('_', ' ')}"] if options.get("choose") not in (None, "even") else []
    return words + (["contiguous"] if options.get("contiguous") else [])


def _taught(options: Mapping[str, Any]) -> list[str]:
    """Of a distillation, its teacher and what is not as by default: `of tuned reverse_kl on-policy 60 steps`."""
    words = [f"of {options['teacher']}"] if options.get("teacher") else []
    words += [options["loss"]] if options.get("loss") not in (None, "forward_kl") else []
    student = options.get("student") or {}
    words += [str(student.get("model") or "fresh")] if student else []
    words += [name.replace("_", "-") for name in ("offline", "on_policy") if options.get(name) is not None]
    return [*words, *_training(options)]


FORMATS = ("w8a8", "fp8", "mxfp4", "nvfp4")  # which fix their groups themselves


def _scheme(options: Mapping[str, Any]) -> list[str]:
    scheme, size = options.get("scheme"), options.get("group_size")
    if scheme in FORMATS:
        return [f"{scheme} {options.get('scales') or 'channel'}" if scheme == "fp8" else str(scheme)]
    size = (None if scheme == "w8a16" else 128) if size is None else size  # the default of all but hqq
    words = [str(scheme)] if scheme else []
    words += [f"g{size}"] if size is not None and size != -1 else []
    return words + (["asym"] if options.get("symmetric") is False else [])


def _any_words(options: Mapping[str, Any]) -> list[str]:
    plain = [(key, value) for key, value in options.items() if key != "method" and isinstance(value, str | int | float)]
    return [f"{key}={value}" for key, value in plain[:3]]


WORDS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "lora": lambda o: [*_adapters(o), *_training(o)], "qlora": lambda o: [*_adapters(o), *_training(o)],
    "full": _training,
    "dpo": lambda o: [*([f"r{o['rank']}"] if o.get("rank") else ["full"]),
                      *([f"beta {o['beta']:g}"] if isinstance(o.get("beta"), int | float) else []), *_training(o)],
    "magnitude": _zeros, "wanda": _zeros, "sparsegpt": _zeros, "depth": _size, "width": _size, "rtn": _scheme,
    "gptq": _scheme, "awq": _scheme, "autoround": _scheme,
    "auto": lambda o: [f"{o['bits']:g} bits" if o.get("bits") else f"{o.get('bytes') or 0:,} bytes",
                       *([str(o["solver"])] if o.get("solver") else [])],
    "hqq": lambda o: _scheme({**o, "group_size": o.get("group_size") or 64}),
    "kv_cache": lambda o: [str(o.get("dtype"))],
    "logits": _taught,
}
