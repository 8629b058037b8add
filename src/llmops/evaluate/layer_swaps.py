"""Which layers cause it: each layer of a variant put alone into its parent, and what becomes of the parent's answers.

    kl_l = mean over answer tokens of KL(P || P with layer l of the variant)

P is the parent. A layer is swapped as the module it is (packed integers, a pruned matrix, a trained one), so whatever
the variant does there is done. Norms that differ mean that factors were folded into the layers behind them (AWQ,
SmoothQuant): then the layers of a block only make sense together, and the block is swapped whole; so it is where FFN
channels or heads were cut. Beside KL: how much likelier the parent's own answer became (mean log-probability a token),
and in how many answers some token is no longer the likeliest, that is, how many greedy answers this one layer changes.

What single swaps cost does not add up to what all together cost; both are given. Cost: one forward pass for each swap.
Refused: models of another shape (layers or hidden features were left out, another architecture), and other weights in
the residual stream (a rotation), where a single layer in the other's place would only make noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmops.errors import LlmopsError
from llmops.evaluate.live import scoring
from llmops.evaluate.token_view import Shown, answer_log_probabilities
from llmops.models.arch import decoder_layers, text_config

__all__ = ["Part", "Swapped", "attribute", "parts", "swapped"]

MOST_LOGITS = 2**27  # elements of the parent's log-probabilities that are kept (0.5 GB)


@dataclass(frozen=True)
class Part:
    """Something that can be swapped: full names of modules, the block it is in (None: outside), what it is called."""

    names: tuple[str, ...]
    block: int | None
    kind: str


@dataclass(frozen=True)
class Swapped:
    """What swapping one part did: mean KL in nats a token, mean change of the answer's log-probability a token (nats;
    below 0: less likely), answers with a token that is no longer the likeliest."""

    part: Part
    kl: float
    delta_logp: float
    turned: int


def parts(variant: nn.Module, reference: nn.Module) -> list[Part]:
    """What differs between two models of one shape: layer by layer, or whole blocks where their norms or sizes differ.

    Raises LlmopsError when they are of another architecture, depth or hidden size.
    """
    for key, word in (("model_type", "of type"), ("hidden_size", "of hidden size")):
        mine, theirs = (getattr(text_config(model), key) for model in (variant, reference))
        if mine != theirs:
            raise LlmopsError(f"the two are {word} {mine} and {theirs}, so no layer of one has a place in the other; "
                              "expected two of one shape: hold it against another with --against")
    (path, blocks), (_, others) = decoder_layers(variant), decoder_layers(reference)
    if len(blocks) != len(others):
        raise LlmopsError(f"the two have {len(blocks)} and {len(others)} decoder blocks, so no layer of one has "
                          "a place in the other; expected two of one depth: hold it against another with --against")
    found = []
    for number, (block, other) in enumerate(zip(blocks, others, strict=True)):
        short = [name for name in _leaves(block, other) if _differs(block, other, name)]
        names = [f"{path}.{number}.{name}" for name in short]
        if any(_is_vector(block.get_submodule(name)) or _resized(block.get_submodule(name), other.get_submodule(name))
               for name in short):
            found.append(Part((f"{path}.{number}",), number, "whole block"))
        else:
            found += [Part((name,), number, _kind(name)) for name in names]
    outside = [name for name in _leaves(variant, reference, path) if _differs(variant, reference, name)]
    return found + [Part((name,), None, _kind(name)) for name in outside]


def attribute(variant: Any, reference: Any, shown: Sequence[Shown], *, columns: int | None = None,
              progress: Callable[[int, int], None] | None = None) -> tuple[Swapped, list[Swapped]]:
    """(the whole variant, every part alone), on the reference's answers. shown: prompt and answer, at least one.

    columns: logits that both have (`live.shared_columns`); None: all. Answers are cut where the reference's
    log-probabilities would take more than half a gigabyte. The reference is as before when this returns or raises.
    Raises LlmopsError as `parts`.
    """
    if not shown:
        raise LlmopsError("there is no answer to look at; expected at least one item that both variants have")
    wanted = parts(variant, reference)
    with scoring(variant, reference):
        kept = _fitting(shown, reference)
        before = [answer_log_probabilities(reference, each, columns) for each in kept]
        whole = _held(Part((), None, "everything"), kept, before, variant)
        found = []
        for number, part in enumerate(wanted):
            with swapped(reference, variant, part):
                found.append(_held(part, kept, before, reference))
            if progress is not None:
                progress(number + 1, len(wanted))
    return whole, found


@contextmanager
def swapped(model: nn.Module, other: nn.Module, part: Part) -> Iterator[None]:
    """`model` with the modules of `part` taken from `other` while the block lasts."""
    mine = [model.get_submodule(name) for name in part.names]
    try:
        for name in part.names:
            _put(model, name, other.get_submodule(name))
        yield
    finally:
        for name, module in zip(part.names, mine, strict=True):
            _put(model, name, module)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    if isinstance(holder, nn.ModuleList):
        holder[int(child)] = module
    else:
        setattr(holder, child, module)


def _fitting(shown: Sequence[Shown], model: Any) -> list[Shown]:
    left = max(64, MOST_LOGITS // int(model.config.get_text_config(decoder=True).vocab_size))
    kept: list[Shown] = []
    for prompt, answer in shown:
        if left <= 0 or not answer:
            continue
        kept.append((prompt, list(answer)[:left]))
        left -= len(kept[-1][1])
    return kept


def _held(part: Part, shown: Sequence[Shown], before: Sequence[Tensor], model: Any) -> Swapped:
    kl, change, tokens, turned = 0.0, 0.0, 0, 0
    for each, log_p in zip(shown, before, strict=True):
        log_q = answer_log_probabilities(model, each, log_p.shape[-1])
        kl += float((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).double().sum())
        answer = torch.tensor(list(each[1]))[:, None]
        change += float((log_q.gather(-1, answer) - log_p.gather(-1, answer)).double().sum())
        turned += bool((log_q.argmax(-1) != log_p.argmax(-1)).any())
        tokens += len(each[1])
    return Swapped(part, kl / tokens, change / tokens, turned)


def _leaves(one: nn.Module, two: nn.Module, without: str = "") -> Iterator[str]:
    """Names of the smallest modules that stand in both: below a pair of one type with the same children, its children.

    without: a path that is not gone into.
    """
    def walk(a: nn.Module, b: nn.Module, at: str) -> Iterator[str]:
        mine, theirs = dict(a.named_children()), dict(b.named_children())
        if type(a) is type(b) and mine and list(mine) == list(theirs) and not list(a.parameters(recurse=False)):
            for name in mine:
                full = f"{at}.{name}" if at else name
                if full != without:
                    yield from walk(mine[name], theirs[name], full)
        elif at:
            yield at

    return walk(one, two, "")


def _differs(one: nn.Module, two: nn.Module, name: str) -> bool:
    a, b = one.get_submodule(name), two.get_submodule(name)
    mine, theirs = _tensors(a), _tensors(b)
    return type(a) is not type(b) or mine.keys() != theirs.keys() or any(
        tensor.shape != theirs[key].shape or tensor.dtype != theirs[key].dtype or not torch.equal(tensor, theirs[key])
        for key, tensor in mine.items())


def _resized(one: nn.Module, two: nn.Module) -> bool:
    """Whether two layers of one place differ in their number of features, so that neighbours have to come along."""
    sizes = [tuple(getattr(each, key, None) for key in ("in_features", "out_features")) for each in (one, two)]
    if None not in (*sizes[0], *sizes[1]) or type(one) is not type(two):
        return sizes[0] != sizes[1]
    return [tensor.shape for tensor in _tensors(one).values()] != [tensor.shape for tensor in _tensors(two).values()]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _is_vector(module: nn.Module) -> bool:
    """A norm, or whatever else has no matrix."""
    tensors = list(_tensors(module).values())
    return not isinstance(module, nn.Linear) and bool(tensors) and all(tensor.dim() < 2 for tensor in tensors)


def _kind(name: str) -> str:
    """`q`, `down`, `lm_head`: the last part of a name, which a numbered expert keeps its number in."""
    short = name.rpartition(".")[2].removesuffix("_proj")
    expert = re.search(r"experts\.(\d+)\.", name)
    return f"{short} of expert {expert[1]}" if expert else short
