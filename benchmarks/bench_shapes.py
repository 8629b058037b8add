"""Pruned in width and in depth, beside the whole model: `python benchmarks/bench_shapes.py`.

    python benchmarks/bench_shapes.py                        of recipes/prune.yaml: 0.7x by width, half of the layers,
                                                             both healed; built where `--runs` has them not (4 minutes)
    python benchmarks/bench_shapes.py --model FOLDER         the same shapes of another model, not healed
    python benchmarks/bench_shapes.py --folders WHOLE PRUNED...         variants of any run

Every folder is opened by plain `transformers`, in one type, and all of them decode the same prompts in turns, one
thread, every second turn backwards. A line is a pruned model and a piece of work:

    parameters   over those of the whole; and again without embeddings and head, as the blocks alone have them
    FLOPs        of that very work over the whole's, counted operation by operation by torch
    time, CPU    median over the whole's, by the clock on the wall and by the process's own, which a machine that does
                 other things changes less; with 95 % bootstrap intervals of the ratios over the turns
    over ...     CPU time over the share of the parameters, of the blocks' alone, of the FLOPs: 1 is in proportion

A model of few, small layers spends much of a decoded token outside of its matrices, which cutting width makes no
cheaper; a larger one shows what is left of that. 2 minutes, and 15 for 135 M parameters.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from _runner.machine import about, said
from _runner.results import Results, free, parser
from _runner.tables import table
from _runner.turns import in_turn, median_ratio, shown
from llmops.measure.workload import Runner, make_prompts

ROOT = Path(__file__).parents[1]
WHOLE, PRUNED = "tuned", ("narrow-healed", "shallow-healed")
#: piece of work -> (prompts together, tokens of each, tokens decoded after them: 1 is the prefill alone)
WORK = {"prefill, 1 x 128 tokens": (1, 128, 1), "prefill, 16 x 64 tokens": (16, 64, 1),
        "decode, 1 row": (1, 64, 32), "decode, 8 rows": (8, 64, 32)}
CLOCKS = ("wall", "cpu")
SHARES = ("all", "blocks", "flops")
TITLES = ("pruned", "parameters", "of the blocks", "work", "FLOPs", "time", "CPU time", "times as fast",
          "CPU over parameters", "over the blocks'", "over FLOPs")


# -------------------------------------------------------------------------------------------------------------- models


def healed(runs: Path) -> list[Path]:
    """Folders of the whole and the pruned variants of recipes/prune.yaml, with what they stand on."""
    import yaml

    recipe = yaml.safe_load((ROOT / "recipes" / "prune.yaml").read_text(encoding="utf-8"))
    variants, wanted = recipe["variants"], [WHOLE, *PRUNED]
    for name in wanted:  # grows by the parents
        parent = variants[name].get("from", "base")
        wanted += [parent] if parent not in (*wanted, "base") else []
    kept = {name: step for name, step in variants.items() if name in wanted}
    body = {**recipe, "name": "shapes", "variants": kept, "evaluate": recipe["evaluate"][:1]}
    return built({key: value for key, value in body.items() if key not in ("goals", "measure")}, runs, [WHOLE, *PRUNED])


def cut(model: str, runs: Path, length: int, multiple: int) -> list[Path]:
    """Another model and its two cuts: 0.7x by width, half of its layers."""
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers
    calib = {"data": "calib", "length": length}
    return built({"version": 1, "name": "shapes-given", "model": model,
                  "data": {"calib": {"source": "builtin:study", "samples": 16}},
                  "variants": {"narrow": {"prune": {"method": "width", "parameters": 0.7, "multiple": multiple,
                                                    **calib}, "score": False},
                               "half": {"prune": {"method": "depth", "layers": max(1, layers // 2)}, "score": False}}},
                 runs, ["base", "narrow", "half"])


def built(recipe: Mapping[str, Any], runs: Path, wanted: Sequence[str]) -> list[Path]:
    """Raises SystemExit when a step failed."""
    import llmops

    result = llmops.run(dict(recipe), runs=runs)
    if result.failed:
        raise SystemExit(f"not built: {', '.join(result.failed)}; see {result.folder / 'log.txt'}")
    return [Path(recipe["model"]) if name == "base" else result.folder / name for name in wanted]


def opened(folder: Path, dtype: torch.dtype) -> Any:
    """By plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def score(folder: Path) -> dict[str, Any]:
    """{name, value, ci95} of the first score that the run of a variant's folder has for it, {} where there is none."""
    file = folder.parent / "result.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    mine = next((row for row in rows if row["identity"]["variant"] == folder.name), {"quality": {}})
    return next(({"name": name, "value": found["value"]["value"], "ci95": found["value"]["ci95"]}
                 for name, found in mine["quality"].items()), {})


# ------------------------------------------------------------------------------------------------------------- figures


def parameters(model: Any) -> dict[str, int]:
    """All of them, shared ones once; and those of neither embedding nor head."""
    outside = {id(parameter) for module in (model.get_input_embeddings(), model.get_output_embeddings())
               if module is not None for parameter in module.parameters()}
    sizes = [(id(parameter) in outside, parameter.numel()) for parameter in model.parameters()]
    return {"all": sum(size for _, size in sizes), "blocks": sum(size for out, size in sizes if not out)}


