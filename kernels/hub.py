"""Build the folder that Hugging Face's `kernels` package loads from a hub repository: `python kernels/hub.py [OUT]`.

kernel-builder makes the same from `build.toml` with Nix; pure Python needs no more than this. OUT (kernels/build when
not given) gets a folder per backend, `torch-cuda` and `torch-cpu`:

    the package's files     as they are: every import in them is relative, or of torch
    _ops.py                 the namespace of the ops, named after a hash of the files, so that two versions of the
                            package can be loaded in one process
    metadata.json           name, id, version, license, backend and a digest of every file
    llmops_kernels/         a package that gives the same names, for loaders that look a folder further down

The requirements: huggingface.co/docs/kernels, "Kernel requirements".
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "llmops_kernels"
CUDA_ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
OPS = '''"""The namespace of the ops of this build."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''
INNER = '''"""The same names as the folder above."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parent.parent / "__init__.py"
_name = "{id}_above"
_spec = importlib.util.spec_from_file_location(_name, _path, submodule_search_locations=[str(_path.parent)])
_module = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _module
_spec.loader.exec_module(_module)
globals().update({{name: value for name, value in vars(_module).items()
                  if not name.startswith("__") or name in ("__all__", "__version__", "__getattr__")}})
__path__ = _module.__path__
'''


def files(extensions: list[str]) -> dict[str, bytes]:
    """Relative path -> bytes of what the package consists of."""
    return {str(path.relative_to(SOURCE)): path.read_bytes() for path in sorted(SOURCE.rglob("*"))
            if path.suffix.removeprefix(".") in extensions and "__pycache__" not in path.parts}


def build(out: Path) -> list[Path]:
    """Write the folders; their paths."""
    described: dict[str, Any] = tomllib.loads((HERE / "build.toml").read_text())
    general = described["general"]
    held = files(described["torch-noarch"]["pyext"])
    module = general["name"].replace("-", "_")
    short = hashlib.sha256(b"".join(name.encode() + content for name, content in held.items())).hexdigest()[:7]
    made = []
    for backend in general["backends"]:
        ident = f"_{module}_{backend}_{short}"
        whole = held | {"_ops.py": OPS.format(id=ident).encode(),
                        f"{module}/__init__.py": INNER.format(id=ident).encode()}
        folder = out / f"torch-{backend}"
        for name, content in whole.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        digests = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in whole.items()}
        metadata = {"name": general["name"], "id": ident, "version": general["version"], "license": general["license"],
                    "python-depends": [],
                    "backend": {"type": backend} | ({"archs": CUDA_ARCHS} if backend == "cuda" else {}),
                    "digest": {"algorithm": "sha256", "files": digests}}
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        made.append(folder)
    return made


if __name__ == "__main__":
    for path in build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "build"):
        print(path)
