"""What a build depends on, part by part, and the key that is the hash of all parts.

A variant's folder in the store is named by its key, so "has this been built?" is "is this folder there?". Each part is
a short text under a name that a reader knows (`option.rank`, `data`, `version.torch`); the parts are stored in the
build's `llmops.json`, and `why` compares them with those of today. Names that a recipe merely chooses (of variants, of
data, of the run) are in no part: renaming rebuilds nothing.

A parent enters by its key, so a change runs down the tree and no further. Scoring has a key of its own, so that a new
score does not rebuild what is scored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops.data.fingerprint import fingerprint
from llmops.measure.options import MeasureOptions
from llmops.methods.quantize.options import BITSANDBYTES
from llmops.recipe.changes import why
from llmops.recipe.hashing import FileHashes
from llmops.recipe.model import folder_of
from llmops.recipe.schema import ModelSource, Recipe, Variant

if TYPE_CHECKING:
    from llmops.methods.distill.options import Student

__all__ = ["BUILD_VERSION", "EVAL_VERSION", "HASH_MEMORY", "build_parts", "fingerprints", "hash_memory", "key_of",
           "model_parts", "names_of_data", "package_version", "score_key", "why"]

BUILD_VERSION = 2  # raise it when the same step would make different weights
EVAL_VERSION = 4  # raise it when the same variant would get different figures
HASH_MEMORY = "hashes.json"  # beside the store
_WEIGHTS = (".safetensors", ".bin", ".index.json")
_MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
#: Options that were added without a change of what their defaults build, so that older builds are found again.
ADDED: dict[str, Any] = {"student": None, "beta": 0.5, "skew": 0.1, "top_k": None, "attention_weight": 0.0,
                         "offline": None, "on_policy": None}
_PACKAGES = {"finetune:lora": ("peft",), "finetune:qlora": ("peft", "bitsandbytes"), "finetune:dpo": ("peft",),
             **{f"quantize:{method}": ("compressed-tensors",)
                for method in ("rtn", "gptq", "awq", "hqq", "autoround", "smoothquant")},
             "quantize:auto": ("compressed-tensors", "scipy")}


def key_of(parts: Mapping[str, str]) -> str:
    """SHA-256 (hex) over the parts, in the order of their names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def model_parts(recipe: Recipe, hashes: FileHashes) -> dict[str, str]:
    """The parts of `base`: weights and configuration, tokenizer, template, and what all variants share.

    A folder (and builtin:tiny) is hashed by its bytes; a hub model is its id and revision.
    """
    folder = folder_of(recipe.model, recipe.base_dir)
    parts = _shared(recipe)
    if folder is None:
        return parts | {"model": f"{recipe.model.id}@{recipe.model.revision or 'main'}"}
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    groups = {
        "model": [path for path in files if path.name in _MODEL_FILES or path.name.endswith(_WEIGHTS)],
        "tokenizer": [path for path in files if path.name in _TOKENIZER_FILES],
        "template": [path for path in files if path.suffix == ".jinja"] + sorted(folder.glob("*templates/*.jinja"))}
    if recipe.model.trust_remote_code:
        groups["code"] = [path for path in files if path.suffix == ".py"]
    return parts | {name: _digest((path.name, hashes.of(path)) for path in paths) for name, paths in groups.items()}


def build_parts(recipe: Recipe, variant: Variant, keys: Mapping[str, str], prints: Mapping[str, str]) -> dict[str, str]:
    """The parts of a variant. keys: of its parents, by name; prints: fingerprints of data, by name."""
    parts = _shared(recipe) | {"parent": keys[variant.parent], "step": f"{variant.kind}:{variant.method}"}
    packages = set(_PACKAGES.get(parts["step"], ()))
    if str(getattr(variant.options, "optimizer", "")).endswith("_8bit"):
        packages.add("bitsandbytes")
    if getattr(variant.options, "scheme", None) in BITSANDBYTES:
        packages = {"bitsandbytes"}
    for package in sorted(packages):
        parts[f"version.{package}"] = package_version(package)
    for name, value in variant.options.model_dump(mode="json").items():
        if name == "data":
            if value is not None:
                parts["data"] = prints[value] if isinstance(value, str) else json.dumps([prints[one] for one in value])
        elif name == "judge":
            if value is not None:
                parts["judge"] = prints[value]
        elif name == "teacher":
            parts["teacher"] = keys[value]
        elif name == "student" and value is not None:
            parts["option.student"] = json.dumps({**value, "bytes": _student_digest(recipe, variant.options.student)},
                                                 sort_keys=True)
        elif name == "offline" and value is not None:  # where signals lie changes none of them
            parts["option.offline"] = json.dumps({"k": value["k"]})
        elif name in ADDED and value == ADDED[name]:  # an option that came later, at the default that does nothing
            continue
        elif name == "stop" and value is not None and value["data"] is not None:
            parts["option.stop"] = json.dumps({**value, "data": prints[value["data"]]}, sort_keys=True)
        elif name != "method":
            parts[f"option.{name}"] = json.dumps(value, sort_keys=True)
    return parts


