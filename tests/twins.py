"""Random-weight twins of real architectures, small enough to run every step on: `twin("qwen3") -> (model, tokenizer)`.

Every linear dimension is a multiple of 128. Together they cover: tied and untied embeddings; multi-head, grouped-
query and multi-query attention; biases everywhere, on q/k/v alone, and none; query/key norms; sliding and full
attention in turns; soft-capped logits; scaled embeddings.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

NAMES = ("llama", "llama-untied-bias", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")

#: Mixtures of experts: with and without a shared expert, four to choose two from, every layer or every second one.
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")

COMMON: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1, "initializer_range": 0.08,
}

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def config_of(name: str) -> Any:
    import transformers as t

    if name == "llama":
        return t.LlamaConfig(**COMMON, tie_word_embeddings=True)
    if name == "llama-untied-bias":
        return t.LlamaConfig(**COMMON | {"num_key_value_heads": 4}, tie_word_embeddings=False, attention_bias=True,
                             mlp_bias=True)
    if name == "qwen2":
        options = {key: value for key, value in COMMON.items() if key != "head_dim"}
        return t.Qwen2Config(**options | {"num_attention_heads": 2, "num_key_value_heads": 2}, tie_word_embeddings=True)
    if name == "qwen3":
        return t.Qwen3Config(**COMMON, tie_word_embeddings=True, max_window_layers=3)
    if name == "mistral":
        return t.MistralConfig(**COMMON, tie_word_embeddings=False, sliding_window=32)
    if name == "gemma2":
        return t.Gemma2Config(**COMMON, tie_word_embeddings=True, sliding_window=32, query_pre_attn_scalar=64)
    if name == "gemma3":
        return t.Gemma3TextConfig(**COMMON | {"num_key_value_heads": 1}, tie_word_embeddings=True, sliding_window=32,
        query_pre_attn_scalar=64,
                                  layer_types=["sliding_attention", "full_attention"] * 2)
    if name in MIXTURES:
        return _mixture(name)
    raise KeyError(f"no twin {name}; there are {NAMES}")


def _mixture(name: str) -> Any:
    import transformers as t

    options = {key: value for key, value in COMMON.items() if key != "head_dim"} | {
        "num_hidden_layers": 2, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    if name == "mixtral":
        return t.MixtralConfig(**options, num_local_experts=4)
    if name == "qwen2_moe":
        return t.Qwen2MoeConfig(**options, num_experts=4, moe_intermediate_size=128,
                                shared_expert_intermediate_size=128, mlp_only_layers=[0])
    if name == "qwen3_moe":
        return t.Qwen3MoeConfig(**options, num_experts=4, moe_intermediate_size=128, head_dim=64)
    return t.OlmoeConfig(**options | {"intermediate_size": 128}, num_experts=4)


def twin(name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Any, Any]:
    """A fresh model in eval mode (the same weights for the same seed), and its tokenizer."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype)
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms are made as ones and biases as zeros, which would hide a lost one
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            assert parameter.isfinite().all(), parameter_name
    return model.eval(), tokenizer()


@cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"])
    lines = [f"{a} {b} {c}." for a in ("The old", "A new", "Every") for b in ("river", "bridge", "garden", "clock")
             for c in ("runs north", "was built long ago", "stands near the sea", "counts to 1234567890")]
    made.train_from_iterator(lines, trainer)
    return str(made.to_str())


def tokenizer() -> Any:
    """A byte-level BPE of at most 512 tokens with a chat template that marks the assistant's turns."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_tokenizer_json()), pad_token="<|pad|>",
                                   eos_token="<|end|>")
    made.chat_template = TEMPLATE
    return made


def tokens(rows: int = 6, length: int = 48, seed: int = 1) -> torch.Tensor:
    """(rows, length) token ids without special ones."""
    return torch.randint(5, 512, (rows, length), generator=torch.Generator().manual_seed(seed))
