"""One contender of bench_quantize.py, alive from cell to cell: `python _quantize_worker.py CONTENDER CASE_JSON`.

Messages are JSON lines: {"bits": ..., "group": ..., "out": folder, "case": what differs from CASE_JSON in its draw}
comes in on stdin; out on stdout, which nothing else may write to, goes {"ready": true} once and for every cell
{"seconds", "cpu_seconds", "peak_bytes"} or {"failed"}. The
model is loaded afresh for every cell, before the clock starts; peak_bytes is the most resident memory from there on
over what was resident when the clock started. The answer is written after the clock has stopped: `dense.safetensors`
with the weights that the tool's own dequantization gives, or, from GPTQModel, its checkpoint as it saves it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from _quantize_case import Case
from _runner.worker import Clock, Mouth, serve

CLOCK = Clock()
Dense = Callable[[Path], None]  # writes the answer into a folder
Solve = Callable[[Any, Case, int, int], Dense]  # (model, case, bits, group)


def load(case: Case) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()


def tokens(case: Case) -> Any:
    from safetensors.torch import load_file

    return load_file(case.calibration)["tokens"]


def tokenizer(case: Case) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(case.model)


def write(weights: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().float().contiguous().clone() for name, tensor in weights.items()},
              folder / "dense.safetensors")


def with_layers(model: Any, layers: dict[str, Any]) -> dict[str, Any]:
    """The state of the model's plain parameters, the weights of quantized layers by full name in their place."""
    import torch

    state = {name: value for name, value in model.named_parameters() if type(value.data) is torch.Tensor}
    return {**state, **{f"{name}.weight": value for name, value in layers.items()}}


# ---------------------------------------------------------------------------------------------------------- ours


def own_job(model: Any, case: Case, calibrated: bool) -> tuple[Any, Any]:
    """(the job of a step on the model, its calibration tokens or None).

    What it cuts from the rows is compared with what the others get, and given to the step ready: reading and tokenizing
    is on nobody's clock.
    """
    import torch

    from llmops.build.job import Job, calibration
    from llmops.data.options import DataSource
    from llmops.data.sources import load_rows

    source = DataSource(source=case.rows, samples=None)
    job = Job(model, tokenizer(case), model.dtype, [],
              lambda name: load_rows(name, {name: source}, Path(case.rows).parent, case.seed),
              lambda name: DataSource(source="memory", samples=case.samples), case.seed)
    ready = calibration(job, "calib", case.length) if calibrated else None
    if ready is not None and not torch.equal(ready, tokens(case)):
        raise ValueError("the calibration tokens differ from those the others get")
    return job, ready


def ours(step: dict[str, Any], *, distilled: bool = False) -> Solve:
    """The step as `llmops tune` takes it. distilled: and then `distill` as a child would, from the float model."""

    def solve(model: Any, case: Case, bits: int, group: int) -> Dense:
        from llmops.build import quantizing
        from llmops.build.variant import apply_step
        from llmops.methods.quantize import options

        asked = {**step, **scheme_of(step["method"], bits, group)}
        if "data" in step:
            asked["length"] = case.length
        if "autoround" in (step["method"], step.get("solver")):
            asked["iterations"] = case.iterations
        if step["method"] == "autoround":
            asked["batch_size"] = case.batch_size
        job, ready = own_job(model, case, "data" in step)
        teacher = load(case) if distilled else None
        quantizing.calibration = lambda *given: ready
        CLOCK.start()
        kind = getattr(options, step["method"].capitalize())
        work = apply_step("quantize", job, kind.model_validate(asked))
        if distilled:
            return distill(work, case, teacher)
        return lambda folder: write(dict(work.model.named_parameters()), folder)

    return solve


def scheme_of(method: str, bits: int, group: int) -> dict[str, Any]:
    """The scheme of a cell; of `auto`, which chooses layer by layer, as many bits as it takes with its scales of 16."""
    if method == "auto":
        return {"bits": bits + 16 / group, "group_size": [32, 64, 128, -1]}
    return {"scheme": f"w{bits}a16", "group_size": group}


