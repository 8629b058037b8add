"""The folder for Hugging Face's `kernels`: self-contained, loadable from anywhere, two versions in one process."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "llmops_kernels"

LOAD = """
import importlib, importlib.util, sys, torch
found = []
for name, folder in zip(("first_copy", "second_copy"), sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    op = module.int_linear  # a module, imported when it is first asked for
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    packed = op.pack(codes, torch.ones(16, 1), bits=4, group_size=-1)
    y = op.int_linear(torch.eye(64, dtype=torch.float16), packed)
    assert torch.equal(y.t(), codes.half())
    found.append(importlib.import_module(name + "._ops").ops.name)
assert "llmops_kernels" not in sys.modules
print(*found)
"""


def build(out: Path) -> list[Path]:
    spec = importlib.util.spec_from_file_location("hub_of_kernels", ROOT / "kernels" / "hub.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: list[Path] = module.build(out)
    return made


def test_the_build_is_whole_and_loads_twice_under_any_name(tmp_path: Path) -> None:
    folders = build(tmp_path)
    assert sorted(folder.name for folder in folders) == ["torch-cpu", "torch-cuda"]
    for folder in folders:
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["name"] == "llmops-kernels" and metadata["id"].isidentifier()
        assert metadata["backend"]["type"] == folder.name.removeprefix("torch-")
        for name, digest in metadata["digest"]["files"].items():
            assert base64.b64encode(hashlib.sha256((folder / name).read_bytes()).digest()).decode() == digest, name
        inside = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert inside == set(metadata["digest"]["files"]) | {"metadata.json"}
    first, second = load(*folders)
    assert first != second  # each registered its ops in a namespace of its own
    assert load(folders[0] / "llmops_kernels") == [first]  # the package inside gives the same


def load(*folders: Path) -> list[str]:
    """The namespaces that the folders registered, loaded in one process that knows nothing else of ours."""
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, folders)], capture_output=True, text=True,
                          cwd=folders[0], env={"PATH": "/usr/bin", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_are_relative_or_of_torch_and_triton(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            roots = {str(node.module).split(".")[0]}
        elif isinstance(node, ast.Import):
            roots = {name.name.split(".")[0] for name in node.names}
        else:
            continue
        assert roots <= set(sys.stdlib_module_names) | {"torch", "triton"}, (path, roots)
