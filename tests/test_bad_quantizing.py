"""What cannot be quantized, each with a message that says what was given, what was expected, and where."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import workplace
from tests.test_quantizing import METHODS, job
from tests.twins import COMMON, tokenizer, tokens, twin
from torch import nn

import llmops
from llmops.build.variant import apply_step
from llmops.data.options import DataSource
from llmops.errors import LlmopsError, ModelError, StepError
from llmops.methods.finetune.lora import add_lora
from llmops.methods.prune.options import Magnitude
from llmops.methods.quantize.options import Auto, Rtn
from llmops.models.quantized import load_quantized, pack


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("method", METHODS)
def test_groups_that_do_not_come_out_even_are_told_with_the_layer(place: Path, method: str) -> None:
    options = METHODS[method].model_copy(update={"group_size": 48})
    with pytest.raises(LlmopsError, match=r"model\.layers\.0\.self_attn\.q_proj: group_size 48 does not divide the 128 "
                                          r"input features.*a divisor such as"):
        apply_step("quantize", job(place), options)


@pytest.mark.parametrize("method", METHODS)
def test_narrow_layers_work_with_groups_that_fit_and_are_named_where_none_does(place: Path, method: str,
                                                                               tmp_path: Path) -> None:
    import transformers as t

    narrow = t.LlamaConfig(**COMMON | {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
                                       "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 2})
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(narrow, dtype=torch.float32)
    options = METHODS[method].model_copy(update={"group_size": 32})
    with pytest.raises(LlmopsError, match=r"q_proj: group_size 32 does not divide the 16 input features"):
        apply_step("quantize", job(place, model=copy.deepcopy(model)), options)
    work = apply_step("quantize", job(place, model=model), options.model_copy(update={"group_size": 8}))
    work.save(tmp_path)
    read = load_quantized(tmp_path)
    with torch.no_grad():
        assert torch.allclose(read(tokens(2, 16)).logits, work.model(tokens(2, 16)).logits, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq", "autoround", "auto"])
def test_groups_are_held_against_every_layer_before_anything_is_run(place: Path, method: str,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer that does not fit is the last of its block."""
    import transformers as t

    config = t.LlamaConfig(**COMMON | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1})
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    monkeypatch.setattr("llmops.calibrate.Stream", None)
    options = Auto(method="auto", data="calib", length=32, bits=3.5, group_size=[32, 64]) if method == "auto" else \
        METHODS[method].model_copy(update={"group_size": 64})
    with pytest.raises(LlmopsError, match=r"layers\.0\.mlp\.down_proj: group_size 64 does not divide the 96"):
        apply_step("quantize", job(place, model=model), options)


@pytest.mark.parametrize("method", ["gptq", "awq", "autoround"])
def test_less_data_than_asked_for_is_told(place: Path, method: str) -> None:
    short = job(place)
    short.limits = lambda key: DataSource(source="train.jsonl", samples=200)
    work = apply_step("quantize", short, METHODS[method].model_copy(update={"group_size": 32, "iterations": 1}
                                                                    if method == "autoround" else {}))
    told = [event for event in work.events if "fewer than the 200 crops of 32 asked for: " in event]
    assert len(told) == 1 and told[0].startswith("calib has ")
    enough = job(place)
    enough.limits = lambda key: DataSource(source="train.jsonl", samples=2)
    assert not any("asked for" in event for event in apply_step("quantize", enough, METHODS["gptq"]).events)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_is_named(place: Path, value: float) -> None:
    model, _ = twin("llama")
    model.model.embed_tokens.weight.data[7, 3] = value
    with pytest.raises(StepError, match=r"model\.embed_tokens: the weight holds NaN or infinity"):
        apply_step("quantize", job(place, model=model), METHODS["rtn"].model_copy(update={"embeddings": True}))


@pytest.mark.parametrize("first", [{"method": "rtn", "scheme": "w4a16", "group_size": 32},
                                   {"method": "rtn", "scheme": "w4a16", "group_size": 32, "embeddings": True},
                                   {"method": "rtn", "scheme": "nf4"}])
def test_quantizing_what_is_quantized_already(place: Path, first: dict[str, Any]) -> None:
    model, made = twin("llama")
    model = llmops.apply(model, made, {"quantize": first})
    for options in (METHODS["rtn"], METHODS["gptq"]):
        with pytest.raises(LlmopsError, match="is quantized already; expected a model in 16 or 32 bit to quantize"):
            apply_step("quantize", job(place, model=model), options)


@pytest.mark.parametrize(("first", "layer"), [
    ({"method": "rtn", "scheme": "w4a16", "group_size": 32, "embeddings": True}, "a PackedEmbedding"),
    ({"method": "rtn", "scheme": "nf4"}, "a Linear4bit")])
def test_pruning_what_is_quantized_in_another_way_than_integers_of_linear_layers(place: Path, first: dict[str, Any],
                                                                                 layer: str) -> None:
    model, made = twin("llama")
    model = llmops.apply(model, made, {"quantize": first})
    with pytest.raises(LlmopsError, match=f"is {layer}; expected integer weights of linear layers alone"):
        apply_step("prune", job(place, model=model), Magnitude(method="magnitude"))


def test_an_adapter_that_is_not_merged_is_refused_and_one_given_to_apply_is_merged(place: Path) -> None:
    adapted = add_lora(twin("llama")[0], rank=2, alpha=4)
    with pytest.raises(LlmopsError, match="carries an adapter apart; expected a plain model to quantize: merge it"):
        apply_step("quantize", job(place, model=adapted), METHODS["rtn"])
    made = llmops.apply(adapted, tokenizer(), {"quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32}})
    assert not any("lora" in name for name, _ in made.named_modules())


class Strange(nn.Module):  # type: ignore[misc]
    """A decoder of nobody's family: other names, biases, layers under `trunk`; `flat` hides them from a list."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.config = twin("llama")[0].config.__class__(**COMMON | {"num_hidden_layers": 2})
        self.table = nn.Embedding(512, 128)
        blocks = [Mixer() for _ in range(2)]
        self.trunk = nn.Sequential(*blocks) if flat else nn.ModuleList(blocks)
        self.out = nn.Linear(128, 512, bias=False)

    dtype, device = torch.float32, torch.device("cpu")

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        x = self.table(input_ids)
        for block in self.trunk:
            x = block(x)
        return type("Out", (), {"logits": self.out(x)})()


class Mixer(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(torch.tanh(self.widen(x)))


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_architecture_is_walked_by_what_it_is(place: Path, method: str) -> None:
    torch.manual_seed(0)
    model = Strange()
    work = apply_step("quantize", job(place, model=model), METHODS[method])
    assert work.packed.keys() == {f"trunk.{index}.{name}" for index in range(2) for name in ("widen", "narrow")}
    with torch.no_grad():
        expected = model(tokens(1, 8)).logits
        assert torch.allclose(pack(model, work.packed, "reference")(tokens(1, 8)).logits, expected, atol=1e-5)


def test_an_architecture_without_a_list_of_layers_says_what_is_missing(place: Path) -> None:
    with pytest.raises(ModelError, match=r"no list of 2 decoder layers in Strange; expected one nn\.ModuleList as long "
                                         r"as num_hidden_layers.*models/arch\.py, decoder_layers"):
        apply_step("quantize", job(place, model=Strange(flat=True)), METHODS["rtn"])


def test_groups_are_those_of_the_options() -> None:
    assert Rtn(method="rtn", scheme="nf4").group == 64 and Rtn(method="rtn", scheme="llm_int8").group == -1
