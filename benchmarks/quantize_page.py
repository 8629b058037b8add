"""docs/quantization-figures.md out of the results in benchmarks/results: `python benchmarks/quantize_page.py`.

Takes the files of bench_quantize.py and bench_published_table.py that are named in `ACCURACY` and `PUBLISHED`, and says
of them what can be said without a hand in it: the tables, which cells are lost and by how much, and how far GPTQ wins
back what rounding costs. `--check` writes nothing and ends with code 1 where the page is not what the results say.
No torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _published import order, shares, table, verdict
from _quantize_case import counted, divergence_table, perplexity_table, standing, verdict_table, verdicts

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "quantization-figures.md"
ACCURACY = ("quantize-accuracy-tiny.json", "quantize-accuracy-text.json")
PUBLISHED = "quantize-published.json"
MODELS = {"tiny": "the built-in model, tuned as in recipes/quantize.yaml",
          "text": "a Llama of 3.7 M parameters, pretrained on real English by the benchmark itself"}

HEAD = """# Quantizers beside their peers: the figures

Written by `python benchmarks/quantize_page.py` from the files in `benchmarks/results`. What is compared, and what the
methods are: [quantization](quantization.md#figures); how: the docstring of `benchmarks/bench_quantize.py`.

Peers run at their defaults. Ours were developed on the built-in model (LOG.md), whose channels have very different
sizes on purpose, which favours what looks at them; the second model is the fairer one. Peers' cells may be of an
earlier run than ours (perplexities do not hang on the machine's load); times are not compared here.

A draw is the same function in other numbers: the channels of the stream, of each MLP and within the heads of values in
another order (so that other weights share a group and are rounded together), and other calibration crops; draw 0 is the
model as it is. Every contender of a draw gets the same. Perplexities and KL are means over the draws that all
tools of a method have in a cell, exact match is of draw 0; column `draws` says how many. An interval is 95 %,
over the differences on the same windows and, from two draws on, over draws (`benchmarks/_quantize_pairs.py`). *Ahead*
and *behind* are where it leaves out 1, all else is *level*. With one draw it says nothing of the chance of one
rounding, which on `tiny` is 1 to 3 % of the perplexity at 4 bits for GPTQ and 4 to 5 % for methods without data, and
0.2 % at 8 bits (standard deviations over draws): read a cell of one draw there with that in mind. KL is the divergence
from the float32 model on the first 8,192 tokens that are scored, nats a token, its interval over pieces of 256.

Of `tiny` read 3 and 2 bits, and at 4 and 8 the divergence. It was tuned on questions and is scored here on prose, some
of which it has forgotten: rounding that moves it back a little *lowers* its perplexity (cells below the float32
model's, some of them with the largest divergence of their column). RTN at 4 bits in groups of 128 is such a cell: the
peers' grid of absmax / 7.5 has the higher divergence and the lower perplexity, and is left to them. The second model
has seen its text several times, and rounding that makes it less sure of itself lowers its perplexity, too: a
distillation that raised its divergence by a third took 9 % off (LOG.md). So read both columns there as well.

Ours of all methods (`best`) counts combinations of its own: GPTQ and AutoRound after AWQ's factors, the latter with
a `distill` child, 4 epochs over the same calibration tokens, stored in the same bits and groups, and (`auto+autoround`)
with bits and groups chosen for each layer, as many bits a weight on average as the cell has with its scales."""

CELLS = ("| model | perplexity: ahead | level | behind | at or below | at 3 and 2 bits: ahead | level | behind | "
         "KL: ahead | level | behind |")


def lost(found: Sequence[dict[str, Any]]) -> list[str]:
    """One line for every cell in which a peer with the same method (or, of all methods, the best peer) is ahead."""
    made = []
    for line in found:
        if "ratio" not in line or line["ratio"] <= 1:
            continue
        level = standing(line["ratio"], line["half_width"]) != "behind"
        made.append(f"- {line['bits']} bits, groups of {line['group']}, "
                    f"{'the best of all methods' if line['method'] == 'best' else line['method']}: {line['ours']:.4g} "
                    f"({line['ours_by']}) against {line['peer']:.4g} ({line['peer_by']}), {line['ratio'] - 1:+.1%} +- "
                    f"{line['half_width']:.1%}{', level' if level else ''}{_nearer(line)}")
    return made


def _nearer(line: dict[str, Any]) -> str:
    """What the divergence says of a lost cell."""
    if "divergence_ratio" not in line:
        return ""
    nearer = standing(line["divergence_ratio"], line.get("divergence_half_width", math.inf)) == "ahead"
    return (f"; KL {line['divergence_ours']:.3g} against {line['divergence_peer']:.3g}"
            + (": ours is the nearer to the float model" if nearer else ""))


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdicts of a result, out of its rows."""
    return verdicts(result["rows"], result["base"]["perplexity"])


def counts(results: Sequence[dict[str, Any]]) -> str:
    """The table of how many cells are ahead, level and behind, a row a model."""
    made = [CELLS, "|-|" + "-:|" * 10]
    for result in results:
        found = [line for line in judged(result) if "ratio" in line]
        low = counted(line for line in found if line["bits"] <= 3).values()
        apart = counted(found, "divergence_ratio", "divergence_half_width").values()
        below = f"{sum(line['ratio'] <= 1 for line in found)} of {len(found)}"
        numbers = [*counted(found).values(), below, *low, *apart]
        made.append(f"| `{result['model']}` | {' | '.join(map(str, numbers))} |")
    return "\n".join(made)


def accuracy(about: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """The section of one model."""
    protocol, base, found = result["protocol"], result["base"], judged(result)
    behind = lost(found)
    shares = [(line["plain"], f"{line['share']:.0%} at {line['bits']} bits in groups of {line['group']}")
              for line in found if "share" in line and line["bits"] < 8]
    after = ", ".join(f"{line['factors']:.0%} at {line['bits']} bits in groups of {line['group']}" for line in found
                      if line.get("plain") == "rtn-llmcompressor" and "factors" in line)
    share = "; ".join(f"{whose}: {', '.join(told for by, told in shares if by == plain)}" for plain, whose in (
        ("rtn-llmcompressor", "plain, as published tables have it (absmax / 7.5 at 4 bits)"),
        ("rtn-llmops", "ours, which errs less")) if any(by == plain for by, _ in shares))
    score = f", exact match {base['exact_match']:.1%} (in brackets below)" if "exact_match" in base else ""
    crops, apart = result["calibration"], divergence_table(result["rows"])
    return [f"## `{result['model']}`: {MODELS[result['model']]}", "",
            f"float32 perplexity {base['perplexity']:.5g} on {protocol['windows']} windows of {protocol['context']} "
            f"tokens{score}; calibrated on {crops['crops']} crops of {crops['length']} tokens; AutoRound "
            f"{result['iterations']} steps. {about['date']}, {about['cpus']}-core {about['cpu_model']} (a shared "
            f"virtual machine): `{about['command']}`."
            + (" *: ours of an earlier code (one-way grids of absmax / 7.5 at 4 bits; GPTQ of `tiny` damping 0.01), "
               "not measured again." if any(row.get("earlier") for row in result["rows"]) else ""), "",
            perplexity_table(result["rows"], base), "",
            *(["KL from the float32 model, nats a token:", "", apart, ""] if apart else []),
            f"Our GPTQ wins back of what rounding to nearest loses: {share or 'not measured'}."
            + (f" After AWQ's factors, of what plain rounding loses: {after}." if after else ""), "",
            *(["A peer's perplexity is lower:", "", *behind, ""] if behind else []), verdict_table(found), ""]


def published(found: dict[str, Any]) -> list[str]:
    """The section of the published table."""
    mine = {name: float(each["perplexity"]) for name, each in found["measured"].items()}
    rows = {f"{name}, published": dict(zip(mine, row, strict=True)) for name, row in found["published"].items()}
    _, said = verdict(mine, rows)
    return ["## A published table in its own protocol", "",
            "The table of the README of IST-DASLab/gptq (LLaMA, WikiText-2; act-order and true-sequential), and the "
            f"`text` model treated in the same way: windows of {found['protocol']['context']} tokens that do not "
            "overlap, no BOS, the remainder dropped, the loss of the 2,047 tokens that have a predecessor; asymmetric "
            f"grids a row or a group; {found['samples']} calibration crops of 2,048 tokens. Model, calibration text "
            "and test text are others, so no figure may be held against a published one; the order of the columns and "
            "the share of RTN's loss that GPTQ wins back may. `python benchmarks/bench_published_table.py --text "
            "FOLDER`", "", table({f"`text`, {found['protocol']['windows']} windows": mine, **rows}), "",
            *(f"- {each}" for each in said), f"- ours, from the least up: {', '.join(order(mine))}; won back: "
            + ", ".join(f"{bits} {share:.0%}" for bits, share in shares(mine).items()), ""]


def page(results: Path) -> str:
    """The whole page of what there is in the folder."""
    files = [json.loads((results / name).read_text(encoding="utf-8")) for name in ACCURACY
             if (results / name).is_file()]
    parts = [HEAD, "", counts([result for about in files for result in about["results"]]), ""]
    for about in files:
        for result in about["results"]:
            parts += accuracy(about, result)
    if (results / PUBLISHED).is_file():
        parts += published(json.loads((results / PUBLISHED).read_text(encoding="utf-8")))
    return "\n".join(parts).rstrip("\n") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    asked = parser.parse_args()
    made = page(RESULTS)
    if asked.check:
        sys.exit(0 if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == made else f"{PAGE} is not current")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
