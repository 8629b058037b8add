"""Where a model comes from: the built-in one, a folder, or the hub. Imports nothing heavy, so that a plan can ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmops.errors import ModelError, unknown

__all__ = ["BUILTIN", "config_of", "locate", "local_folder"]

BUILTIN = {"builtin:tiny": Path(__file__).parent / "tiny"}


def local_folder(source: str, base_dir: Path | None = None) -> Path | None:
    """The folder that `source` names, or None when it is a hub id. Raises ModelError for an unknown builtin."""
    if source.startswith("builtin:"):
        if source not in BUILTIN:
            raise ModelError(unknown("built-in model", source, BUILTIN))
        return BUILTIN[source]
    folder = (base_dir or Path.cwd()) / source
    if folder.is_dir():
        return folder.resolve()
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f'no model folder at "{source}" (looked at {folder}); expected a folder with config.json, '
                         "a hub id such as Qwen/Qwen3-0.6B, or builtin:tiny")
    return None


def locate(source: str, base_dir: Path | None = None) -> str:
    """What transformers should be given for `source`: the folder's path, or the hub id."""
    folder = local_folder(source, base_dir)
    return str(folder) if folder is not None else source


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError when there is none, or it is no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as a model's configuration ({error}); expected the config.json of a "
                         "transformers model") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds a {type(config).__name__}, expected a JSON object")
    return config
