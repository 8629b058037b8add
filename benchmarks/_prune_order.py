"""What the order of pruning methods means: how uneven a model's inputs are, how much each method loses, paired.

A method's *rise* is its mean loss minus the dense model's over the same windows (or answers), in nats a token: the
logarithm of perplexity over perplexity. Two methods are held against each other by the difference of their rises, with
Student's 95 % interval over the pairs:

    A ~ B    the interval holds 0
    A < B    it is above 0
    A << B   it is above 0, and B's rise is at least `MUCH` times A's (published: 4.7 for LLaMA-2-7B, 1.7 for 13B)
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from _prune_draws import CELL
from _quantize_pairs import common, difference, gathered
from _runner.tables import head, line
from llmops import calibrate
from llmops.data.options import Limits
from llmops.data.render import collate, encode
from llmops.data.sources import Rows

MUCH = 1.5
ORDER = ("sparsegpt", "wanda", "magnitude")
#: name of what is paired -> (its losses, what they are of)
KINDS = {"losses": "text", "answer_losses": "answers"}


def uneven(model: Any, tokens: Tensor) -> dict[str, dict[str, float]]:
    """How uneven the inputs of the layers in the blocks are, by the name of the layer, medians over the blocks.

    Of the L2 norms of a layer's inputs over all tokens: largest over median; share over three medians; kurtosis, the
    mean fourth power over the squared mean square (as He et al. 2024 measure it, arXiv 2405.19279; 1: all alike).
    """
    found: dict[str, list[tuple[float, float, float]]] = {}

    def note(name: str, layer: Any, x: Tensor | None) -> None:
        assert x is not None
        wide = x.double()
        middle = wide.median()
        found.setdefault(name.rpartition(".")[2], []).append((
            float(wide.max() / middle), float((wide > 3 * middle).double().mean()),
            float(wide.pow(4).mean() / wide.square().mean().square())))

    calibrate.walk(model, tokens, "x_norm", note, ignore=("lm_head",))
    return {name: {key: median(each[place] for each in entries)
                   for place, key in enumerate(("largest_over_median", "over_three_medians", "kurtosis"))}
            for name, entries in found.items()}


@torch.no_grad()  # type: ignore[untyped-decorator]
def answer_losses(model: Any, tokenizer: Any, rows: Rows, at_once: int = 32) -> list[float]:
    """The mean loss of each row's answer, in nats a token, given its prompt: what exact match is about, in degrees."""
    encoded = encode(rows, tokenizer, max_length=512, limits=Limits())
    losses: list[float] = []
    for start in range(0, len(encoded.examples), at_once):
        batch = collate(encoded.examples[start:start + at_once], tokenizer.pad_token_id or 0)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        each = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        kept = labels != -100
        losses += [round(loss, 6) for loss in ((each * kept).sum(1) / kept.sum(1)).tolist()]
    return losses


def orders(base: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each cell, tool and kind of loss: the rises of SparseGPT, Wanda and magnitude and their differences.

    Each is (mean, half width of its 95 % interval), over the draws that all three have. Magnitude is ours beside every
    tool: there is one magnitude.
    """
    made = []
    cells = dict.fromkeys((row["sparsity"], row["pattern"]) for row in rows)
    for sparsity, pattern in cells:
        here = [row for row in gathered(rows, CELL) if (row["sparsity"], row["pattern"]) == (sparsity, pattern)]
        for tool in dict.fromkeys(row["tool"] for row in here):
            of = {row["method"]: row for row in here if row["method"] == "magnitude" or row["tool"] == tool}
            if any(method not in of for method in ORDER):
                continue
            for kind in KINDS:
                some = common([of[method] for method in ORDER], kind) if kind in base else []
                if len(some) == len(ORDER):
                    made.append({"sparsity": sparsity, "pattern": pattern, "tool": tool, "of": KINDS[kind],
                                 **_standing(base[kind], some, kind)})
    return made


def _standing(dense: Sequence[float], rows: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """One entry's figures. dense: the model's own losses; rows: gathered, those of ORDER, of the same draws."""
    losses = {method: [draw[kind] for draw in row["draws"].values()] for method, row in zip(ORDER, rows, strict=True)}
    draws = len(losses["wanda"])
    return {"pairs": len(dense), "draws": draws, "dense": fmean(dense),
            "rises": {method: difference(losses[method], [dense] * draws) for method in ORDER},
            "wanda_minus_sparsegpt": difference(losses["wanda"], losses["sparsegpt"]),
            "magnitude_minus_wanda": difference(losses["magnitude"], losses["wanda"]),
            "magnitude_minus_sparsegpt": difference(losses["magnitude"], losses["sparsegpt"])}


def sign(rise: float, other: float, apart: tuple[float, float]) -> str:
    """How a rise stands to another. apart: the other minus it, and the half width of that."""
    mean, half = apart
    if abs(mean) <= half:
        return "~"
    if mean < 0:
        return ">>" if rise >= MUCH * other else ">"
    return "<<" if other >= MUCH * rise else "<"


def relation(found: dict[str, Any]) -> str:
    """`dense < SparseGPT ~ Wanda << magnitude`, as measured."""
    rises = {method: found["rises"][method][0] for method in ORDER}
    first = sign(0.0, rises["sparsegpt"], tuple(found["rises"]["sparsegpt"])).replace("<<", "<")
    return (f"dense {first} SparseGPT {sign(rises['sparsegpt'], rises['wanda'], found['wanda_minus_sparsegpt'])} Wanda "
            f"{sign(rises['wanda'], rises['magnitude'], found['magnitude_minus_wanda'])} magnitude")


def order_table(found: Sequence[dict[str, Any]]) -> str:
    """A line a cell, tool and kind of loss."""
    lines = [head(["pattern", "tool", "of", "SparseGPT", "Wanda", "magnitude", "magnitude - Wanda", "order"],
                  "lllrrrrl")]
    for each in found:
        shown = [f"{mean:+.3f} +- {half:.3f}" for mean, half in (*each["rises"].values(),
                                                                 each["magnitude_minus_wanda"])]
        lines.append(line([f"{each['sparsity']:.0%} {each['pattern']}", each["tool"], each["of"], *shown,
                           relation(each)]))
    return "\n".join(lines)


def uneven_table(found: dict[str, dict[str, float]]) -> str:
    """A line a kind of layer."""
    lines = [head(["layer", "largest / median", "over 3 medians", "kurtosis"], "lrrr")]
    lines += [line([name, f"{each['largest_over_median']:.1f}", f"{each['over_three_medians']:.1%}",
                    f"{each['kurtosis']:.1f}"]) for name, each in found.items()]
    return "\n".join(lines)
