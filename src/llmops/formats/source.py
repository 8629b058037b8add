"""The folder that is exported, as every format takes it: its config, its schemes, and its tensors one by one.

A packed layer comes as its parts (`layouts.py`), whatever layout the folder has; every other tensor as it is stored.
Left out: tensors are gathered before they are written, so an export takes as much memory as the file it makes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmops.errors import LlmopsError, ModelError
from llmops.methods.quantize import packing
from llmops.methods.quantize.float_packing import unpack_floats, unpack_int8
from llmops.methods.quantize.floats import AnyWeight
from llmops.models.builtin import config_of
from llmops.models.expert_names import expert_of
from llmops.models.number_formats import activations
from llmops.models.quantized import PackedReader
from llmops.models.schemes import LayerScheme, told

__all__ = ["Source", "Written", "activations_note", "unpacked", "write_beside", "write_folder"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What is made anew or belongs to the source alone; the rest (tokenizer, template, generation config) is copied.
NOT_COPIED = {"config.json", "llmops.json", "quantize_config.json", "quant_config.json", "model.safetensors.index.json",
              "recipe.yaml", "exports.json"}
COPIED = {".json", ".jinja", ".txt", ".model", ".py"}


@dataclass(frozen=True)
class Written:
    """What a writer says of its work. exact: no weight was rounded again, so it must read back as what it was."""

    notes: list[str] = field(default_factory=list)
    exact: bool = True


@dataclass(frozen=True)
class Source:
    """A model folder that stands on its own: dense weights, or integers in a layout that can be read.

    schemes: of its packed layers, by full name; empty when it has none.
    """

    folder: Path
    config: Mapping[str, Any]
    schemes: Mapping[str, LayerScheme]

    @classmethod
    def of(cls, folder: Path) -> Source:
        """Raises ModelError when the folder is no model, or packed in a way that cannot be read."""
        config = config_of(folder)
        block = config.get("quantization_config")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"{folder}: holds no .safetensors file; expected the folder of a variant or a model")
        return cls(folder, config, PackedReader(folder, block).schemes if block else {})

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not packed, as the config says."""
        named = str(self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16")
        return DTYPES.get(named.removeprefix("torch."), torch.bfloat16)

    def check_integers(self, layout: str) -> None:
        """Raises LlmopsError for what a layout of plain integers cannot hold: dense models, experts, other numbers."""
        self.check_packed()
        if any(expert_of(name) is not None for name in self.schemes):
            raise LlmopsError(f"{self.folder.name} is a mixture of experts, whose {layout} layout no reader here could "
                              "check; expected one of linear layers alone: export to compressed-tensors, which "
                              "transformers and vLLM read expert by expert, or to dense")
        other = next((scheme for scheme in self.schemes.values() if scheme.kind != "int"), None)
        if other is not None:
            raise LlmopsError(f"{self.folder.name} holds {other}, and {layout}'s layout integers whose activations "
                              "stay in 16 bit; expected a variant of scheme w4a16 or the like: export to "
                              "compressed-tensors or dense")

    def one_scheme(self, layout: str) -> LayerScheme:
        """The scheme of all packed layers, for a layout that has room for one.

        Raises LlmopsError when they differ, and as `check_integers`.
        """
        self.check_integers(layout)
        if len(set(self.schemes.values())) > 1:
            raise LlmopsError(f"{self.folder.name} mixes schemes ({told(self.schemes)}), and {layout}'s layout "
                              "describes one for all layers; expected the same in every layer: export to "
                              "compressed-tensors, which gives each layer its own (transformers and vLLM read it), to "
                              "gptq, whose `dynamic` does, to gguf, whose types are per tensor, or to dense")
        return next(iter(self.schemes.values()))

    @property
    def rounds_activations(self) -> bool:
        """Whether a layer rounds its inputs, which no format with dense weights will do."""
        return any(scheme.kind != "int" and activations(scheme.kind) is not None for scheme in self.schemes.values())

    def check_packed(self) -> None:
        """Raises LlmopsError for a dense model."""
        if not self.schemes:
            raise LlmopsError(f"{self.folder.name} holds {self.config.get('dtype', '16-bit')} weights, and this format "
                              "holds integers; expected a quantized variant: export one, or take dense or gguf-q8_0")

    def packed(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(layer name, its parts) of every packed layer. Scales of foreign layouts in the model's type if exact."""
        reader = self._reader()
        if reader is not None:
            for name in reader.layers():
                yield name, reader.parts(name)

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything that is not part of a packed layer; an 8-bit embedding multiplied out."""
        from safetensors import safe_open

        reader = self._reader()
        if reader is not None and reader.embedding:
            embedding = reader.embedding[0]
            codes, scale = reader.take(f"{embedding}.weight"), reader.take(f"{embedding}.weight_scale")
            assert codes is not None and scale is not None
            yield f"{embedding}.weight", codes.to(scale.dtype) * scale
        taken = [f"{name}." for name in (*reader.layers(), *reader.embedding)] if reader is not None else []
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - no dict
                    if name.endswith(".bias") or not name.startswith(tuple(taken)):
                        yield name, handle.get_tensor(name)

    def _reader(self) -> PackedReader | None:
        block = self.config.get("quantization_config")
        return PackedReader(self.folder, block, None, self.dtype) if block else None


def unpacked(parts: Mapping[str, Tensor], scheme: LayerScheme, name: str) -> AnyWeight:
    """A packed layer as codes, scales and zero points."""
    if scheme.kind != "int":
        return unpack_int8(parts, name) if scheme.kind == "w8a8" else unpack_floats(parts, scheme.kind, name)
    return packing.unpack(parts, bits=scheme.bits, group_size=scheme.group_size, name=name)


def activations_note(source: Source) -> list[str]:
    """What a writer of dense weights has to say of a source that rounds its activations."""
    return ["activations stay as they are: the export computes what the weights say, the variant rounds its inputs, too"
            ] if source.rounds_activations else []


def write_folder(source: Source, folder: Path, state: Mapping[str, Tensor],
                 quantization: Mapping[str, Any] | None) -> None:
    """A transformers folder: `state` as safetensors (5 GB a file at most), config, tokenizer, template.

    quantization: the `quantization_config` of the new config.json, None for dense weights.
    """
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, folder, max_shard_size="5GB")
    write_beside(source, folder, quantization)


def write_beside(source: Source, folder: Path, quantization: Mapping[str, Any] | None = None) -> None:
    """What lies beside the weights: config.json, tokenizer, template, generation config."""
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    config |= {"quantization_config": dict(quantization)} if quantization is not None else {}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in source.folder.iterdir():
        if path.is_file() and path.suffix in COPIED and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)
