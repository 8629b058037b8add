"""The recipes that come with llmops: `recipes/` of the repository, packaged beside the code."""

from __future__ import annotations

from pathlib import Path

from llmops.errors import LlmopsError, unknown

__all__ = ["SCHEMA", "copy", "packaged"]

SCHEMA = "recipe.schema.json"


def packaged() -> dict[str, tuple[str, Path]]:
    """{name: (title, path)}; the title is the recipe's first comment that is not for an editor."""
    here = Path(__file__).parent
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent.parent / "recipes"
    return {path.stem: (_title(path), path) for path in sorted(folder.glob("*.yaml"))}


def copy(name: str, to: Path | None = None, *, force: bool = False) -> Path:
    """Write a copy; returns its path. Raises LlmopsError for an unknown name, or a file that is there already."""
    found = packaged()
    if name not in found:
        raise LlmopsError(unknown("recipe", name, found))
    place = to or Path(f"{name}.yaml")
    if place.is_dir():
        place = place / f"{name}.yaml"
    if place.exists() and not force:
        raise LlmopsError(f"{place}: is there already; name another file, or write over it with --force")
    place.write_text(found[name][1].read_text(encoding="utf-8"), encoding="utf-8")
    schema = found[name][1].with_name(SCHEMA)
    if not (place.parent / SCHEMA).exists():  # the editor line of the recipe looks for it here
        (place.parent / SCHEMA).write_text(schema.read_text(encoding="utf-8"), encoding="utf-8")
    return place


def _title(path: Path) -> str:
    text = path.read_text(encoding="utf-8").splitlines()
    lines = (line.lstrip("# ").strip() for line in text if line.startswith("#"))
    return next((line for line in lines if line and "yaml-language-server" not in line), "")
