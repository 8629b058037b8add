"""How a build's weights lie on disk, and what its zeros are worth, read from its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["storage", "zeros_save"]


def _bitsandbytes(block: Mapping[str, Any]) -> str | None:
    """For people, what a `quantization_config` of bitsandbytes says."""
    if block.get("quant_method") != "bitsandbytes":
        return None
    if block.get("load_in_8bit"):
        return f"int8 row, LLM.int8 with threshold {block.get('llm_int8_threshold', 6.0):g}"
    double = ", double quantization" if block.get("bnb_4bit_use_double_quant") else ""
    return f"{block.get('bnb_4bit_quant_type', 'fp4')} g64{double}"


def storage(manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """How the weights lie on disk, and what their zeros are worth."""
    found: dict[str, Any] = {"sparsity_saves": zeros_save(manifest, folder)}
    config = folder / "config.json"
    if config.exists():
        from llmops.models.embeddings import without_group
        from llmops.models.schemes import stored_as

        body = json.loads(config.read_text(encoding="utf-8"))
        block, embedding = without_group(body.get("quantization_config") or {})
        found["storage_dtype"] = stored_as(block) or _bitsandbytes(block) or body.get("dtype")
        if embedding:
            found["storage_dtype"] += ", embeddings int8" + (" with the head" if len(embedding) > 1 else "")
    record = folder / "base.json"
    if record.exists():
        base = json.loads(record.read_text(encoding="utf-8"))
        found["storage_dtype"] = f"adapter on {base['quant']} g{base['blocksize']}"
    if (folder / "adapter_config.json").exists() and not record.exists():
        below = str(storage({}, folder.parent / str(manifest.get("parent_key"))).get("storage_dtype"))
        if below.startswith("int"):
            found["storage_dtype"] = f"adapter on {below}"
    return found


def zeros_save(manifest: Mapping[str, Any], folder: Path) -> str | None:
    """What the single zeros of a variant are worth, those of its ancestors among them; None where there are none."""
    from llmops.methods.prune.options import MASKING

    while manifest:
        if manifest.get("kind") == "prune" and manifest.get("method") in MASKING:
            pattern = manifest.get("options", {}).get("pattern", "unstructured")
            return ("bytes only when compressed on disk, no time" if pattern == "unstructured" else
                    f"bytes only when compressed on disk, time only where a kernel for {pattern} runs it")
        record = folder.parent / str(manifest.get("parent_key")) / "llmops.json"
        manifest = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    return None
