"""Where adapters start, when not at zero: at the weight's largest directions (PiSSA), or at what rounding lost (LoftQ).

Both split a weight into an adapter and a frozen rest, so that training starts at (nearly) the same model:

    PiSSA   W = R + s B A, B A the best rank-r approximation of W: the adapter holds what matters most, and the
            frozen rest is small, which also makes it cheap to quantize.  Meng et al. 2024, arXiv 2404.02948, eq. 2-4
    LoftQ   W ~ Q + s B A, found in turns: Q = q(W - s B A), then B A the best rank-r approximation of W - Q.
            Li et al. 2023, arXiv 2310.08659, algorithm 1

The singular values are split evenly between A and B, and the scale s is divided out, so that s B A is what the paper
writes as its product. Differences: PiSSA's SVD here is exact, not the paper's randomized one, and LoftQ keeps the round
of its iteration whose error is least (the alternation need not fall for ever). Cost: one SVD of (out, in) a layer for
PiSSA, one an iteration for LoftQ: seconds for a layer of 4096 x 4096 on a CPU.

An adapter that starts at PiSSA belongs to the rest R, not to W. To hand it to people who have W, it is written as an
ordinary adapter of twice the rank, s (B A - B0 A0), where B0 A0 is its start (section 3 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmops.errors import LlmopsError
from llmops.methods.finetune.lora import NAME, adapters, lora_delta, set_adapters

__all__ = ["Loftq", "Pair", "best_pair", "difference_pair", "loftq_init", "pissa_init", "pissa_to_lora", "start_pissa"]

Pair = tuple[Tensor, Tensor]  # (A, B): (r, in), (out, r)


class Loftq(NamedTuple):
    """A, B: the adapter; quantized: (out, in), Q in full precision; before: the pair with Q = q(W - scaling * B A)."""

    A: Tensor
    B: Tensor
    quantized: Tensor
    before: Pair


def best_pair(W: Tensor, rank: int, scaling: float) -> Pair:
    """(A, B) with scaling * B A the best rank-r approximation of W in the Frobenius norm (Eckart and Young 1936)."""
    if rank > min(W.shape):
        raise LlmopsError(f"given rank {rank} for a weight of {W.shape[0]} x {W.shape[1]}; expected at most "
                          f"{min(W.shape)}, which holds all of it")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    return root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root


def pissa_init(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, residual) with W = residual + scaling * B A, and scaling * B A the best rank-r approximation of W.

    W: (out, in), float32 -> A: (r, in); B: (out, r); residual: (out, in). Raises LlmopsError for a rank above both.
    """
    A, B = best_pair(W, rank, scaling)
    return A, B, W - lora_delta(A, B, scaling)


def loftq_init(W: Tensor, rank: int, quantize: Callable[[Tensor], Tensor], iterations: int,
               scaling: float = 1.0) -> Loftq:
    """W ~ quantized + scaling * B A, by `iterations` turns of rounding and of approximating what rounding lost.

    W: (out, in), float32. quantize: (out, in) -> the nearest (out, in) that the data type can hold.
    """
    before: Pair = (W.new_zeros(rank, W.shape[1]), W.new_zeros(W.shape[0], rank))
    best: Loftq | None = None
    least = float("inf")
    for _ in range(iterations):
        Q = quantize(W - lora_delta(*before, scaling))
        A, B = best_pair(W - Q, rank, scaling)
        error = float((W - Q - lora_delta(A, B, scaling)).norm())
        if error < least:
            best, least = Loftq(A, B, Q, before), error
        before = (A, B)
    assert best is not None
    return best


def difference_pair(now: Pair, start: Pair) -> Pair:
    """(A, B) of rank 2r with B A = B_now A_now - B_start A_start."""
    return torch.cat([now[0], start[0]]), torch.cat([now[1], -start[1]], dim=1)


def start_pissa(adapted: nn.Module, svd_device: torch.device | None = None) -> dict[str, Pair]:
    """Start the adapters of a model at PiSSA, in place: A and B set, the base weights left with the rest.

    Returns the start by layer name, on the CPU. The base has to be dense.
    """
    starts: dict[str, Pair] = {}
    with torch.no_grad():
        for name, layer in adapters(adapted).items():
            weight = layer.get_base_layer().weight
            A, B, residual = pissa_init(weight.float().to(svd_device or weight.device), layer.r[NAME],
                                        layer.scaling[NAME])
            weight.copy_(residual)
            starts[name] = (A.cpu(), B.cpu())
    set_adapters(adapted, starts)
    return starts


def pissa_to_lora(adapted: Any, starts: Mapping[str, Pair]) -> None:
    """Turn adapters that started at PiSSA into ordinary ones of twice the rank on the weights as they came, in place.

    The model computes what it computed; its adapters now fit the original base, in any program that reads LoRA.
    """
    config = adapted.peft_config[NAME]
    with torch.no_grad():
        for name, layer in adapters(adapted).items():
            scaling = layer.scaling[NAME]
            A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            start = (starts[name][0].to(A), starts[name][1].to(B))
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + lora_delta(*start, scaling))
            wide = difference_pair((A, B), start)
            layer.lora_A[NAME] = _linear(wide[0])
            layer.lora_B[NAME] = _linear(wide[1])
            layer.r[NAME] = 2 * config.r
    scale = next(iter(adapters(adapted).values())).scaling[NAME]
    config.r, config.use_rslora, config.lora_alpha = 2 * config.r, False, 2 * config.r * scale


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.contiguous())
    return made
