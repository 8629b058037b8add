"""Chunked log-probabilities are those of full logits, to the last gradient, and never hold the full logits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.twins import NAMES, twin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    CohereConfig,
    FalconH1Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    MiniCPM3Config,
    NanoChatConfig,
    PhiConfig,
)

from llmops.data.render import collate
from llmops.errors import LlmopsError
from llmops.methods.finetune.lora import add_lora
from llmops.models import token_loss
from llmops.models.packed_rows import pack, row_of, use_packed_attention
from llmops.models.token_loss import (
    can_split,
    head_of,
    last_hidden,
    next_token_loss,
    pair_log_probs,
    sum_log_probs,
    token_log_probs,
)

IGNORED = -100
LENGTHS = (48, 7, 1, 33, 40)
SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
                         "initializer_range": 0.3}


def examples(trained: float = 0.4, vocabulary: int = 512) -> list[dict[str, list[int]]]:
    drawn = random.Random(0)
    rows = [[drawn.randrange(5, vocabulary) for _ in range(length)] for length in LENGTHS]
    return [{"input_ids": row, "labels": [token if drawn.random() < trained else IGNORED for token in row]}
            for row in rows]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return collate(rows, pad_id=0)


def full_loss(model: Any, rows: list[dict[str, list[int]]]) -> Tensor:
    """Full float32 logits and torch's cross entropy."""
    batch = padded(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), batch["labels"][:, 1:].reshape(-1),
                           ignore_index=IGNORED, reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter in training, zeros where none came; and a clean slate."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
             for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def assert_same(given: dict[str, Tensor], wanted: dict[str, Tensor], allowed: float = 1e-5) -> None:
    assert given.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        assert (given[name] - grad).abs().max() <= allowed * max(1.0, float(grad.abs().max()), largest / 100), name


def trained_by(model: nn.Module, what: str) -> Any:
    if what == "everything":
        return model.requires_grad_(True)
    if what == "adapters and the head":
        model.requires_grad_(False)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zeros, which would hide the gradient of A
                nn.init.normal_(parameter, std=0.1)
        return adapted
    return add_lora(model, rank=4, alpha=8)


