"""What every contender of bench_tune.py is given: the model, the rows and which of them make an optimizer step.

A step is K packs of at most `pack_length` tokens, filled by best-fit decreasing, made here once. Packed contenders run
the packs as they are, padded ones lay out the same rows one by one, so that the loss of a step is the same number for
all. Row lengths are log-normal, as those of chats are; the first part of a row is the prompt and has no loss. Token
ids are random: speed and memory do not depend on them.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

IGNORED = -100
PAD = 0

LLAMA: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "pad_token_id": PAD, "bos_token_id": None,
                         "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
#: Sizes of the random models; builtin:tiny brings its own.
SHAPES: dict[str, dict[str, Any]] = {
    "twin60m": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
                "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 2048,
                "tie_word_embeddings": False},
    "twin8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
               "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
               "tie_word_embeddings": False},
    "twin8b-dry": {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2,
                   "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 8192,
                   "tie_word_embeddings": False}}


@dataclass(frozen=True)
class Case:
    """All that a worker needs to know. longest: tokens of the longest row. packs: how many make a step."""

    model: str
    steps: int
    packs: int = 4
    pack_length: int = 512
    shortest: int = 20
    longest: int = 400
    median: int = 90
    spread: float = 0.8
    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 2e-4
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Row = dict[str, list[int]]


def make_row(draw: random.Random, case: Case, vocabulary: int) -> Row:
    """One prompt without loss and one completion with loss."""
    length = round(math.exp(draw.gauss(math.log(case.median), case.spread)))
    length = min(case.longest, max(case.shortest, length))
    prompt = max(1, min(length - 2, round(length * draw.uniform(0.15, 0.6))))
    ids = [draw.randrange(2, vocabulary) for _ in range(length)]
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows to packs by best-fit decreasing: the longest first, each into the fullest pack that still has room."""
    packs: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = [pack for pack in range(len(packs)) if room[pack] >= lengths[row]]
        if fitting:
            best = min(fitting, key=lambda pack: room[pack])
            packs[best].append(row)
            room[best] -= lengths[row]
        else:
            packs.append([row])
            room.append(capacity - lengths[row])
    return packs


def make_packs(case: Case, vocabulary: int) -> list[list[Row]]:
    """The packs of all steps in the order in which they are trained; steps x packs of them, each a list of rows."""
    draw = random.Random(case.seed)
    wanted = case.steps * case.packs
    rows: list[Row] = []
    tokens = 0
    while tokens < 1.1 * (wanted + 1) * case.pack_length:
        rows.append(make_row(draw, case, vocabulary))
        tokens += len(rows[-1]["input_ids"])
    packs = best_fit([len(row["input_ids"]) for row in rows], case.pack_length)
    draw.shuffle(packs)
    return [[rows[index] for index in pack] for pack in packs[:wanted]]


def tokens_of(pack: list[Row]) -> int:
    return sum(len(row["input_ids"]) for row in pack)


def trained_tokens_of(pack: list[Row]) -> int:
    """Labels that count: a row's first one does not, nothing predicts it."""
    return sum(label != IGNORED for row in pack for label in row["labels"][1:])


def padded_tokens_of(packs: list[list[Row]]) -> int:
    """Tokens of the step as a padded batch: rows times the longest."""
    lengths = [len(row["input_ids"]) for pack in packs for row in pack]
    return max(lengths) * len(lengths)


def vocabulary_of(model: str) -> int:
    return int(SHAPES[model]["vocab_size"]) if model in SHAPES else 1536


def load_model(case: Case, attention: str = "sdpa") -> Any:
    """The same weights for the same case, on its device and in its type."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = getattr(torch, case.dtype)
    if case.model not in SHAPES:
        from llmops.models.builtin import locate

        model = AutoModelForCausalLM.from_pretrained(locate(case.model), dtype=dtype, attn_implementation=attention)
        assert model.config.vocab_size == vocabulary_of(case.model)
        return model.to(case.device)
    torch.manual_seed(case.seed)
    with torch.device(case.device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, **SHAPES[case.model]), dtype=dtype,
                                                attn_implementation=attention)
