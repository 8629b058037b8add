"""Pretrain ``builtin:tiny``, the small language model that ships with the package.

    python -m llmops.pretrain --out src/llmops/models/tiny

**The idea.**  Compression methods can only be told apart on a model that has something to lose.  A model that was
trained too briefly on too much text loses nothing at 4 bits, because it knew nothing at 16.  So this model is
trained the other way round: a small invented world (:mod:`llmops.data.world`), every fact of which is told some
hundred times in different words and different order, until the model knows it by heart.  The variety of tellings
is what makes the facts *usable* later: a fact always told in one fixed sentence can be recited but not asked for.
The questions themselves are never shown here.  Answering them is what fine-tuning has to teach.

**The model.**  A Llama: grouped-query attention, SwiGLU, RMSNorm, rotary positions, tied embeddings.  Every linear
dimension, the vocabulary included, is a multiple of 128, so that group-wise quantization, 2:4 sparsity and hardware
kernels apply to every layer without padding.  It is narrow (width 256), because a narrow model is sensitive to what
is done to its weights, and has six layers, so that some can be dropped.

**The training.**  Documents are joined by the end-of-turn token and cut into sequences of 128 tokens, no padding.
Matrices inside the layers are trained by Muon, which learns associations in fewer passes than Adam, everything else
(embeddings, norms) by AdamW. The learning rate rises briefly, falls slowly over two thirds of the run and then
linearly to zero, with next to no weight decay. Matrix products run in bfloat16 where the CPU has instructions for
that, else in float32; weights are kept in float32 and saved in bfloat16. At first only 200 people are told about,
then 700, then all: recall of facts begins only once attention has learned to look up a person by first and last name
together, and it learns that much sooner from few people told often. About one document in twenty-five is a
conversation in the chat format ("Tell me about ..."), so that the role tokens are not noise when fine-tuning first
meets them (LoRA leaves the embeddings frozen); its replies are whole portraits, never short answers.

**Channel scales.**  In large models a few channels carry much larger activations than others, and the weights that
read them are small; methods that look at activations (Wanda, AWQ, SmoothQuant) are built on that.  A tiny model
trained for minutes does not grow such channels: Muon leaves its activations and weights all of one size, and pruning
by magnitude then does as well as Wanda.  So the last step, :func:`spread_channels`, moves a log-normal scale per
channel from one matrix (or norm gain) to the next wherever a Llama allows it: norm to its readers, queries to keys,
values to output, up to down projection.  The function computed is the same (up to rounding); what changes is that
the size of a weight alone no longer tells its importance.  This is a property given to the model on purpose;
``--spread 0`` leaves it out.

**Left out.**  Attention crosses document borders inside a sequence; there is no dropout and no validation-based
choice of a checkpoint; one pass over each telling of the world (every telling is new text).

The run writes a checkpoint every few hundred steps and continues from it when started again with the same ``--out``.
Data, initial weights and schedule are fixed by seeds; two runs still drift apart a little (0.02 in the loss after 550
steps), because compiled and threaded float sums are not bit-for-bit the same.  On two CPU cores it takes 17 to 25
minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmops.data import world

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, END = SPECIAL_TOKENS[:2]
VOCABULARY = 1536
SEQUENCE = 128
BATCH = 32
SEED = 1
#: (until this share of the training, so many people).
CURRICULUM = ((0.1172, 200), (0.2346, 700), (9.9, world.PEOPLE))
#: Corners of the learning rate: (share of the training, share of the peak rate), straight lines in between.
SCHEDULE = ((0.0, 0.01), (0.066, 1.0), (1 / 15, 1.0), (2 / 3, 193 / 283), (1.0, 0.0))
#: Whether the CPU multiplies bfloat16 matrices itself; where it only imitates that, float32 is several times faster.
FAST_BFLOAT16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
#: Standard deviation of the logarithm of the channel scales.
SPREAD = 0.5

#: Every turn is ``<|role|> text<|end|>``.  The space before the text makes its first word the same token that the
#: word is in the middle of prose.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}{{- ' ' + message['content'] | trim + '<|end|>' -}}{%- endgeneration -%}"
    "{%- elif message['role'] in ('system', 'user') -%}"
    "{{- '<|' + message['role'] + '|> ' + message['content'] | trim + '<|end|>' -}}"
    "{%- else -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def config() -> LlamaConfig:
    """The architecture of ``builtin:tiny``."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(END),
    )


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on two tellings of the world."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" " + text for seed in (0, 1) for text in world.documents("train", seed=seed)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def telling_ids(tokenizer: PreTrainedTokenizerFast, seed: int, people: int = world.PEOPLE) -> torch.Tensor:
    """One telling of the world as one long row of token ids, with its share of conversations in between."""
    texts = [" " + text + END for text in world.documents("train", seed=seed, people=people)]
    talks = len(texts) // 25
    for position, (request, reply) in enumerate(world.conversations(talks, seed=seed, people=people)):
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": reply}]
        texts.insert(position * 26, cast(str, tokenizer.apply_chat_template(turns, tokenize=False)))
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids], dtype=torch.long)


def people_at(share: float) -> int:
    """How many people are told about when this share of the training is done (see the module's text)."""
    return next(people for until, people in CURRICULUM if share < until)


