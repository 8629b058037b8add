"""Every format of `llmops export`, read back: `python benchmarks/bench_export.py [FORMAT ...] [--json FILE]`.

builtin:tiny as it came and rounded to nearest in five schemes is written in every format that can hold it and whose
packages are installed, and read back by the foreign reader; a line of the table in docs/export.md for each.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from _runner.machine import about, said
from _runner.results import Results, parser
from _runner.tables import head, line
from llmops.calibrate import walk
from llmops.errors import LlmopsError
from llmops.export import export
from llmops.formats.options import ABOUT
from llmops.methods.quantize import QuantizedWeight, rtn
from llmops.models.load import hush, load
from llmops.models.quantized import save_quantized
from llmops.models.save import save_dense

SCHEMES = {"w8": (8, -1, True), "w4": (4, 32, True), "w4-asymmetric": (4, 32, False), "w3": (3, 128, True),
           "w2-asymmetric": (2, 32, False)}


def sources(place: Path) -> list[Path]:
    """builtin:tiny dense, and in every scheme, each a folder."""
    model, tokenizer = load("builtin:tiny", dtype="stored", device="cpu")
    save_dense(model, tokenizer, place / "dense16", model.dtype)
    for name, (bits, group_size, symmetric) in SCHEMES.items():
        model, _ = load("builtin:tiny", dtype="stored", device="cpu")
        weights: dict[str, QuantizedWeight] = {}

        def update(layer: str, linear: nn.Linear, _: Tensor | None, kept: dict[str, QuantizedWeight] = weights,
                   scheme: tuple[int, int, bool] = (bits, group_size, symmetric)) -> Tensor:
            kept[layer] = rtn(linear.weight, bits=scheme[0], group_size=scheme[1], symmetric=scheme[2])
            return linear.weight

        walk(model, None, "none", update, ignore=["lm_head"])
        save_quantized(model, weights, place / name, tokenizer)
    return [place / name for name in ("dense16", *SCHEMES)]


def written(folder: Path, name: str, scratch: Path) -> dict[str, Any] | str:
    """What one folder comes to in one format, or why it cannot."""
    try:
        record = export(str(folder), name, out=scratch / f"{folder.name}-{name}")
    except LlmopsError as error:
        return str(error).split(";")[0]
    return {"variant": folder.name, "format": name, "reader": record["reader"], "notes": record["notes"],
            **{key: record[key]["value"] for key in ("max_logit_difference", "kl_mean", "bytes")}}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("formats", nargs="*", metavar="FORMAT", help="all, when none is named",
                         default=[name for name in ABOUT if name != "safetensors"])
    asked = options.parse_args()
    hush()
    record = about(asked, ("torch", "transformers", "compressed-tensors", "gguf", "onnx", "onnxruntime", "openvino"))
    results, lines, left = Results(asked.out, record), [], []
    print(said(record), file=sys.stderr)
    print(head(["variant", "format", "read back by", "largest logit difference", "mean KL, nats", "MB", ""]))
    with tempfile.TemporaryDirectory() as scratch:
        for folder in sources(Path(scratch)):
            for name in asked.formats:
                found = written(folder, name, Path(scratch))
                if isinstance(found, str):
                    left.append({"variant": folder.name, "format": name, "reason": found})
                    print(f"{folder.name}, {name}: {found}", file=sys.stderr)
                    continue
                lines.append(found)
                results.keep(lines=lines, left_out=left)
                print(line([found["variant"], name, found["reader"], f"{found['max_logit_difference']:.1e}",
                            f"{found['kl_mean']:.1e}", f"{found['bytes'] / 1e6:.2f}", "; ".join(found["notes"])]),
                      flush=True)
    results.end(lines=lines, left_out=left)


if __name__ == "__main__":
    main()
