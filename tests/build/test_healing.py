"""Training a quantized parent: what is stored is what was trained, whatever its scheme, and zeros stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.runs import chat
from tests.twins import tokens, twin
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llmops.build import Job, apply_step
from llmops.build.job import Work
from llmops.data.options import DataSource
from llmops.data.sources import rows_from
from llmops.errors import LlmopsError, ModelError, StepError
from llmops.methods.quantize.rtn import rtn
from llmops.models.fake_quant import packed_layers
from llmops.models.load import load, merged
from llmops.models.quantized import load_quantized, save_quantized
from llmops.recipe.schema import STEPS
from llmops.train import Checkpoints

ROWS = [chat(f"Where does {name} live?", "town" if name < "d" else "lake") for name in "abcdefgh"]
WAYS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"}, "lora": {"method": "lora", "rank": 4, "rslora": True},
    "pissa": {"method": "lora", "rank": 4, "init": "pissa"}, "dora": {"method": "lora", "rank": 4, "dora": True},
    "distilled": {"method": "logits", "teacher": "t"}}
STEP = {"data": "rows", "max_steps": 3, "learning_rate": 5e-3, "warmup": 0.0, "packing": False}


def linears(model: Any) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"}


def mixed(name: str) -> dict[str, Any]:
    """A scheme for a layer: layers differ in bits, groups and zero points, those that servers fuse do not."""
    if "down_proj" in name:
        return {"bits": 3, "group_size": -1, "symmetric": True}
    return {"bits": 4, "group_size": 64, "symmetric": False} if "mlp" in name else {"bits": 2, "group_size": 32,
                                                                                   "symmetric": True}


def folder_of(place: Path, name: str = "llama", dtype: torch.dtype = torch.float32,
              masks: Mapping[str, Tensor] | None = None, ignore: tuple[str, ...] = ()) -> Path:
    model, tokenizer = twin(name, dtype)
    for key, mask in (masks or {}).items():
        model.get_submodule(key).weight.data *= mask
    weights = {key: rtn(layer.weight, **mixed(key)) for key, layer in linears(model).items()
               if not key.endswith(ignore or ("nothing",))}
    save_quantized(model, weights, place, tokenizer)
    return place


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("parent"))


def job(folder: Path, **more: Any) -> Job:
    model, tokenizer = load(folder, dtype="stored", device="cpu", kernel="reference")
    more = {"chain": ["quantize:rtn"], "teacher": lambda _: twin("llama", torch.float32)[0], **more}
    return Job(model, tokenizer, model.dtype, more.pop("chain"), lambda name: rows_from(name, [dict(r) for r in ROWS]),
               lambda name: DataSource(source="memory"), 0, base_source=str(folder), **more)


def take(folder: Path, way: str, changes: Mapping[str, Any] | None = None, **more: Any) -> Work:
    body = {**STEP, **WAYS.get(way, {"method": way}), **(changes or {})}
    kind = "distill" if body["method"] == "logits" else "finetune"
    return apply_step(kind, job(folder, **more), STEPS[kind][body["method"]].model_validate(body))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=tokens(2, 24)).logits


def parts(folder: Path) -> dict[str, dict[str, Tensor]]:
    model = load_quantized(folder, kernel="reference")
    return {name: layer.stored_tensors() for name, layer in packed_layers(model).items()}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_reloaded_is_what_was_trained(way: str, parent: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the folder, by us and by plain transformers, are those of the model that was fake-quantized."""
    from llmops.build import healing

    seen = {}

    def keep(model: Any, storage: torch.dtype) -> Any:
        seen["logits"] = logits(model)
        return harden(model, storage)

    harden = healing.harden
    monkeypatch.setattr(healing, "harden", keep)
    work = take(parent, way)
    work.save(tmp_path / "child")
    model = load_quantized(tmp_path / "child", kernel="reference")
    assert torch.equal(logits(model), seen["logits"])
    assert torch.equal(logits(work.model), seen["logits"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    assert torch.equal(logits(plain), seen["logits"])
    old, new = load_quantized(parent, kernel="reference"), packed_layers(model)
    schemes = {name: (layer.bits, layer.group_size, layer.weight_zero_point is None)
               for name, layer in packed_layers(old).items()}
    assert schemes == {name: (layer.bits, layer.group_size, layer.weight_zero_point is None)
                       for name, layer in new.items()} and len(set(schemes.values())) == 3
    assert float((seen["logits"] - logits(old)).abs().max()) > 0.01
    same = torch.equal(old.model.norm.weight, model.model.norm.weight)
    assert same == (way in ("lora", "pissa", "dora"))  # what is not quantized is trained by full and distill alone
    assert same == torch.equal(old.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_16_bit_parents_are_trained_in_32_and_stored_in_16(tmp_path: Path) -> None:
    parent = folder_of(tmp_path / "parent", "qwen2", torch.bfloat16)
    work = take(parent, "full")
    work.save(tmp_path / "child")
    read = load_quantized(tmp_path / "child", kernel="reference")
    assert read.dtype == torch.bfloat16 and torch.equal(logits(read), logits(work.model))
    biases = [layer.bias for layer in packed_layers(read).values() if layer.bias is not None]
    assert len(biases) == 12  # of q, k and v
    before = packed_layers(load_quantized(parent))
    assert not torch.equal(biases[0], before["model.layers.0.self_attn.q_proj"].bias)


@pytest.mark.parametrize("way", ["full", "lora", "dora"])
def test_a_rate_of_nothing_gives_the_parent_back(way: str, parent: Path) -> None:
    """Wherever in their cells the latent weights begin."""
    start = packed_layers(load_quantized(parent, kernel="reference"))
    for unrounded in (None, lambda: twin("llama", torch.float32)[0]):
        work = take(parent, way, {"learning_rate": 1e-12, "max_steps": 1}, unrounded=unrounded)
        for name, weight in work.packed.items():
            assert torch.equal(weight.dequantize(), start[name].dequantized()), name
        assert any("0.0% of their codes" in event for event in work.events)


def test_what_was_quantized_is_used_where_nothing_around_it_changed(parent: Path) -> None:
    before, other = twin("llama", torch.float32)[0], twin("llama", torch.float32)[0]
    other.model.norm.weight.data *= 2
    given = {"begin near those that were quantized": lambda: before, "is not there": lambda: None,
             "has other weights around it": lambda: other}
    found = {said: take(parent, "full", {"max_steps": 1}, unrounded=model) for said, model in given.items()}
    for said, work in found.items():
        assert any(said in event for event in work.events), (said, work.events)
    near, *drawn = (sum(int(weight.codes.sum()) for weight in work.packed.values()) for work in found.values())
    assert near != drawn[0] == drawn[1]


@pytest.mark.parametrize("way", ["full", "lora", "distilled"])
def test_taking_the_same_step_twice_gives_the_same_codes(way: str, parent: Path) -> None:
    first, second = take(parent, way), take(parent, way)
    for name, weight in first.packed.items():
        assert torch.equal(weight.codes, second.packed[name].codes)
        assert torch.equal(weight.scale, second.packed[name].scale)


@pytest.mark.parametrize("way", ["full", "lora"])
def test_killed_and_resumed_it_is_bitwise_the_same(way: str, parent: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def dies(step: int, figures: Mapping[str, float]) -> None:
        if step == 3:
            raise Killed

    quiet = take(parent, way)
    with pytest.raises(Killed):
        take(parent, way, checkpoints=Checkpoints(tmp_path / "work", every_steps=2), log=dies)
    again = take(parent, way, checkpoints=Checkpoints(tmp_path / "work", every_steps=2))
    assert any("went on from the checkpoint of step 2" in event for event in again.events)
    assert again.loss == quiet.loss
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, quiet.model.state_dict()[name]), name
    for name, weight in quiet.packed.items():
        assert torch.equal(weight.codes, again.packed[name].codes)


# -------------------------------------------------------------------------------------------------------- zeros


def drawn_masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(layer.weight.shape, generator=generator) > 0.5
            for name, layer in linears(twin("llama", torch.float32)[0]).items()}


@pytest.mark.parametrize("known", [True, False], ids=["pruned variant there", "pruned variant gone"])
@pytest.mark.parametrize("way", ["full", "lora"])
def test_zeros_of_a_pruned_ancestor_stay_and_others_may_move(way: str, known: bool, tmp_path: Path) -> None:
    masks = drawn_masks()
    parent = folder_of(tmp_path / "parent", masks=masks, ignore=("o_proj",))

    def before() -> Any:
        model = twin("llama", torch.float32)[0]
        for name, layer in linears(model).items():
            layer.weight.data *= masks[name]
        return model

    chain = ["prune:wanda", "quantize:rtn"]
    work = take(parent, way, chain=chain, unrounded=before if known else None)
    work.save(tmp_path / "child")
    model = load_quantized(tmp_path / "child", kernel="reference")
    woken = 0
    for name, layer in packed_layers(model).items():
        assert torch.all(layer.dequantized()[~masks[name]] == 0), name
        start = load_layer(parent, name)
        woken += int(((start == 0) & (layer.dequantized() != 0)).sum())
    for name, layer in linears(model).items():  # left in 16 bits
        assert name.endswith("o_proj") and torch.all(layer.weight[~masks[name]] == 0)
        assert not torch.equal(layer.weight, before().get_submodule(name).weight)
    assert (woken > 0) == known  # zeros that rounding made can be told from pruned ones, or must stay as well
    total = sum(int((~mask).sum()) for name, mask in masks.items() if not name.endswith("o_proj"))
    held = next(event for event in work.events if "pruned weights were held at zero" in event)
    assert (int(held.split()[0].replace(",", "")) == total) == known


def load_layer(folder: Path, name: str) -> Tensor:
    return packed_layers(load_quantized(folder, kernel="reference"))[name].dequantized()


def test_codes_that_lost_the_zeros_are_refused(parent: Path) -> None:

    def before() -> Any:
        model = twin("llama", torch.float32)[0]
        model.model.layers[1].mlp.up_proj.weight.data[0] = 0
        return model

    with pytest.raises(LlmopsError, match=r"layers\.1\.mlp\.up_proj has values where its pruned ancestor has zeros"):
        take(parent, "full", chain=["prune:wanda", "quantize:rtn"], unrounded=before)


# ------------------------------------------------------------------------------------------------- adapters apart


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # which is how transformers is told to unpack
@pytest.mark.parametrize("name", ["qwen3", "llama-untied-bias"])
def test_an_adapter_apart_leaves_the_base_alone_and_fits_it_everywhere(name: str, tmp_path: Path) -> None:
    parent = folder_of(tmp_path / "parent", name)
    before, start = parts(parent), logits(load_quantized(parent, kernel="reference"))
    work = take(parent, "lora", {"merge": False, "dropout": 0.1})
    layers = {key.removeprefix("base_model.model.").removesuffix(".base_layer"): layer
              for key, layer in packed_layers(work.model).items()}
    for key, layer in layers.items():
        assert all(torch.equal(value, before[key][part]) for part, value in layer.stored_tensors().items())
    trained = {key for key, value in work.model.named_parameters() if value.requires_grad}
    assert trained and all(".lora_" in key for key in trained)
    work.save(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    wanted = logits(work.model)
    assert float((wanted - start).abs().max()) > 0.01
    ours, _ = load(tmp_path / "adapter", dtype="float32", device="cpu", kernel="reference")
    assert torch.equal(logits(ours), wanted)
    base = AutoModelForCausalLM.from_pretrained(parent, quantization_config=CompressedTensorsConfig(dequantize=True))
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-4)
    model = merged(ours)
    assert not packed_layers(model) and not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_apart_learns_what_one_on_the_written_out_base_learns(parent: Path) -> None:
    """The gradient through the packed layers is that of dense ones."""
    packed = take(parent, "lora", {"merge": False})
    model, tokenizer = twin("llama", torch.float32)
    for key, layer in packed_layers(load_quantized(parent, kernel="reference")).items():
        model.get_submodule(key).weight.data = layer.dequantized()
    body = STEPS["finetune"]["lora"].model_validate({**STEP, **WAYS["lora"], "merge": False})
    given = job(parent)
    dense = apply_step("finetune", Job(model, tokenizer, model.dtype, [], given.rows, given.limits, 0), body)
    assert [loss for _, loss in packed.loss] == pytest.approx([loss for _, loss in dense.loss], rel=1e-5)
    theirs = dense.model.state_dict()
    for key, ours in packed.model.state_dict().items():
        if ".lora_" in key:
            torch.testing.assert_close(ours, theirs[key], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("changes", "more", "said"), [
    ({"method": "lora", "dora": True, "merge": False}, {}, "dora: true rescales the rows"),
    ({"method": "lora", "init": "loftq"}, {}, "this one is rounded already"),
    ({"method": "lora", "dropout": 0.1}, {}, "use dropout: 0, or merge: false"),
    ({"method": "lora", "init": "pissa", "merge": False}, {}, "use init: default, or merge: true"),
    ({"method": "lora", "merge": False}, {"chain": ["prune:wanda", "quantize:rtn"]}, "fills the zeros"),
    ({"method": "qlora"}, {}, "finetune qlora was given a quantized model; expected one in 16 bit"),
    ({"method": "dpo", "dropout": 0.1}, {}, "dropout: 0.1 on adapters that are rounded with their weight"),
    ({"method": "lora", "targets": ["lm_head"]}, {}, "name no quantized layer"),
    ({"method": "full", "learning_rate": 1.0, "max_grad_norm": 1e30, "max_steps": 8, "weight_decay": 1.0,
      "schedule": "constant", "optimizer": "sgd"}, {"scale": 1e30}, "became (nan|inf)")])
def test_what_cannot_be_trained_is_refused_with_a_way_out(changes: dict[str, Any], more: dict[str, Any], said: str,
                                                          tmp_path: Path) -> None:
    parent = folder_of(tmp_path / "parent", "mistral")
    scale = more.pop("scale", None)
    body = {**STEP, **changes}
    given = job(parent, **more)
    if scale is not None:
        given.model.model.norm.weight.data *= scale
    with pytest.raises(StepError, match=said):
        apply_step("finetune", given, STEPS["finetune"][body["method"]].model_validate(body))


def test_a_format_that_is_not_known_is_named(parent: Path) -> None:
    class Float8Linear(nn.Module):
        def packed_tensors(self) -> dict[str, Tensor]:
            return {}

    for merge in (True, False):
        given = job(parent)
        given.model.model.layers[0].mlp.up_proj = Float8Linear()
        body = STEPS["finetune"]["lora"].model_validate({**STEP, "method": "lora", "merge": merge, "packing": False})
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj is a Float8Linear; expected integer weights"):
            apply_step("finetune", given, body)