def distill(work: Any, case: Case, teacher: Any) -> Dense:
    """Heal what a step has made on the very calibration tokens, towards the float model; bits and groups stay. Steps
    and rate were chosen on text that is not scored (LOG.md)."""
    from llmops.api import apply
    from llmops.models.packed import PackedLinear
    from llmops.models.quantized import pack

    words, crops = tokenizer(case), tokens(case)
    rows = [{"text": words.decode(crop)} for crop in crops]
    if [words(row["text"])["input_ids"] for row in rows] != crops.tolist():
        raise ValueError("the calibration tokens do not survive decoding: the distillation would see others")
    step = {"method": "logits", "teacher": "base", "data": "calib", "epochs": 4, "learning_rate": 2e-4,
            "batch_size": case.batch_size, "max_length": case.length}
    made = apply(pack(work.model, work.packed).eval(), words, {"distill": step}, {"calib": rows}, teacher=teacher,
                 seed=case.seed)
    state = {name: value for name, value in made.named_parameters() if value.is_floating_point()}
    layers = {f"{name}.weight": layer.dequantized() for name, layer in made.named_modules()
              if isinstance(layer, PackedLinear)}
    return lambda folder: write({**state, **layers}, folder)


# ---------------------------------------------------------------------------------------------------------- peers


def llmcompressor(method: str) -> Solve:
    """`oneshot` with its own modifiers. AWQ pins memory, which a build of torch without CUDA refuses: switched off."""

    def solve(model: Any, case: Case, bits: int, group: int) -> Dense:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        IntermediatesCache.pin_memory = lambda *given, **named: None
        observer = {"observer": "mse"} if method == "clip" else {}
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
        groups = {"config_groups": {"all": {"targets": ["Linear"], "weights": {**weights, **observer}}},
                  "ignore": ["lm_head"]}
        if method in ("rtn", "clip"):
            oneshot(model=model, recipe=[QuantizationModifier(**groups)])
        else:
            crops = tokens(case).tolist()
            data = Dataset.from_dict({"input_ids": crops, "attention_mask": [[1] * case.length] * len(crops)})
            recipe = [GPTQModifier(**groups)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**groups)]
            oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(crops),
                    max_seq_length=case.length, shuffle_calibration_samples=False)

        def dense(folder: Path) -> None:
            from compressed_tensors.quantization.lifecycle.forward import fake_quantize

            layers = {name: fake_quantize(module.weight, module.weight_scale, module.weight_zero_point,
                                          module.quantization_scheme.weights)
                      for name, module in model.named_modules() if getattr(module, "quantization_scheme", None)}
            write({name: value for name, value in with_layers(model, layers).items()
                   if not name.endswith(("_scale", "_zero_point", "_g_idx"))}, folder)

        return dense

    return solve


def torchao(model: Any, case: Case, bits: int, group: int) -> Dense:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(model.model, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group)))

    def dense(folder: Path) -> None:
        layers = {name: module.weight.dequantize() for name, module in model.named_modules()
                  if isinstance(module, torch.nn.Linear) and type(module.weight.data) is not torch.Tensor}
        write(with_layers(model, layers), folder)

    return dense


def hqq(model: Any, case: Case, bits: int, group: int) -> Dense:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    AutoHQQHFModel.quantize_model(model, quant_config=BaseQuantizeConfig(nbits=bits, group_size=group, axis=1),
                                  compute_dtype=torch.float32, device="cpu")

    def dense(folder: Path) -> None:
        layers = {name: module.dequantize() for name, module in model.named_modules() if isinstance(module, HQQLinear)}
        names = {f"{name}.{rest}" for name in layers for rest in ("W_q", "bias", "weight")}
        write({name: value for name, value in with_layers(model, layers).items()
               if name not in names or name.endswith(".weight")}, folder)

    return dense


