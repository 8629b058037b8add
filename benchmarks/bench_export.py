"""Every format of `llmops export`, read back: `python benchmarks/bench_export.py [FORMAT ...]`.

builtin:tiny as it came and rounded to nearest in five schemes is written in every format that can hold it and whose
packages are installed, and read back by the foreign reader; a line of the table in docs/export.md for each.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from torch import Tensor, nn

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


def main(formats: list[str]) -> None:
    hush()
    print("| variant | format | read back by | largest logit difference | mean KL, nats | MB | |\n|-|-|-|-|-|-|-|")
    with tempfile.TemporaryDirectory() as scratch:
        for folder in sources(Path(scratch)):
            for name in formats:
                try:
                    record = export(str(folder), name, out=Path(scratch) / f"{folder.name}-{name}")
                except LlmopsError as error:
                    print(f"{folder.name}, {name}: {str(error).split(';')[0]}", file=sys.stderr)
                    continue
                difference, kl, size = (record[key]["value"] for key in ("max_logit_difference", "kl_mean", "bytes"))
                print(f"| {folder.name} | {name} | {record['reader']} | {difference:.1e} | {kl:.1e} | {size / 1e6:.2f} "
                      f"| {'; '.join(record['notes'])} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [name for name in ABOUT if name != "safetensors"])
