"""Write a variant's folder: an ordinary transformers folder that stands on its own, whole or not there at all.

`staged` gives a folder beside the place where the variant will lie and renames it into place at the end, so that a
kill at any moment leaves either nothing or everything. Whoever finds the place taken (another run of the same recipe
built the same thing) keeps what is there: the key says that it is the same.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llmops.errors import StoreError

__all__ = ["save_adapter", "save_dense", "staged", "write_manifest"]


@contextmanager
def staged(place: Path) -> Iterator[Path]:
    """A new folder that becomes `place` when the block ends well, and vanishes when it does not."""
    scratch = place.parent / f".{place.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    try:
        _sweep(place)
        scratch.mkdir(parents=True)
    except OSError as error:
        raise StoreError(f"{place.parent}: cannot be written to ({error}); name another place with --runs") from error
    try:
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                _sync(path)
        try:
            scratch.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{place}: could not be written ({error}); free some disk and run the same command again, "
                         "what was finished before is kept") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_dense(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Weights as safetensors in `dtype`, configuration, tokenizer and chat template."""
    model = model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def save_adapter(adapted: Any, tokenizer: Any, folder: Path, base: str, revision: str | None = None) -> None:
    """A PEFT adapter in `folder`; `base` (with `revision`, of a hub id) is the model it belongs to."""
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.revision = base, revision
    adapted.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)  # "auto" asks the hub
    (folder / "README.md").unlink(missing_ok=True)  # ours is written from the row
    tokenizer.save_pretrained(folder)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """`llmops.json`: how this folder came to be."""
    (folder / "llmops.json").write_text(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n",
                                        encoding="utf-8")


def _sweep(place: Path) -> None:
    """Remove what a killed process left of the same build."""
    for left in place.parent.glob(f".{place.name}.*.*"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").exists():
            shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
