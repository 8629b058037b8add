"""What can be wrong with a distillation although every field has the right type."""

from __future__ import annotations

import json
from pathlib import Path

from llmops.errors import nearest
from llmops.methods.distill.options import Logits
from llmops.models.builtin import BUILTIN
from llmops.recipe.data_checks import near_files
from llmops.recipe.model import DIVIDED, LLAMA_LIKE, Dims, folder_of, looks_like_hub_id
from llmops.recipe.schema import BASE, ModelSource, Variant
from llmops.recipe.source import Problems, Trail, shown
from llmops.recipe.students import changed

__all__ = ["check_distill"]

#: Keys of config.json that are sizes, beside those that begin with num_; and keys that make it another architecture.
_SIZES = ("hidden_size", "intermediate_size", "head_dim", "max_position_embeddings", "n_embd", "n_layer", "n_head")
_NO_SIZES = ("model_type", "architectures", "auto_map")


def check_distill(problems: Problems, variant: Variant, dims: Dims | None, base_dir: Path) -> None:
    """A student that can be made, outcomes that the vocabulary has, signals that are there."""
    options: Logits = variant.options
    trail: Trail = ("variants", variant.name, variant.kind)
    if options.student is not None:
        if variant.parent != BASE:
            problems.add(("variants", variant.name, "from"),
                         f"given {shown(variant.parent)} with a `student`, which begins with weights of its own and "
                         "takes none of those; expected no `from`, or no `student`: the parent is then the student")
        if options.student.config is not None:
            _check_config(problems, (*trail, "student", "config"), options, dims)
        else:
            _check_model(problems, (*trail, "student", "model"), options.student.model or "", base_dir)
    place: Trail = (*trail, "offline", "k") if options.offline is not None else (*trail, "top_k")
    if dims is not None and (options.outcomes or 0) > dims.vocab:
        problems.add(place, f"given {options.outcomes} of a vocabulary of {dims.vocab:,}; expected at most that many, "
                            "32 is usual")
    if options.offline is not None and options.offline.cache is not None:
        folder = base_dir / Path(options.offline.cache).expanduser()
        if not (folder / "manifest.json").is_file():
            problems.add((*trail, "offline", "cache"),
                         f"given {shown(options.offline.cache)}, which holds no finished signals ({folder})"
                         f"{near_files(folder)}; expected a folder as runs/signals/KEY of a run that made them, or no "
                         "`cache`: they are then made")
        else:
            _check_cache(problems, trail, options, folder)


def _check_cache(problems: Problems, trail: Trail, options: Logits, folder: Path) -> None:
    """What of the parts of signals is in the recipe; teacher, data and template are compared when they are read."""
    try:
        parts = dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("parts") or {})
    except (OSError, ValueError, AttributeError, TypeError):
        problems.add((*trail, "offline", "cache"), f"given {shown(str(folder))}, whose manifest.json cannot be read; "
                     "expected finished signals, or no `cache`: they are then made")
        return
    assert options.offline is not None
    places: dict[str, tuple[Trail, str]] = {
        "k": ((*trail, "offline", "k"), str(options.offline.k)),
        "temperature": ((*trail, "temperature"), f"{options.temperature:g}"),
        "max_length": ((*trail, "max_length"), str(options.max_length))}
    for part, (place, value) in places.items():
        if part in parts and parts[part] != value:
            problems.add(place, f"given {part} {value} with signals made at {parts[part]} ({folder}); expected the "
                                "same, or no `cache`: they are then made")


def _check_config(problems: Problems, trail: Trail, options: Logits, dims: Dims | None) -> None:
    assert options.student is not None and options.student.config is not None
    config = options.student.config
    for key, value in config.items():
        if dims is not None and dims.keys and key not in dims.keys and (near := nearest(key, dims.keys)):
            problems.add((*trail, key), f"unknown key {shown(key)} of config.json; expected one that the teacher's has"
                                        f"{near}", key=True)
        if key == "vocab_size" and dims is not None and value != dims.vocab:
            problems.add((*trail, key), f"given {shown(value)}; expected {dims.vocab}, the teacher's: its distribution "
                                        "is over its own tokens")
        if key in _NO_SIZES:
            problems.add((*trail, key), f"given {shown(value)}; expected the teacher's own architecture: change sizes, "
                                        "as num_hidden_layers or hidden_size, or name a `model`", key=True)
        if (key.startswith("num_") or key in _SIZES) and (isinstance(value, bool) or not isinstance(value, int)
                                                          or value < 1):
            problems.add((*trail, key), f"given {shown(value)}; expected a whole number, at least 1")
            return
    if dims is not None:
        made = changed(dims, options.student)
        if made.heads % made.kv_heads:
            problems.add(trail, f"given {made.heads} attention heads for {made.kv_heads} key-value heads; expected a "
                                "multiple: change num_attention_heads or num_key_value_heads", key=True)
        elif made.family in DIVIDED and made.hidden % made.heads:
            problems.add(trail, f"given hidden_size {made.hidden} with {made.heads} attention heads; expected a "
                                f"multiple of {made.heads}: transformers opens no {made.family} otherwise", key=True)
        elif made.family in LLAMA_LIKE and made.head_dim % 2:
            problems.add(trail, f"given heads of {made.head_dim}; expected an even head_dim: rotary positions turn "
                                "pairs of it", key=True)


def _check_model(problems: Problems, trail: Trail, name: str, base_dir: Path) -> None:
    """A name that leads somewhere, or may do so on the hub."""
    folder = folder_of(ModelSource(id=name), base_dir)
    if folder is not None and name not in BUILTIN and not (folder / "config.json").is_file():
        problems.add(trail, f"given {shown(name)}, a folder without config.json ({folder}); expected a folder that "
                            "transformers can load")
    elif folder is None and name.startswith("builtin:"):
        problems.add(trail, f"unknown model {shown(name)}; expected one of {', '.join(BUILTIN)}"
                            f"{nearest(name, BUILTIN)}")
    elif folder is None and (name.startswith((".", "/", "~")) or not looks_like_hub_id(name)):
        path = base_dir / Path(name).expanduser()
        problems.add(trail, f"given {shown(name)}, which is not there ({path}){near_files(path)}; expected a model "
                            "folder, a hub id (owner/name), or builtin:tiny")
