"""Mixtures of experts taken apart into plain linear layers, put together again, and counted.

transformers keeps all experts of a layer in two 3-D parameters, `gate_up_proj` (experts, 2 * width, in) and `down_proj`
(experts, in, width). Nothing that looks for linear layers sees them, so a tool that only does that leaves most of
such a model as it was. `split_experts` puts an `Experts` in their place: the same function of (hidden states, chosen
experts, their weights), but of one gate, up and down projection an expert, ordinary `nn.Linear` with names as
checkpoints have them (`experts.3.gate_proj`). They share the memory of the 3-D parameters until one is replaced. What
was split has been tried: an `Experts` counts only once it gave what the fused module gives.

    split_experts   fused -> linear layers, for whatever looks at layers        fuse_experts   back, for a dense folder
    Routing         who saw how many calibration tokens, and whether all experts shall see all of them
    stored_names    names of this model's tensors -> those of its checkpoints (`mlp.experts.3.gate_proj.weight` is
                    `block_sparse_moe.experts.3.w1.weight` in a Mixtral), as transformers' own converter says them

The router is no linear layer in transformers' own models; where it is one (or a gate before a shared expert is), it
stands beside `experts` under a name of `arch.ROUTERS` and is left alone. Left out, and refused by name: experts with
biases, transposed or interleaved weights (gpt-oss), no gate, or a gate of their own making.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmops.errors import LlmopsError
from llmops.models.expert_names import expert_of

__all__ = ["Expert", "Experts", "Routing", "covered", "dense_experts", "fuse_experts", "split_experts", "stored_names"]

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # fused parameter -> its layers
FUSED = tuple(PARTS)
FEWEST, FRACTION = 16, 0.005  # an expert that got fewer calibration tokens than both has none worth listening to
LISTED = 256  # experts in a model up to which every count is told


class Expert(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy, so its classes are Any
    """One expert: down(act(gate(x)) * up(x)). The weights are views of what is given: (2 * width, in), (in, width)."""

    def __init__(self, gate_up: Tensor, down: Tensor, act: nn.Module) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2, dim=0)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Experts(nn.ModuleList):  # type: ignore[misc]
    """All experts of a layer. hidden_states: (T, in); top_k_index, top_k_weights: (T, k); gives (T, in).

    everything: every expert is run on all T tokens, so that whoever listens at its layers hears them all; the output
    is made of the chosen ones as ever.
    """

    def __init__(self, fused: nn.Module) -> None:
        act = fused.act_fn
        super().__init__(Expert(gate_up, down, act)
                         for gate_up, down in zip(*(getattr(fused, part).data for part in FUSED), strict=True))
        self.everything = False
        self.__dict__["fused"] = fused  # not a submodule: its parameters are no longer this model's

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if self.everything:
                made = expert(hidden_states)[token]
            elif len(token):
                made = expert(hidden_states[token])
            else:
                continue
            out = out.index_add(0, token, (made * top_k_weights[token, place, None]).to(out.dtype))
        return out


    def fill(self, part: str, tensor: Tensor) -> None:
        """Take the weights of all experts from a fused parameter, `part` its name. Raises KeyError for another part."""
        names = PARTS[part]
        for expert, whole in zip(self, tensor, strict=True):
            for name, weight in zip(names, whole.chunk(len(names)), strict=True):
                getattr(expert, name).weight = nn.Parameter(weight.contiguous(), requires_grad=False)


@dataclass
class Routing:
    """What a calibration says of experts. everything: whether all of them see all tokens while it measures.

    seen: tokens that each expert's layers were measured on, by full layer name; tokens: how many there were in all.
    """

    everything: bool = False
    seen: dict[str, int] = field(default_factory=dict)
    tokens: int = 0

    @property
    def floor(self) -> int:
        """Fewer tokens than this say nothing of an expert."""
        return max(FEWEST, int(FRACTION * self.tokens))

    def enough(self, name: str, count: int) -> bool:
        """Notes the count of a layer; whether it was measured on enough tokens (always, where it is no expert's)."""
        if expert_of(name) is None:
            return True
        self.seen[name] = count
        return count >= self.floor

    def events(self, instead: str) -> list[str]:
        """What the row tells: tokens by expert, and what was done for those that had too few. instead: as what."""
        counts: dict[tuple[str, int], int] = {}
        for name, count in self.seen.items():
            found = expert_of(name)
            assert found is not None
            counts[found] = min(count, counts.get(found, count))
        if not counts:
            return []
        few = {found: count for found, count in counts.items() if count < self.floor}
        sent = "all calibration tokens sent to all experts" if self.everything else "calibration tokens by expert"
        events = [f"{sent}: {_told(counts)}"]
        if few:
            names = ", ".join(f"{path}.{number}" for path, number in list(few)[:4])
            events.append(f"{len(few)} of {len(counts)} experts saw fewer than {self.floor} calibration tokens and are "
                          f"{instead}: {names}{', ...' if len(few) > 4 else ''}. More data or experts: all reaches "
                          "them")
        return events


def split_experts(model: nn.Module) -> list[str]:
    """Put `Experts` in the place of every fused expert module, in place; returns their names, none for a dense model.

    Raises LlmopsError naming the module when its experts are of a kind that cannot be taken apart.
    """
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    for name, module in fused.items():
        made = Experts(_can_be_split(name, module))
        if module.down_proj.device.type != "meta":
            _same(name, module, made)
        for part in FUSED:  # the views hold the memory from here on, and let go of it expert by expert
            setattr(module, part, nn.Parameter(getattr(module, part).data.new_empty(0), requires_grad=False))
        _put(model, name, made)
    return list(fused)


def fuse_experts(model: nn.Module) -> nn.Module:
    """The inverse: dense experts back in two 3-D parameters, layer by layer. Returns the model."""
    split = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    for name, module in split.items():
        fused = module.__dict__["fused"]
        down = torch.stack([expert.down_proj.weight.data for expert in module])
        gate_up = torch.stack([torch.cat([expert.gate_proj.weight.data, expert.up_proj.weight.data])
                               for expert in module])
        fused.gate_up_proj, fused.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
        _put(model, name, fused)
    return model


def dense_experts(model: nn.Module, packed: Container[str]) -> dict[str, Tensor]:
    """The experts' projections that are not packed, as fused parameters: what transformers reads beside packed ones.

    packed: full names of the layers that are. Raises LlmopsError where some of a kind are packed and others are not.
    """
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for part, names in PARTS.items() if isinstance(module, Experts) else ():
            inside = [f"{path}.{number}.{name}" for number in range(len(module)) for name in names]
            dense = [name for name in inside if name not in packed]
            if dense and len(dense) < len(inside):
                raise LlmopsError(f"{dense[0]} is left dense and {len(inside) - len(dense)} of the same kind are not; "
                                  f"readers take the {' and '.join(names)} of all experts of a layer alike: name all "
                                  "of them in ignore, or none")
            if dense:
                state[f"{path}.{part}"] = torch.stack([
                    torch.cat([getattr(expert, name).weight.detach().cpu() for name in names]) for expert in module])
    return state


@contextmanager
def covered(block: nn.Module, everything: bool) -> Iterator[None]:
    """Within, every expert of the block runs on all tokens, if `everything`."""
    found = [module for module in block.modules() if isinstance(module, Experts)] if everything else []
    for module in found:
        module.everything = True
    try:
        yield
    finally:
        for module in found:
            module.everything = False


def stored_names(model: nn.Module) -> dict[str, str]:
    """{name of a tensor of a model with split experts: its name in checkpoints}; empty for a model without experts.

    transformers' converter is asked with tensors that hold nothing but a number each, as many as there are names.
    """
    from transformers.core_model_loading import revert_weight_conversion

    split = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    if not split:
        return {}
    names: list[str] = []
    asked: dict[str, Tensor] = {}

    def numbers(wanted: list[str]) -> Tensor:
        names.extend(wanted)
        return torch.arange(len(names) - len(wanted), len(names))

    for path, module in split.items():
        each = [f"{path}.{number}" for number in range(len(module))]
        both = [f"{expert}.{part}.weight" for expert in each for part in ("gate_proj", "up_proj")]
        asked[f"{path}.gate_up_proj"] = numbers(both).view(len(each), 2, 1)
        asked[f"{path}.down_proj"] = numbers([f"{expert}.down_proj.weight" for expert in each]).view(-1, 1, 1)
    for name in model.state_dict():
        if expert_of(name) is None:
            asked[name] = numbers([name]).view(1)
    given = revert_weight_conversion(model, asked)
    return {names[int(value.flatten()[0])]: name for name, value in given.items()}


# ---------------------------------------------------------------------------------------------------------- pieces


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _is_fused(module: nn.Module) -> bool:
    held = dict(module.named_parameters(recurse=False))
    return any(parameter.dim() == 3 for parameter in held.values()) and "down_proj" in held


def _can_be_split(name: str, module: nn.Module) -> nn.Module:
    facts: Mapping[str, tuple[Any, bool]] = {
        "parameters": (sorted(part for part, _ in module.named_parameters(recurse=False)),
                       {part for part, _ in module.named_parameters(recurse=False)} == set(FUSED)),
        "is_transposed": (getattr(module, "is_transposed", False), not getattr(module, "is_transposed", False)),
        "is_concatenated": (getattr(module, "is_concatenated", True), getattr(module, "is_concatenated", True)),
        "act_fn": (getattr(module, "act_fn", None), callable(getattr(module, "act_fn", None)))}
    wrong = [f"{fact} {value!r}" for fact, (value, fine) in facts.items() if not fine]
    if wrong:
        raise LlmopsError(f"{name} ({type(module).__name__}) holds fused experts with {', '.join(wrong)}; expected "
                          f"exactly {' (experts, 2 width, in) and '.join(FUSED)} (experts, in, width), gate before up, "
                          "and an act_fn: experts of another kind would stay as they are in silence")
    return module


@torch.no_grad()  # type: ignore[untyped-decorator]
def _same(name: str, fused: nn.Module, made: Experts) -> None:
    """Raises LlmopsError unless both give the same for a few random tokens that reach two experts each."""
    count, width = len(made), fused.down_proj.shape[1]
    device, dtype = fused.down_proj.device, fused.down_proj.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator).to(device, dtype)
    chosen = (torch.arange(4).unsqueeze(1) * 2 + torch.arange(2)).remainder(count).to(device)[:, :min(2, count)]
    weights = torch.rand(chosen.shape, generator=generator).to(device, dtype)
    expected, found = fused(x, chosen, weights).float(), made(x, chosen, weights).float()
    if not torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
        if not bool(torch.isfinite(expected).all()):
            return  # the walk will name the layer whose weights are not finite
        raise LlmopsError(f"{name} ({type(fused).__name__}): taken apart, its experts give something else by up to "
                          f"{float((found - expected).abs().max()):.2g}; expected down(act(gate(x)) * up(x))")


def _told(counts: Mapping[tuple[str, int], int]) -> str:
    """Every count where there are few, else the spread of each layer."""
    layers: dict[str, list[int]] = {}
    for (path, _), count in counts.items():
        layers.setdefault(path, []).append(count)
    if len(counts) <= LISTED:
        return "; ".join(f"{path} {' '.join(map(str, found))}" for path, found in layers.items())
    return "; ".join(f"{path} {min(found)} to {max(found)}, median {sorted(found)[len(found) // 2]}"
                     for path, found in layers.items())
