"""Every layer imports only downward; nothing heavy is imported where a plan has to start at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "llmops"
KERNELS = Path(__file__).parent.parent / "kernels" / "llmops_kernels"
FLOORS = {
    **dict.fromkeys(("errors", "options", "quantity", "curves", "chain"), 0), **dict.fromkeys(("ops", "shelf"), 1),
    **dict.fromkeys(("methods", "block_stream"), 2), **dict.fromkeys(("models", "data"), 3),
    **dict.fromkeys(("ledger", "locks", "train", "gathering", "swaps", "evaluate", "measure", "formats",
                     "importance"), 4),
    **dict.fromkeys(("recipe", "report", "calibrate"), 5),
    **dict.fromkeys((
        "store", "processes", "progress", "trackers", "screen", "recipes_folder", "build", "score", "runner", "api",
        "data_view", "preflight", "compare", "pairing", "gate", "champions", "savings", "explain", "arguments",
        "trust_commands", "pretrain", "stored", "charges", "green", "grids", "spending", "publish",
        "doctor", "bench_models", "bench_commands", "ui", "export", "parser", "planner", "startup",
        "__init__"), 6),
    "bench": 6, "cli": 7, "__main__": 8}
HOMES = {"transformers": {"models", "data", "train", "pretrain"}, "datasets": {"data"}}  # the loop is transformers' own


def imports(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append((node.module, node.lineno))
            if node.module == "llmops":
                found += [(f"llmops.{alias.name}", node.lineno) for alias in node.names]
    return found


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def test_every_file_stands_on_a_floor():
    assert {room(path) for path in SRC.rglob("*.py") if "tiny" not in path.parts} <= set(FLOORS)


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_downward(path):
    here = room(path)
    for module, line in imports(path):
        if not module.startswith("llmops."):
            continue
        there = module.split(".")[1]
        if there not in FLOORS:  # `from llmops import __version__`
            continue
        assert there == here or FLOORS[there] < FLOORS[here] or FLOORS[here] == FLOORS[there] == 6, (
            f"{path.relative_to(SRC)}:{line}: {here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})")


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_transformers_and_datasets_have_few_homes(path):
    for module, line in imports(path):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or room(path) in homes, f"{path.relative_to(SRC)}:{line} imports {module}"


def test_kernels_import_nothing_of_ours():
    for path in KERNELS.rglob("*.py"):
        assert not [module for module, _ in imports(path) if module.split(".")[0] == "llmops"], path


@pytest.mark.parametrize("statement", [
    "import llmops", "import llmops.cli", "from llmops.recipe import load_recipe", "from llmops.runner import plan",
    "from llmops.report import html, card, table", "import llmops.methods.quantize, llmops.methods.prune"])
def test_torch_is_not_imported_by(statement):
    script = f"import sys\n{statement}\nassert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_these():
    import llmops

    assert llmops.__all__ == ["DataError", "Ledger", "LlmopsError", "ModelError", "RecipeError", "StepError",
                              "StoreError", "__version__", "apply", "load", "plan", "run"]
    assert all(getattr(llmops, name) is not None for name in llmops.__all__)