@torch.inference_mode()
def flops(model: Any, prompts: Tensor, new: int) -> int:
    """Of what is timed: the prefill, or the decoding after it; every matrix product is counted, with attention's two
    written out, since torch has no count of the CPU's fused one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    runner = Runner(model)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as prefill:
            token, cache = runner.prefill(prompts, new)
        with FlopCounterMode(display=False) as decode:
            for _ in range(new - 1):
                token, cache = runner.step(token, cache)
    return int((prefill if new == 1 else decode).get_total_flops())


@torch.inference_mode()
def times(models: Mapping[str, Any], prompts: Tensor, new: int, turns: int) -> dict[str, dict[str, list[float]]]:
    """Clock ("wall", "cpu") -> model -> seconds of each turn, a first turn that warms up left out."""
    runners = {name: Runner(model) for name, model in models.items()}
    found: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in models} for clock in CLOCKS}
    for turn, name in in_turn(list(models), turns + 1):
        began = now()
        token, cache = runners[name].prefill(prompts, new)
        if new > 1:
            began = now()
        for _ in range(new - 1):
            token, cache = runners[name].step(token, cache)
        for clock, start, end in zip(CLOCKS, began, now(), strict=True):
            found[clock][name] += [end - start] if turn else []
    return found


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measured(models: Mapping[str, Any], tokenizer: Any, turns: int, keep: Callable[[list[dict[str, Any]]], None],
             work: Mapping[str, tuple[int, int, int]] = WORK) -> list[dict[str, Any]]:
    """A line a pruned model and piece of work, the first of the models being the whole."""
    whole, *pruned = models
    sizes = {name: parameters(model) for name, model in models.items()}
    lines: list[dict[str, Any]] = []
    for what, (rows, length, new) in work.items():
        prompts = make_prompts(list(models.values()), tokenizer, rows, length, seed=0)
        counted = {name: flops(model, prompts, new) for name, model in models.items()}
        taken = times(models, prompts, new, turns)
        for name in pruned:
            wall, cpu = (taken[clock] for clock in CLOCKS)
            lines.append({"pruned": name, "work": what, "whole_s": median(wall[whole]), "s": median(wall[name]),
                          **{f"{key}_share": sizes[name][key] / sizes[whole][key] for key in ("all", "blocks")},
                          "flops_share": counted[name] / counted[whole], "time": median_ratio(wall[name], wall[whole]),
                          "cpu": median_ratio(cpu[name], cpu[whole]),
                          "faster": median_ratio(wall[whole], wall[name])})
        keep(lines)
    return lines


def cells(line: Mapping[str, Any]) -> list[str]:
    return [line["pruned"], f"{line['all_share']:.3f}", f"{line['blocks_share']:.3f}", line["work"],
            f"{line['flops_share']:.3f}", shown(line["time"], 3), shown(line["cpu"], 3),
            shown(line["faster"]), *(f"{line['cpu']['ratio'] / line[f'{key}_share']:.2f}" for key in SHARES)]


def scores(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The accuracy of those that were scored, in a line."""
    told = [f"{name} {each['value']:.1%} [{', '.join(f'{100 * end:.1f}' for end in each['ci95'])}]"
            for name, each in found.items() if each]
    return f"{next(each['name'] for each in found.values() if each)}: {', '.join(told)}" if told else ""


def folders(asked: argparse.Namespace, runs: Path) -> list[Path]:
    if asked.folders:
        return list(asked.folders)
    return healed(runs) if asked.model is None else cut(asked.model, runs, asked.length, asked.multiple)


def main() -> None:
    options = parser(__doc__, "benchmarks/results/shapes-DATE.json, or the next free shapes-DATE-N.json")
    options.add_argument("--folders", nargs="+", type=Path, help="the whole model and those that were cut from it")
    options.add_argument("--model", help="folder or hub id of another model to cut")
    options.add_argument("--length", type=int, default=128, help="with --model: tokens of a crop, of 16 it is cut by")
    options.add_argument("--multiple", type=int, default=32, help="with --model: what sizes are multiples of")
    options.add_argument("--runs", type=Path, help="where what is built lies (default: nowhere, it goes afterwards)")
    options.add_argument("--turns", type=int, default=40)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    asked = options.parse_args()
    if asked.folders and len(asked.folders) < 2:
        options.error("--folders takes the whole model and at least one that was cut from it")
    from transformers import AutoTokenizer

    torch.set_num_threads(asked.threads)
    record = about(asked, ("torch", "transformers"), threads=asked.threads)
    print(said(record), flush=True)
    passing = Path(tempfile.mkdtemp()) if asked.runs is None else None
    try:
        places = folders(asked, asked.runs or passing)
        models = {place.name: opened(place, getattr(torch, asked.dtype)) for place in places}
        accuracy = {place.name: score(place) for place in places}
        file = Results(asked.out or free(f"shapes-{record['date']}"), {
            **record, "dtype": asked.dtype, "turns": asked.turns, "whole": places[0].name, "scores": accuracy,
            "configs": {name: shape(model) for name, model in models.items()}})
        lines = measured(models, AutoTokenizer.from_pretrained(places[0]), asked.turns,
                         lambda lines: file.keep(lines=lines))
    finally:
        if passing is not None:
            shutil.rmtree(passing, ignore_errors=True)
    print(f"\nbeside {places[0].name}, {asked.dtype}, {asked.turns} turns. {scores(accuracy)}\n")
    print(table(TITLES, map(cells, sorted(lines, key=lambda line: places_of(line, models))), "lrrlrrrrrrr"))
    file.end(lines=lines)


def places_of(line: Mapping[str, Any], models: Mapping[str, Any]) -> int:
    return list(models).index(line["pruned"])


def shape(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config()
    return {key: getattr(config, key, None) for key in ("num_hidden_layers", "hidden_size", "intermediate_size",
                                                        "num_attention_heads", "num_key_value_heads", "vocab_size")}


if __name__ == "__main__":
    main()