@pytest.mark.parametrize("what", ["everything", "adapters", "adapters and the head"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's note on an adapter on a tied head
def test_the_loss_is_that_of_full_logits(name, layout, what):
    model, _ = twin(name, torch.float32)
    model.set_attn_implementation("eager")  # the packed attention applies gemma2's soft cap, as eager does
    model = trained_by(model, what)
    rows = examples()
    wanted = full_loss(model, rows)
    wanted.backward()
    reference = gradients(model)
    with use_packed_attention(model) if layout == "packed" else nullcontext():
        batch = pack(rows) if layout == "packed" else padded(rows)
        assert can_split(model, batch) is True
        given = next_token_loss(model, batch, chunk=7)
        given.backward()
    assert given.dtype == torch.float32 and given.shape == ()
    assert given.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert_same(gradients(model), reference)
    assert any(grad.abs().max() > 1e-3 for grad in reference.values())


@pytest.mark.parametrize("what", ["everything", "adapters"])
@pytest.mark.parametrize("count", [0, 1])
def test_no_trained_token_and_one(count, what):
    model = trained_by(twin("qwen3", torch.float32)[0], what)
    rows = examples(trained=0.0)
    rows[3]["labels"][5:5 + count] = rows[3]["input_ids"][5:5 + count]
    wanted = full_loss(model, rows)
    wanted.backward()
    reference = gradients(model)
    given = next_token_loss(model, padded(rows))
    given.backward()
    assert given.item() == pytest.approx(wanted.item(), rel=1e-5) and (given.item() == 0) == (count == 0)
    assert_same(gradients(model), reference)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_the_sum_is_that_of_the_log_probs(chunk, trained):
    torch.manual_seed(0)
    hidden, targets = torch.randn(23, 16, requires_grad=True), torch.randint(97, (23,))
    matrix = nn.Linear(16, 97).requires_grad_(trained)
    over = [hidden, *([matrix.weight, matrix.bias] if trained else [])]
    named = list(matrix.parameters())
    wanted = token_log_probs(hidden, targets, matrix, parameters=named).sum()
    reference = torch.autograd.grad(wanted * 3, over)
    given = sum_log_probs(hidden, targets, matrix, chunk=chunk, parameters=named)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(given * 3, over, retain_graph=True), reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(LlmopsError, match="second derivative"):
        torch.autograd.grad(given, hidden, create_graph=True)
    if trained:
        with pytest.raises(LlmopsError, match="does not name"):
            sum_log_probs(hidden, targets, matrix, parameters=[matrix.bias])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_log_probs_of_any_head(chunk, trained):
    torch.manual_seed(0)
    hidden, targets = torch.randn(23, 16, requires_grad=True), torch.randint(97, (23,))
    matrix = nn.Linear(16, 97).requires_grad_(trained)
    weights = torch.randn(23)

    def head(h: Tensor) -> Tensor:
        return torch.tanh(matrix(h) / 3) * 3

    wanted = torch.log_softmax(head(hidden), -1)[torch.arange(23), targets]
    over = [hidden, *([matrix.weight, matrix.bias] if trained else [])]
    reference = torch.autograd.grad((wanted * weights).sum(), over)
    given = token_log_probs(hidden, targets, head, chunk=chunk, parameters=list(matrix.parameters()))
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((given * weights).sum(), over), reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(token_log_probs(hidden, targets, head, chunk=chunk), given)


def test_what_would_be_lost_is_refused():
    hidden, targets, matrix = torch.randn(5, 16, requires_grad=True), torch.randint(97, (5,)), nn.Linear(16, 97)
    with pytest.raises(LlmopsError, match=r"shape \(97.* does not name"):
        token_log_probs(hidden, targets, matrix)
    matrix.requires_grad_(False)
    with pytest.raises(LlmopsError, match="second derivative"):
        torch.autograd.grad(token_log_probs(hidden, targets, matrix).sum(), hidden, create_graph=True)


@pytest.mark.parametrize("what", ["everything", "adapters"])
def test_autocast_computes_in_bfloat16_and_sums_in_float32(what):
    """The autocast is inside the wrapper's forward, where training libraries put it, and over when the head runs."""
    model = trained_by(twin("llama", torch.float32)[0], what)
    rows = examples()
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(*args, **kwargs)

    model.forward = forward
    wanted = full_loss(model, rows)
    wanted.backward()
    reference = gradients(model)
    given = next_token_loss(model, padded(rows), chunk=7)
    given.backward()
    assert given.dtype == torch.float32 and given.item() == pytest.approx(wanted.item(), rel=1e-4)
    found = gradients(model)
    for name, grad in reference.items():
        assert (found[name] - grad).norm() <= 0.02 * grad.norm(), name
    model.forward = plain
    assert full_loss(model, rows).item() != pytest.approx(wanted.item(), rel=1e-6)  # bfloat16 did make a difference


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_pair_log_probs_sum_by_row(name, layout):
    model = trained_by(twin(name, torch.float32)[0], "adapters")
    rows = examples()
    with torch.no_grad():
        wanted = torch.stack([-full_loss(model, [row]) for row in rows])
    batch = pack(rows) if layout == "packed" else padded(rows)
    owner = row_of(batch) if layout == "packed" else torch.arange(len(rows))[:, None].expand(batch["labels"].shape)
    with use_packed_attention(model) if layout == "packed" else nullcontext():
        given = pair_log_probs(model, batch, owner, chunk=7)
        (given[0] - given[3]).backward()
    torch.testing.assert_close(given.detach(), wanted, rtol=1e-5, atol=1e-4)
    assert given[2] == 0  # a row of one token has nothing to predict
    found = gradients(model)
    (full_loss(model, [rows[3]]) - full_loss(model, [rows[0]])).backward()
    assert_same(found, gradients(model))


# ---- facts


FAMILIES = {
    "cohere": (CohereConfig, {"logit_scale": 0.3}), "granite": (GraniteConfig, {"logits_scaling": 3.0}),
    "hyperclovax": (HyperCLOVAXConfig, {"logits_scaling": 3.0}), "phi": (PhiConfig, {}),
    "nanochat": (NanoChatConfig, {"final_logit_softcapping": 2.0}),
    "minicpm3": (MiniCPM3Config, {"dim_model_base": 8, "num_key_value_heads": 4, "q_lora_rank": 16, "v_head_dim": 8,
                                  "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}),
    "falcon_h1": (FalconH1Config, {"lm_head_multiplier": 3.0, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                                   "mamba_d_state": 8}),
}


def family(name: str) -> Any:
    config, options = FAMILIES[name]
    torch.manual_seed(0)
    return Auto.from_config(config(**SMALL | options)).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_and_caps_of_other_families(name):
    model = family(name)
    rows = examples(vocabulary=64)
    assert can_split(model, padded(rows)) is True
    assert next_token_loss(model, padded(rows)).item() == pytest.approx(full_loss(model, rows).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["cohere", "granite", "nanochat", "falcon_h1"])
def test_a_fact_that_is_not_known_is_noticed(name, monkeypatch):
    monkeypatch.setattr(token_loss, "FACTS", {})
    assert "is not known here" in str(can_split(family(name), padded(examples(vocabulary=64))))


def test_a_model_that_does_not_come_apart_says_why(monkeypatch):
    model, _ = twin("llama", torch.float32)
    model.train()
    monkeypatch.setattr(model, "get_decoder", lambda: nn.Identity())
    assert "was not called" in str(can_split(model, padded(examples())))
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert "does not come apart" in str(can_split(model, padded(examples())))
    assert model.training


@pytest.mark.parametrize("name", NAMES)
def test_right_padding_needs_no_mask_for_the_tokens_before_it(name):
    model, _ = twin(name, torch.float32)
    batch = padded(examples())
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        masked = last_hidden(model, batch)
        bare = last_hidden(model, {"input_ids": batch["input_ids"]})
    assert masked.shape == (*kept.shape, 128)
    torch.testing.assert_close(masked[kept], bare[kept], rtol=1e-5, atol=2e-5)


# ---- memory, by structure


class Largest(TorchDispatchMode):
    """The most rows of V numbers that any tensor holds that an operation makes; weights and their gradients apart."""

    def __init__(self, vocabulary: int, weight: tuple[int, ...]) -> None:
        super().__init__()
        self.vocabulary, self.weight, self.rows = vocabulary, set(weight), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            shape = set(tensor.shape) if isinstance(tensor, Tensor) else set()
            if self.vocabulary in shape and shape - {1} != self.weight:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return made


@contextmanager
def largest(model: Any) -> Iterator[Largest]:
    weight = tuple(model.get_output_embeddings().weight.shape)
    with Largest(weight[0], weight) as found:
        yield found


@pytest.mark.parametrize("what", ["everything", "adapters"])
def test_no_tensor_holds_more_than_a_chunk_of_logits(what):
    model = trained_by(twin("llama", torch.float32)[0], what)
    rows = examples(trained=0.9)
    with use_packed_attention(model), largest(model) as found:
        next_token_loss(model, pack(rows), chunk=16).backward()
    assert found.rows == 16
    with largest(model) as found:  # the counter does see full logits
        full_loss(model, rows).backward()
    assert found.rows >= (max(LENGTHS) - 1) * len(LENGTHS)


def test_chunks_stay_under_64_megabytes():
    head = nn.Linear(2, 200_000, bias=False).requires_grad_(False)
    hidden = torch.randn(200, 2, requires_grad=True)
    with Largest(200_000, (200_000, 2)) as found:
        token_log_probs(hidden, torch.zeros(200, dtype=torch.long), head).sum().backward()
    assert found.rows == (64 << 20) // (4 * 200_000)


def test_heads_are_values():
    model, _ = twin("gemma2", torch.float32)
    head = head_of(model)
    assert head == head_of(add_lora(model, rank=4, alpha=8)) and head.trained() == []
    assert [value for _, value in head.steps] == [30.0]
