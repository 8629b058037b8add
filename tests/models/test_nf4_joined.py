"""NF4 layers below each other: the same weights, in the same memory, and a served model that writes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.test_serving import GENERATE, logits
from tests.twins import tokens, twin
from torch import nn

from llmops.measure.memory import weights_bytes
from llmops.models import nf4
from llmops.models.joined import Part, join, joined
from llmops.models.kernel_tiles import tiles_used
from llmops.models.nf4_joined import JoinedNF4
from llmops.models.parity import count_parameters, sparsity
from llmops.models.serving import serve, serving
from llmops.models.zeros import linear_weights


def four_bit(name: str, double: bool, kernel: str = "ops", dtype: torch.dtype = torch.bfloat16) -> Any:
    model, _ = twin(name, dtype)
    nf4.quantize_base(model, quant="nf4", double_quant=double, compute=dtype, device=torch.device("cpu"))
    for layer in nf4.four_bit_layers(model).values():
        layer.asked = kernel
    return model.eval()


def layer(rows: int, columns: int = 128, seed: int = 0, double: bool = True, bias: bool = False) -> Any:
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=made) * (1 + seed)
    found = nf4.Linear4bit(weight, torch.randn(rows, generator=made) if bias else None, "nf4", double, torch.bfloat16)
    found.asked = "ops"
    return found


@pytest.mark.parametrize("double", [False, True])
def test_a_joined_layer_holds_the_weights_of_its_layers_and_gives_their_products(double: bool) -> None:
    layers = [layer(rows, seed=seed, double=double, bias=True) for seed, rows in enumerate((128, 256, 70))]
    whole = joined(layers)
    assert isinstance(whole, JoinedNF4)
    assert torch.equal(whole.dequantized(), torch.cat([nf4.dequantized(each) for each in layers]))
    held = sum(tensor.nbytes for each in layers for tensor in each.packed_tensors().values())
    more = 256 * 4 + 4 * whole.out_features if double else 0  # the table, and an offset a row
    assert sum(tensor.nbytes for tensor in whole.packed_tensors().values()) == held + more
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(9)).bfloat16()
    wanted = torch.cat([each(x) for each in layers], -1).float()
    assert whole(x).dtype == x.dtype and float((whole(x).float() - wanted).norm() / wanted.norm()) < 1e-3
    assert torch.equal(whole(x), whole(x)) and whole(x[:0]).shape == (0, 3, 454)


@torch.no_grad()
@pytest.mark.parametrize(("name", "double"), [("qwen2", False), ("llama", True)])
def test_a_served_model_of_nf4_layers_is_joined_and_writes_the_same(name: str, double: bool) -> None:
    model = four_bit(name, double, dtype=torch.float32)  # products round to bfloat16, nothing else does
    counts, bytes_ = (sparsity(model), count_parameters(model)), weights_bytes(model).value
    before = torch.cat([weight.flatten() for _, weight in linear_weights(model)])
    wanted = logits(model)
    written = model.generate(tokens(2, 20), **GENERATE).sequences
    served = serve(model)
    assert serving(served).joined == 8 and isinstance(served.model.layers[0].mlp.up_proj, Part)
    assert (sparsity(served), count_parameters(served)) == counts
    after = torch.cat([weight.flatten() for _, weight in linear_weights(served)])
    assert torch.equal(after.sort().values, before.sort().values)  # each weight once, none made anew
    more = 4 * (1024 * 4 + 2 * 256 * 4) if double else 0  # an offset for each of 1024 rows a block, the table twice
    assert weights_bytes(served).value == bytes_ + more
    assert {module.kernel for module in served.modules() if hasattr(module, "packed_tensors")} == {
        "ops (nf4 codes as bitsandbytes stores them)"}
    assert sum(entry["layers"] for entry in tiles_used(served).values()) == 4 * 4  # qkv, o, gate-up, down
    found = logits(served)
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3
    assert torch.equal(served.generate(tokens(2, 20), **GENERATE).sequences, written)


def test_what_does_not_fit_together_is_not_joined() -> None:
    assert joined([layer(128), layer(64)]) is not None
    assert joined([layer(64), layer(128)]) is None  # half a block of scales
    assert joined([layer(64, double=False), layer(128, double=False)]) is not None
    assert joined([layer(128), layer(128, double=False)]) is None
    assert joined([layer(128), layer(128, bias=True)]) is None and joined([layer(128), nn.Linear(128, 4)]) is None
    few = four_bit("gemma3", True)  # 64 rows of k: half a block
    assert join(few) == 4 and not isinstance(few.model.layers[0].self_attn.q_proj, Part)
    own = layer(128)
    own.asked = "torch"
    assert joined([own, own]) is None and join(four_bit("llama", False, "torch")) == 0


def test_a_joined_layer_compiles_whole() -> None:
    whole = joined([layer(128), layer(256, seed=1)])
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(torch.compile(whole, fullgraph=True, backend="aot_eager")(x), whole(x))
