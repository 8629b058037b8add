"""The 4-bit base: what it holds, that it can be made again, and that another base is refused."""

import json

import pytest
import torch
from tests.twins import NAMES, tokens, twin

from llmops.errors import ModelError
from llmops.methods.finetune.lora import add_lora
from llmops.models import nf4
from llmops.models.kernel_tiles import tiles_used
from llmops.models.load import load, merged
from llmops.models.parity import count_parameters, sparsity
from llmops.models.save import save_adapter

CPU = torch.device("cpu")
NF4 = {"quant": "nf4", "double_quant": True, "compute": torch.float32, "device": CPU}


def trained(model, **options):
    """Adapters as a training might leave them."""
    adapted = add_lora(model, rank=4, alpha=8, **options)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return adapted.eval()


def logits(model):
    with torch.inference_mode():
        return model(input_ids=tokens(2, 24)).logits


def nf4_by_hand(weight: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Each weight to the nearest of 16 levels, in blocks of 64, scaled by the largest magnitude of the block."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / largest).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[nearest] * largest).reshape(weight.shape)


def test_rounding_is_that_of_the_paper():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([  # Dettmers et al. 2023, appendix E
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
    kept = nf4.round_trip(weight, "nf4", False)
    torch.testing.assert_close(kept, nf4_by_hand(weight, levels), rtol=0, atol=1e-6)
    error = {(quant, double): float((nf4.round_trip(weight, quant, double) - weight).norm())
             for quant in ("nf4", "fp4") for double in (True, False)}
    assert error["nf4", False] < error["nf4", True] < 1.02 * error["nf4", False] < error["fp4", False]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_runs_on_a_4_bit_base_and_is_written_out_as_it_ran(name):
    model, _ = twin(name)
    parameters = count_parameters(model)
    plain = twin(name)[0].float()
    base = nf4.quantize_base(model, **NF4)
    assert base.layers == 28 and count_parameters(model) == parameters and sparsity(model) == (0, 0)
    for layer in nf4.four_bit_layers(model).values():
        assert layer.packed_tensors()["codes"].numel() * 2 == layer.in_features * layer.out_features
    adapted = trained(model, dora=name == "qwen3")
    wanted = logits(adapted)
    filled = nf4.fill(twin(name)[0].float(), adapted, keep_base=False)
    torch.testing.assert_close(logits(filled), wanted, rtol=1e-4, atol=1e-4)
    onto = nf4.fill(plain, adapted, keep_base=True)
    assert float((logits(onto) - wanted).abs().mean()) > 1e-3  # the base that the adapters did not see
    out = merged(adapted)
    assert not nf4.four_bit_layers(out)
    torch.testing.assert_close(logits(out), wanted, rtol=1e-4, atol=1e-4)


def test_codes_and_fingerprint_follow_from_the_weights_alone():
    first, second, other = twin("llama")[0], twin("llama")[0], twin("llama", seed=1)[0]
    bases = [nf4.quantize_base(model, **NF4) for model in (first, second, other)]
    assert bases[0] == bases[1] and bases[0].sha256 != bases[2].sha256
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(first.get_submodule(name).weight.data, second.get_submodule(name).weight.data)
    nudged = twin("llama")[0]
    with torch.no_grad():
        nudged.model.layers[3].mlp.down_proj.weight[7, 9] += 0.01
    assert nf4.fingerprint(nudged) != bases[0].sha256


@pytest.fixture
def saved(tmp_path):
    """(folder of an adapter, folder of its base, the logits it should give)."""
    model, tokenizer = twin("llama-untied-bias")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = nf4.quantize_base(model, **NF4)
    adapted = trained(model)
    save_adapter(adapted, tokenizer, tmp_path / "adapter", base=str(tmp_path / "base"))
    nf4.record(tmp_path / "adapter", nf4.Base(**{**vars(base), "source": "a-model", "revision": "v1"}), {})
    return tmp_path / "adapter", tmp_path / "base", logits(adapted)


def test_an_adapter_apart_is_loaded_on_its_4_bit_base(saved):
    folder, _, wanted = saved
    model, _ = load(folder, dtype="float32", device="cpu")
    assert len(nf4.four_bit_layers(model)) == 28
    assert torch.equal(logits(model), wanted)


def test_another_base_is_refused(saved):
    folder, base, _ = saved
    other, tokenizer = twin("llama-untied-bias", seed=5)
    other.save_pretrained(base)
    with pytest.raises(ModelError, match=r"given a base with weights [0-9a-f]{16} .* the nf4 base of a-model@v1"):
        load(folder, dtype="float32", device="cpu")


def test_a_record_that_cannot_be_read_says_so(saved):
    folder, _, _ = saved
    body = json.loads((folder / nf4.RECORD).read_text())
    for wrong in ("{", json.dumps(body | {"format": 2}), json.dumps(body | {"more": 1}), json.dumps({"format": 1})):
        (folder / nf4.RECORD).write_text(wrong)
        with pytest.raises(ModelError, match=r"base\.json: cannot be read .* copy the whole folder again"):
            load(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("double", [False, True])
def test_the_op_of_the_kernels_reads_the_codes_as_they_are(double: bool) -> None:
    made = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 192, generator=made), torch.randn(48, generator=made)
    layer = nf4.Linear4bit(weight, bias, "nf4", double, torch.float32)
    x = torch.randn(2, 3, 192, generator=made).bfloat16()
    own, before = layer(x).double(), layer.kernel
    layer.asked = "ops"
    found, exact = layer(x).double(), x.double() @ nf4.dequantized(layer).double().T + bias.double()
    assert before.startswith("bitsandbytes:") and layer.kernel == "ops (nf4 codes as bitsandbytes stores them)"
    assert float((found - exact).norm() / exact.norm()) < 4e-3 and float((found - own).norm() / own.norm()) < 1e-2
    assert next(iter(tiles_used(torch.nn.ModuleList([layer])))) == "nf4_linear N=48,K=192,kind=nf4,block=64"
    trained = x.float().requires_grad_(True)
    layer(trained).sum().backward()  # bitsandbytes' own way: the op has no derivative
    assert trained.grad is not None