def _student_digest(recipe: Recipe, student: Student) -> str | None:
    """Of a pretrained student in a folder: a hub model is its id and revision."""
    if student.model is None:
        return None
    folder = folder_of(ModelSource(id=student.model), recipe.base_dir)
    if folder is None:
        return None
    files = [path for path in sorted(folder.iterdir()) if path.name in _MODEL_FILES or path.name.endswith(_WEIGHTS)]
    with FileHashes(None) as hashes:
        return _digest((path.name, hashes.of(path)) for path in files if path.is_file())


def score_key(recipe: Recipe, key: str, prints: Mapping[str, str]) -> str:
    """What a variant's scores depend on, beside the variant itself: scores, their data, workload, machine settings."""
    entries = []
    for entry in recipe.evaluate:
        options = entry.options.model_dump(mode="json")
        used = options.get("data")
        read = prints[used] if used else _folder_digest(recipe.base_dir, options.get("include"))
        entries.append([entry.metric, options, read])
    parts: dict[str, Any] = {
        "key": key, "evaluate": entries, "runtime": recipe.runtime.model_dump(mode="json", exclude={"checkpoint_s"}),
        "measure": _measured(recipe.measure) if recipe.measure else None,
        "seed": recipe.seed, "version": EVAL_VERSION,
        "harness": package_version("lm-eval") if any(entry.metric == "harness" for entry in recipe.evaluate) else None}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _measured(options: MeasureOptions) -> dict[str, Any]:
    """What a row's costs depend on; a provider that is not named is left out, as it was before there were any."""
    left_out = {"exclusive"} if options.provider is not None else {"exclusive", "provider"}
    return options.model_dump(mode="json", exclude=left_out)


def _folder_digest(base_dir: Path, folder: str | None) -> str | None:
    """Bytes of a folder of harness tasks: a task that changes is another score."""
    if folder is None:
        return None
    files = sorted(path for path in (base_dir / folder).rglob("*") if path.is_file())
    return _digest((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files)


def fingerprints(recipe: Recipe, names: Iterable[str]) -> dict[str, str]:
    """The fingerprint of each named data source. DataError when one cannot be read."""
    return {name: fingerprint(name, recipe.data, recipe.base_dir) for name in dict.fromkeys(names)}


@lru_cache
def package_version(name: str) -> str:
    """The installed version, found without importing the package; "absent" when there is none.

    Read from the name of the package's `.dist-info` folder; `importlib.metadata`, which is slow to import, is asked
    only when there is no such folder.
    """
    wanted = name.lower().replace("-", "_")
    if wanted in (found := _installed()):
        return found[wanted]
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


@lru_cache
def _installed() -> dict[str, str]:
    """Version of every package that has a `.dist-info` folder, by its name in small letters and underscores."""
    found: dict[str, str] = {}
    for place in sys.path:
        with contextlib.suppress(OSError):
            for entry in (entry for entry in os.listdir(place or ".") if entry.endswith(".dist-info")):
                package, _, version = entry.removesuffix(".dist-info").rpartition("-")
                found.setdefault(package.lower().replace("-", "_").replace(".", "_"), version)
    return found


def _shared(recipe: Recipe) -> dict[str, str]:
    return {"seed": str(recipe.seed), "dtype": recipe.runtime.dtype, "version.llmops-build": str(BUILD_VERSION),
            "version.torch": package_version("torch"), "version.transformers": package_version("transformers")}


def _digest(files: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(list(files)).encode()).hexdigest()


def names_of_data(recipe: Recipe) -> list[str]:
    """Every data source that a step or a score reads."""
    scored = [getattr(entry.options, "data", None) for entry in recipe.evaluate]
    built = [name for variant in recipe.variants.values() for name in variant.data_names()]
    return [name for name in dict.fromkeys([*scored, *built]) if name is not None]


def hash_memory(store: Path) -> Path:
    """Where hashes of large files are remembered, for the builds under `store`."""
    return store.parent / HASH_MEMORY