def auto_round(model: Any, case: Case, bits: int, group: int) -> Dense:
    from auto_round import AutoRound

    crops = [crop.unsqueeze(0) for crop in tokens(case)]
    tuned = AutoRound(model, tokenizer=tokenizer(case), scheme=f"W{bits}A16", bits=bits, group_size=group, sym=True,
                      iters=case.iterations, nsamples=len(crops), seqlen=case.length, batch_size=case.batch_size,
                      dataset=crops, device_map="cpu", enable_torch_compile=False, seed=case.seed).quantize()[0]

    def dense(folder: Path) -> None:
        import torch

        names = {name for name, module in tuned.named_modules() if isinstance(module, torch.nn.Linear)}
        kept = {name: value for name, value in tuned.named_parameters()
                if name.rpartition(".")[0] not in names or name.endswith((".weight", ".bias"))}
        write(kept, folder)

    return dense


def gptqmodel(_: Any, case: Case, bits: int, group: int) -> Dense:
    """Loads by itself, which is not timed either; its checkpoint is read by the parent."""
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    model = GPTQModel.load(case.model, GPTQConfig(bits=bits, group_size=group, device="cpu"))
    crops = [{"input_ids": crop.unsqueeze(0), "attention_mask": (crop.unsqueeze(0) >= 0).long()}
             for crop in tokens(case)]
    CLOCK.start()
    model.quantize(crops, batch_size=1)
    CLOCK.stop()
    return lambda folder: model.save(str(folder))


SOLVERS: dict[str, Solve] = {
    "rtn-llmops": ours({"method": "rtn"}), "clip-llmops": ours({"method": "rtn", "clip": "mse"}),
    "hqq-llmops": ours({"method": "hqq"}), "gptq-llmops": ours({"method": "gptq", "data": "calib"}),
    "awq-llmops": ours({"method": "awq", "data": "calib"}),
    "autoround-llmops": ours({"method": "autoround", "data": "calib"}),
    "factors+gptq-llmops": ours({"method": "gptq", "data": "calib", "factors": "awq"}),
    "factors+autoround-llmops": ours({"method": "autoround", "data": "calib", "factors": "awq"}),
    "auto+autoround-llmops": ours({"method": "auto", "solver": "autoround", "data": "calib", "factors": "awq"}),
    "factors+autoround+distill-llmops": ours({"method": "autoround", "data": "calib", "factors": "awq"},
                                             distilled=True),
    "rtn-llmcompressor": llmcompressor("rtn"), "clip-llmcompressor": llmcompressor("clip"),
    "gptq-llmcompressor": llmcompressor("gptq"), "awq-llmcompressor": llmcompressor("awq"),
    "rtn-torchao": torchao, "hqq-hqq": hqq, "autoround-autoround": auto_round, "gptq-gptqmodel": gptqmodel}


#: Imported before the first cell, so that no contender's clock or memory counts its imports.
IMPORTS: dict[str, tuple[str, ...]] = {
    "llmops": ("llmops.build.variant", "llmops.data.sources", "scipy"), "torchao": ("torchao.quantization",),
    "llmcompressor": ("llmcompressor", "llmcompressor.modifiers.transform.awq", "datasets"),
    "hqq": ("hqq.models.hf.base",), "autoround": ("auto_round",), "gptqmodel": ("gptqmodel",)}


def main() -> None:
    contender, first = sys.argv[1], Case(**json.loads(sys.argv[2]))
    mouth = Mouth()
    import torch

    torch.set_num_threads(first.threads)

    def answer(cell: dict[str, Any]) -> dict[str, Any]:
        case = replace(first, **cell.get("case", {}))
        model = None if contender == "gptq-gptqmodel" else load(case)
        CLOCK.start()
        dense = SOLVERS[contender](model, case, cell["bits"], cell["group"])
        found = CLOCK.stop()
        dense(Path(cell["out"]))
        return found

    serve(mouth, ("transformers", "safetensors.torch", *IMPORTS[contender.partition("-")[2]]), answer)


if __name__ == "__main__":
    main()
