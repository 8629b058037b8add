"""Two models of bench_prune.py beside those of _quantize_models.py: inputs as uneven as a large model's.

Magnitude and Wanda rank weights alike where the inputs of a layer are of one size. Large models have *outlier
features*, a few channels far larger than the others (Dettmers et al. 2022, arXiv 2208.07339). A model of 3.7 M
parameters, briefly trained, grows none.

`given`          any causal language model: `--model`, a folder of transformers or one GGUF file, which is made dense.
`text-outliers`  the model `text` with outliers put in by hand: **constructed, not grown**. Gains of norms and rows of
                 `v_proj` and `up_proj` are multiplied by powers of two, the columns that read them divided by them.
                 What the model computes does not change by a bit; what the size of a weight says does.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _quantize_models import save
from llmops.block_stream import Stream
from llmops.models.arch import decoder_layers
from llmops.models.fold import Link, find_links, fold

SHARE = 0.02  # of the channels, and how many times larger they become: about as in SmolLM2-135M (docs/pruning.md)
FACTORS = (8.0, 16.0, 32.0)


def given_model(source: Path, cache: Path) -> Path:
    """The model that the user named, in float32, every weight rounded to bfloat16."""
    folder = cache / f"given-{source.stem}"
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, more = (source.parent, {"gguf_file": source.name}) if source.suffix == ".gguf" else (source, {})
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **more)
    tokenizer = AutoTokenizer.from_pretrained(where, **more)
    if more:  # a model that was read from packed weights remembers them, and is not written as a dense one
        config = copy.copy(model.config)
        del config.quantization_config
        dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        dense.load_state_dict(model.state_dict())
        model = dense.eval()
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    save(model, tokenizer, folder)
    return folder


def outlier_model(source: Path) -> Path:
    """The model of the folder `source` with outliers put in. Raises ValueError when a logit has changed."""
    folder = source.with_name(source.name + "-outliers")
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.randint(model.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        put_outliers(model, tokens)
        moved = float((model(tokens).logits - before).abs().max())
    if moved:
        raise ValueError(f"a logit moved by {moved:.3g}; expected the same function bit by bit")
    save(model, AutoTokenizer.from_pretrained(source), folder)
    return folder


def put_outliers(model: Any, tokens: Tensor, seed: int = 0) -> None:
    """Multiply what each layer of the blocks reads, channel by channel, and divide the columns that read it. In place.

    A share SHARE of the channels is multiplied, by FACTORS: of hidden features the same in every layer; where a linear
    layer feeds another, drawn anew in each.
    """
    path, blocks = decoder_layers(model)
    stream, draw = Stream(model, blocks, tokens, len(tokens), None), random.Random(seed)
    hidden = _drawn(model.config.hidden_size, draw)
    with torch.no_grad():
        for index, block in enumerate(blocks):
            for link in find_links(block, lambda at=index: stream.run(at, 0)):
                fold(block, link, 1 / (hidden if link.norm else _features(block, link, draw)))
            stream.advance(index, f"{path}.{index}")


def _features(block: Any, link: Link, draw: random.Random) -> Tensor:
    """(in,) factors of what a linear layer gives another; heads that share a value have one factor."""
    made = _drawn(block.get_submodule(link.source).out_features, draw)
    if link.repeat > 1:
        made = made.view(-1, 1, link.head).expand(-1, link.repeat, -1).reshape(-1)
    return made


def _drawn(count: int, draw: random.Random) -> Tensor:
    """(count,) FACTORS at a share SHARE of the places, elsewhere 1."""
    made = torch.ones(count)
    for place in draw.sample(range(count), round(SHARE * count)):
        made[place] = draw.choice(FACTORS)
    return made
