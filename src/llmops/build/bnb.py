"""The step that stores linear layers as bitsandbytes does: `quantize: {method: rtn, scheme: nf4}` or `llm_int8`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from llmops import calibrate
from llmops.build.job import Job, Work, bar
from llmops.errors import StepError
from llmops.methods.finetune.peft_library import hush_bitsandbytes
from llmops.methods.quantize.options import Rtn
from llmops.models import parity
from llmops.models.expert_names import expert_of

__all__ = ["bitsandbytes_step"]


def bitsandbytes_step(job: Job, options: Rtn) -> Work:
    """Raises StepError for a mixture of experts, and where bitsandbytes is not installed."""
    hush_bitsandbytes()
    try:
        from llmops.models.bnb import config_block, quantized_layer, save_bitsandbytes
    except ImportError as error:
        raise StepError(f"scheme {options.scheme} needs bitsandbytes ({error}); pip install bitsandbytes, or scheme: "
                        "w4a16 or w8a16, which need nothing") from error
    model, bits = job.model, options.bits
    experts = next((name for name, _ in model.named_modules() if expert_of(f"{name}.") is not None), None)
    if experts is not None:
        raise StepError(f"{experts}: scheme {options.scheme} of a mixture of experts, whose experts transformers keeps "
                        "fused and bitsandbytes does not see; expected scheme: w4a16 or w8a16, which packs each")
    made: dict[str, nn.Module] = {}

    def update(name: str, layer: nn.Linear, _: Tensor | None) -> None:
        made[name] = quantized_layer(layer, options.scheme, double_quant=options.double_quant,
                                     threshold=options.outliers)
        layer.weight.data = torch.empty(0, dtype=layer.weight.dtype)  # one layer at a time lies here twice

    calibrate.walk(model, None, "none", update, ignore=options.ignore, progress=bar(job))
    for name, layer in made.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    dense = sorted(name for name, module in model.named_modules() if type(module) is nn.Linear)
    block = config_block(options.scheme, dtype=job.storage, dense=dense, double_quant=options.double_quant,
                         threshold=options.outliers)
    told = (f"{len(made)} linear layers in NF4, blocks of 64" + (", their scales in 8 bits" if options.double_quant
                                                                else "") if bits == 4 else
            f"{len(made)} linear layers in LLM.int8, features beyond {options.outliers:g} multiplied in 16 bit")
    odd = sum(layer.in_features % 64 != 0 for layer in made.values()) if bits == 4 else 0
    events = [f"{odd} of them have rows that are no multiple of a block: llmops multiplies them right everywhere, but "
              "bitsandbytes alone (0.50.2, and so plain transformers) misreads them on a CPU with AVX512; scheme: "
              "w4a16 has a group_size that divides them"] if odd else []
    return Work(model, partial(save_bitsandbytes, model, block=block, tokenizer=job.tokenizer),
                parity.Expected(bits=dict.fromkeys(made, bits)), events=[told, *events])
