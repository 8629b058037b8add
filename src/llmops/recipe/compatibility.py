"""Which step may follow which parent, asked of the validator itself: `llmops schema --compatibility`.

For every step, method and option that changes what is allowed, and for every kind of parent, a tiny recipe goes through
the real parser; what it says is what stands in the table. So the table cannot be wrong about the code, only the code
about the world. `docs/compatibility.md` holds the output, and a test keeps it current.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llmops.errors import RecipeError
from llmops.options import Options
from llmops.recipe.read import parse_recipe
from llmops.recipe.schema import STEPS

__all__ = ["PARENTS", "children", "compatibility", "verdict"]

_TUNED: dict[str, Any] = {"method": "lora", "data": "train"}
_QUANTIZED: dict[str, Any] = {"quantize": {"method": "rtn", "scheme": "w8a16", "group_size": 32}}
#: Kind of parent -> the variants that lead to it, the last being the parent; none for base.
PARENTS: dict[str, tuple[dict[str, Any], ...]] = {
    "base": (),
    "merged fine-tuning": ({"finetune": _TUNED},),
    "adapter apart": ({"finetune": {**_TUNED, "merge": False}},),
    "4-bit adapter apart": ({"finetune": {"method": "qlora", "data": "train", "merge": "apart"}},),
    "pruned": ({"prune": {"method": "magnitude", "sparsity": 0.5}},),
    "pruned 2:4": ({"prune": {"method": "magnitude", "pattern": "2:4"}},),
    "half depth": ({"prune": {"method": "depth", "layers": 3}},),
    "narrow": ({"prune": {"method": "width", "data": "train", "intermediate": 512}},),
    "quantized": (_QUANTIZED,),
    "quantized, healed": (_QUANTIZED, {"finetune": {"method": "full", "data": "train"}}),
    "pruned, quantized": ({"prune": {"method": "magnitude", "sparsity": 0.5}}, _QUANTIZED),
    "adapter on quantized": (_QUANTIZED, {"finetune": {**_TUNED, "merge": False}}),
    "quantized cache": ({"quantize": {"method": "kv_cache", "dtype": "int8"}},),
}
#: Values for the options that a method requires.
_REQUIRED: dict[str, Any] = {"data": "train", "teacher": "teacher", "scheme": "w4a16"}
_GROUPS = {"group_size": 32}  # divides every layer of builtin:tiny
#: (step, method) -> options that change what is allowed or what is done, each with its paper.
_OPTIONS: dict[tuple[str, str], tuple[tuple[dict[str, Any], str], ...]] = {
    ("finetune", "lora"): (
        ({}, "Hu et al. 2021, arXiv 2106.09685"), ({"rslora": True}, "Kalajdzievski 2023, arXiv 2312.03732"),
        ({"dora": True}, "Liu et al. 2024, arXiv 2402.09353"),
        ({"init": "pissa"}, "Meng et al. 2024, arXiv 2404.02948"),
        ({"init": "loftq"}, "Li et al. 2023, arXiv 2310.08659"),
        ({"lora_plus_ratio": 16.0}, "Hayou et al. 2024, arXiv 2402.12354"), ({"merge": False}, ""),
        ({"optimizer": "adamw_8bit"}, "Dettmers et al. 2021, arXiv 2110.02861"),
        ({"neftune_alpha": 5.0}, "Jain et al. 2023, arXiv 2310.05914")),
    ("finetune", "qlora"): (
        ({}, "Dettmers et al. 2023, arXiv 2305.14314"), ({"merge": "original"}, ""), ({"merge": "apart"}, ""),
        ({"rslora": True}, "Kalajdzievski 2023, arXiv 2312.03732"),
        ({"dora": True}, "Liu et al. 2024, arXiv 2402.09353"),
        ({"init": "pissa"}, "Meng et al. 2024, arXiv 2404.02948"),
        ({"init": "loftq"}, "Li et al. 2023, arXiv 2310.08659")),
    ("finetune", "dpo"): (({}, "Rafailov et al. 2023, arXiv 2305.18290"), ({"merge": False}, ""), ({"rank": None}, "")),
    ("prune", "magnitude"): (({"sparsity": 0.5}, "Han et al. 2015, arXiv 1506.02626"),
                             ({"pattern": "2:4"}, "Mishra et al. 2021, arXiv 2104.08378")),
    ("prune", "wanda"): (({"sparsity": 0.5}, "Sun et al. 2023, arXiv 2306.11695"), ({"pattern": "2:4"}, "")),
    ("prune", "sparsegpt"): (({"sparsity": 0.5}, "Frantar and Alistarh 2023, arXiv 2301.00774"),
                             ({"pattern": "2:4"}, ""),
                             ({"ratios": "owl", "sparsity": 0.5}, "Yin et al. 2023, arXiv 2310.05175")),
    ("prune", "depth"): (({"layers": 2}, "Men et al. 2024, arXiv 2403.03853"),),
    ("prune", "width"): (({"parameters": 0.7}, "Muralidharan et al. 2024, arXiv 2407.14679"),),
    ("quantize", "rtn"): (({"scheme": "w8a16", **_GROUPS}, ""), ({"scheme": "w4a16", **_GROUPS}, ""),
                          ({"scheme": "w4a16", "rotate": "hadamard", **_GROUPS},
                           "Ashkboos et al. 2024, arXiv 2404.00456"),
                          ({"scheme": "w8a8"}, ""), ({"scheme": "fp8"}, "Micikevicius et al. 2022, arXiv 2209.05433"),
                          ({"scheme": "mxfp4"}, "Rouhani et al. 2023, arXiv 2310.10537"), ({"scheme": "nvfp4"}, "")),
    ("quantize", "gptq"): (({"scheme": "w4a16", **_GROUPS}, "Frantar et al. 2022, arXiv 2210.17323"),
                           ({"scheme": "w4a16", "rotate": "hadamard", **_GROUPS}, ""),
                           ({"scheme": "w4a16", "factors": "awq", **_GROUPS}, "")),
    ("quantize", "awq"): (({"scheme": "w4a16", **_GROUPS}, "Lin et al. 2023, arXiv 2306.00978"),),
    ("quantize", "hqq"): (({"scheme": "w4a16", **_GROUPS}, "Badri and Shaji 2023"),),
    ("quantize", "autoround"): (({"scheme": "w4a16", **_GROUPS}, "Cheng et al. 2023, arXiv 2309.05516"),
                                ({"scheme": "w4a16", "factors": "awq", **_GROUPS}, "")),
    ("quantize", "auto"): (({"bits": 3.5, **_GROUPS}, "Yao et al. 2021, arXiv 2011.10680"),
                           ({"bits": 3.5, "rotate": "hadamard", **_GROUPS}, "")),
    ("quantize", "smoothquant"): (({"scheme": "w8a16", **_GROUPS}, "Xiao et al. 2022, arXiv 2211.10438"),),
    ("quantize", "kv_cache"): (({"dtype": "int8"}, ""), ({"dtype": "fp8"}, ""), ({"dtype": "int4"}, "")),
    ("distill", "logits"): (
        ({}, "Hinton et al. 2015, arXiv 1503.02531"), ({"loss": "reverse_kl"}, "Gu et al. 2023, arXiv 2306.08543"),
        ({"loss": "jensen_shannon"}, "Agarwal et al. 2024, arXiv 2306.13649"),
        ({"loss": "skewed_kl"}, "Ko et al. 2024, arXiv 2402.03898"),
        ({"hidden_weight": 1.0}, "Jiao et al. 2019, arXiv 1909.10351"),
        ({"attention_weight": 1.0}, "Wang et al. 2020, arXiv 2002.10957"), ({"offline": {}}, ""),
        ({"on_policy": {}}, "Agarwal et al. 2024, arXiv 2306.13649"),
        ({"student": {"config": {"num_hidden_layers": 2}}}, "")),
}


def children() -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """(step, method, options beside the required ones, paper) of every line of the table."""
    for step, methods in STEPS.items():
        for method in methods:
            for options, paper in _OPTIONS.get((step, method), (({}, ""),)):
                yield step, method, options, paper


def verdict(parent: str, step: str, method: str, options: dict[str, Any]) -> str | None:
    """None where the validator lets the step follow such a parent, else what it says (without the place)."""
    variants: dict[str, Any] = {"teacher": {"finetune": {"method": "full", "data": "train"}}}
    last = "base"
    for number, body in enumerate(PARENTS[parent]):
        name = f"parent-{number}"
        variants[name], last = {"from": last, **body}, name
    required = {name: _REQUIRED[name] for name, info in _model(step, method).model_fields.items()
                if info.is_required() and name in _REQUIRED}
    variants["child"] = {"from": last, step: {"method": method, **required, **options}}
    try:
        parse_recipe({"version": 1, "name": "table", "model": "builtin:tiny",
                      "data": {"train": {"source": "builtin:facts"}}, "variants": variants})
    except RecipeError as error:
        said = re.sub(r"^.*?variants\.child\.[A-Za-z_.]+: ", "", error.problems[0])
        steps = len(PARENTS[parent])
        for number in range(steps):
            said = said.replace(f'"parent-{number}"', "the parent" if number == steps - 1 else "an ancestor")
        return said.replace('"base"', "the parent of it" if steps == 1 else "an ancestor")
    return None


def compatibility() -> str:
    """The page: one table a step, methods by parents, and what each refusal says."""
    notes: dict[str, int] = {}
    lines = ["# What may follow what", "",
             "Written by `llmops schema --compatibility`, which asks the validator itself: each cell is a small recipe "
             "that was read. `ok`, or the number of the reason below.", ""]
    for step in STEPS:
        lines += [f"## `{step}`", "", f"| method | {' | '.join(PARENTS)} | paper |",
                  f"|-|{'-|' * len(PARENTS)}-|"]
        for kind, method, options, paper in children():
            if kind == step:
                said = [verdict(parent, step, method, options) for parent in PARENTS]
                cells = ["ok" if reason is None else f"no ({notes.setdefault(reason, len(notes) + 1)})"
                         for reason in said]
                lines.append(f"| {_label(method, options)} | {' | '.join(cells)} | {paper} |")
        lines.append("")
    lines += ["## Reasons", "", *(f"{number}. {reason}" for reason, number in notes.items()), "",
              "A parent whose adapters were left apart is merged in memory before the step, one on a 4-bit or a "
              "quantized base into that base written out in 16 bits. What is trained on a quantized parent and not "
              "left apart is stored in its bits.", ""]
    return "\n".join(lines)


def _label(method: str, options: dict[str, Any]) -> str:
    words = {None: "null", True: "true", False: "false"}
    shown = [f"{name}: {words[value] if value is None or isinstance(value, bool) else value}"
             for name, value in options.items()]
    return ", ".join([f"`{method}`", *(f"`{text}`" for text in shown)])


def _model(step: str, method: str) -> type[Options]:
    return STEPS[step][method]