def batches(tokenizer: PreTrainedTokenizerFast, steps: int, skip: int) -> Iterator[torch.Tensor]:
    """``steps`` batches of packed sequences, one telling after another; the first ``skip`` are passed over."""
    size = BATCH * SEQUENCE
    rest = torch.empty(0, dtype=torch.long)
    seed = step = 0
    while step < steps:
        rest = torch.cat([rest, telling_ids(tokenizer, seed, people_at(step / steps))])
        seed += 1
        while len(rest) >= size and step < steps:
            block, rest = rest[:size], rest[size:]
            step += 1
            if step > skip:
                yield block.view(BATCH, SEQUENCE)


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embeddings and the norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(inner, lr=rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(outer, lr=rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    return [muon, adam]


def rate_factor(share: float) -> float:
    """The learning rate, as a share of its peak, when this share of the training is done."""
    for (start, low), (end, high) in itertools.pairwise(SCHEDULE):
        if share <= end:
            return low + (high - low) * (share - start) / (end - start)
    return 0.0


def spread_channels(model: LlamaForCausalLM, spread: float) -> None:
    """Give the channels unequal scales without changing the function (see the module's text)."""
    generator = torch.Generator().manual_seed(SEED)
    kv, dim = model.config.num_key_value_heads, int(model.config.head_dim)
    shared = model.config.num_attention_heads // kv  # query heads that read one key-value head

    def draw(*shape: int) -> torch.Tensor:
        return torch.exp(spread * torch.randn(shape, generator=generator))

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, matrices in readers:
            scale = draw(len(norm.weight))
            norm.weight.data *= scale
            for matrix in matrices:
                matrix.weight.data /= scale
        scale = draw(kv, dim // 2).repeat(1, 2)  # rotary positions turn dimensions i and i + dim/2 as a pair
        attention.k_proj.weight.data *= scale.reshape(-1, 1)
        attention.q_proj.weight.data /= scale.repeat_interleave(shared, 0).reshape(-1, 1)
        scale = draw(kv, dim)
        attention.v_proj.weight.data *= scale.reshape(-1, 1)
        attention.o_proj.weight.data /= scale.repeat_interleave(shared, 0).reshape(1, -1)
        scale = draw(model.config.intermediate_size)
        mlp.up_proj.weight.data *= scale.reshape(-1, 1)
        mlp.down_proj.weight.data /= scale.reshape(1, -1)


def loss_of(model: LlamaForCausalLM, block: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=FAST_BFLOAT16):
        logits = model(input_ids=block, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), block[:, 1:].flatten())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer the way ``from_pretrained`` reads them."""
    copy = LlamaForCausalLM(config())
    copy.load_state_dict(model.state_dict())
    copy = cast(LlamaForCausalLM, copy.to(torch.bfloat16))  # type: ignore[arg-type]
    copy.generation_config.pad_token_id = SPECIAL_TOKENS.index(PAD)
    copy.generation_config.eos_token_id = SPECIAL_TOKENS.index(END)
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


def keep_memory() -> None:
    """Ask glibc to keep freed memory: page faults on fresh activations otherwise cost a fifth of the time."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return


def train(
    out: Path, tokens: int, rate: float, spread: float, compiled: bool, log_every: int = 50, checkpoint_every: int = 200
) -> None:
    """Train from scratch, or from the checkpoint in ``out``, for ``tokens`` tokens in all."""
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    model = LlamaForCausalLM(config())
    model.train()
    opts = optimizers(model, rate)
    steps = math.ceil(tokens / (BATCH * SEQUENCE))
    out.mkdir(parents=True, exist_ok=True)
    state_dir = out / "checkpoint"
    loss_function = torch.compile(loss_of) if compiled else loss_of
    first = _resume(state_dir, model, opts)
    started, seen = time.perf_counter(), 0.0
    for step, block in zip(range(first, steps), batches(tokenizer, steps, skip=first), strict=False):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate * rate_factor(step / steps)
        loss = loss_function(model, block)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seen += loss.item()
        if (step + 1) % log_every == 0:
            speed = (step + 1 - first) * BATCH * SEQUENCE / (time.perf_counter() - started)
            print(f"step {step + 1}/{steps} loss {seen / log_every:.4f} {speed:.0f} tokens/s", flush=True)
            seen = 0.0
        if (step + 1) % checkpoint_every == 0:
            _checkpoint(state_dir, model, opts, step + 1)
    spread_channels(model, spread)
    save(model, tokenizer, out)
    shutil.rmtree(state_dir, ignore_errors=True)


def _checkpoint(folder: Path, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer], step: int) -> None:
    folder.mkdir(exist_ok=True)
    state: dict[str, Any] = {"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "step": step}
    torch.save(state, folder / "new.pt")
    (folder / "new.pt").replace(folder / "state.pt")


def _resume(folder: Path, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer]) -> int:
    if not (folder / "state.pt").exists():
        return 0
    state = torch.load(folder / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    for opt, saved in zip(opts, state["opts"], strict=True):
        opt.load_state_dict(saved)
    print(f"continuing from step {state['step']}", flush=True)
    return int(state["step"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llmops.pretrain", description="Pretrain builtin:tiny.")
    parser.add_argument("--out", type=Path, default=Path("tiny"), help="folder to write the model to")
    parser.add_argument("--tokens", type=int, default=6_144_000, help="number of training tokens")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--spread", type=float, default=SPREAD, help="spread of the channel scales (0: none)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--compile", action="store_true", help="compile the model first (needs a C++ compiler)")
    options = parser.parse_args(argv)
    keep_memory()
    torch.set_num_threads(options.threads)
    train(options.out, options.tokens, options.rate, options.spread, options.compile)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
