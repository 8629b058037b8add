"""The models of bench_quantize.py and bench_prune.py, what they are calibrated on, the one evaluator of every answer.

`tiny`  builtin:tiny, tuned as in recipes/quantize.yaml, so that exact match means something. Calibrated on
        builtin:study; scored by exact match on builtin:facts and perplexity on builtin:world.
`text`  a Llama of 3.7 M parameters, pretrained here on real English (`--text FOLDER`), scored by the protocol of the
        GPTQ and Wanda papers on the last sixth of WikiText-2's validation text, which it has not seen. It is trained
        by the optimizers of `llmops.pretrain`, at last on sequences of 2,048 tokens, since windows have that length.

Both are kept in a cache folder in float32, every weight rounded to bfloat16 first: a tool that works in bfloat16 or
float16 loses nothing on the way in.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _quantize_case import Case
from llmops.data.options import DataSource
from llmops.data.render import calibration_tokens, text_stream
from llmops.data.sources import load_rows, rows_from
from llmops.evaluate.exact_match import evaluate as exact_match
from llmops.evaluate.options import ExactMatch, Perplexity
from llmops.evaluate.perplexity import score_stream

TEXTS = ("wikitext2-valid.txt", "state-union.txt", "inaugural.txt", "tinyshakespeare.txt")
HELD_OUT = 1 / 6  # of the first text, its end
PAD, END = "<|pad|>", "<|end|>"
SHAPE: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
                         "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
                         "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
#: (until this share of the training, tokens of a sequence); 4,096 tokens make a step.
LENGTHS = ((0.8, 256), (9.9, 2048))
STEP = 4096


@dataclass(frozen=True)
class Scorer:
    """The evaluator of one model: perplexity over `stream`, exact match over `questions` if there are any, and, once it
    was shown the float model (`beside`), KL(float, quantized) in nats a token over the first windows of the stream.

    Perplexity can fall by chance where rounding moves a model the right way; the divergence only grows with damage.
    """

    tokenizer: Any
    stream: list[int]
    perplexity: Perplexity
    questions: Any = None
    float_scores: tuple[Tensor, ...] = ()  # of each window (context - 1, vocabulary), log-probabilities, float16

    def __call__(self, model: Any) -> dict[str, Any]:
        found = score_stream(model, self.tokenizer, self.stream, self.perplexity, id="perplexity")
        losses = [float(item.score) if item.score is not None else float("inf") for item in found.items]
        made: dict[str, Any] = {"perplexity": found.value.value, "losses": losses}
        if self.float_scores:
            apart = [piece for scores, ids in zip(self.float_scores, self._windows(), strict=False)
                     for piece in _divergences(scores, _scores(model, ids))]
            made |= {"divergence": sum(apart) / len(apart), "divergences": apart}
        if self.questions is not None:
            asked = ExactMatch(data="test", max_new_tokens=8)
            made["exact_match"] = exact_match(model, self.tokenizer, self.questions, asked, id="exact_match")[0
                                                                                                         ].value.value
        return made

    def beside(self, model: Any, tokens: int = 8192) -> Scorer:
        """This evaluator, knowing what the float model says of the first `tokens` tokens."""
        some = self._windows()[:max(1, tokens // self.perplexity.context)]
        return replace(self, float_scores=tuple(_scores(model, ids).half() for ids in some))

    def _windows(self) -> list[Tensor]:
        """(context,) each, those that perplexity is taken over."""
        size = self.perplexity.context
        ids = torch.tensor(self.stream[:self.perplexity.max_tokens])
        return list(ids[:len(ids) // size * size].view(-1, size))

    def protocol(self) -> dict[str, Any]:
        windows = len(self.stream[:self.perplexity.max_tokens]) // self.perplexity.context
        return {"perplexity": "windows that do not overlap, no BOS, loss over context - 1 tokens each (GPTQ, Wanda)",
                "context": self.perplexity.context, "windows": windows, "separator": self.perplexity.separator,
                "questions": len(self.questions.rows) if self.questions is not None else 0}


@torch.no_grad()  # type: ignore[untyped-decorator]
def _scores(model: Any, ids: Tensor) -> Tensor:
    """(context - 1, vocabulary) log-probabilities of what follows each token of a window but the last."""
    return model(ids.unsqueeze(0)).logits[0, :-1].float().log_softmax(-1)  # type: ignore[no-any-return]


def _divergences(exact: Tensor, found: Tensor, piece: int = 256) -> list[float]:
    """KL(exact, found), nats a token, of each `piece` tokens. Both (tokens, vocabulary), log-probabilities."""
    exact = exact.float()
    return [float(part.mean()) for part in (exact.exp() * (exact - found)).sum(-1).split(piece)]


# ---------------------------------------------------------------------------------------------------------- tiny


def tuned_tiny(cache: Path) -> Path:
    """builtin:tiny after the tuning of recipes/quantize.yaml, merged."""
    folder = cache / "tiny"
    if (folder / "config.json").exists():
        return folder
    from llmops.api import apply
    from llmops.models.load import load, merged

    model, tokenizer = load("builtin:tiny", dtype="stored", device="cpu")
    rows = load_rows("train", {"train": DataSource(source="builtin:facts", split="train")}, Path(), 0)
    step = {"finetune": {"method": "lora", "data": "train", "rank": 16, "alpha": 32, "epochs": 2,
                         "learning_rate": 1e-3, "batch_size": 32}}
    model = merged(apply(model, tokenizer, step, {"train": rows.rows}))
    save(model, tokenizer, folder)
    return folder


def tiny_scorer(tokenizer: Any, questions: int, windows: int) -> Scorer:
    prose = load_rows("prose", {"prose": DataSource(source="builtin:world", split="test", samples=400)}, Path(), 0)
    stream = text_stream(prose, tokenizer, "eos")
    asked = load_rows("test", {"test": DataSource(source="builtin:facts", split="test", samples=questions)}, Path(), 0)
    wanted = Perplexity(data="prose", context=256, separator="eos", max_tokens=256 * windows)
    return Scorer(tokenizer, stream, wanted, asked)


def tiny_rows(path: Path) -> None:
    """The calibration rows: the training questions and prose of the world, as text."""
    rows = load_rows("calib", {"calib": DataSource(source="builtin:study")}, Path(), 0)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.rows))


# ---------------------------------------------------------------------------------------------------------- text


def texts(folder: Path) -> tuple[list[str], str]:
    """(texts to train on, the one held out). Raises FileNotFoundError naming what is missing."""
    missing = [name for name in TEXTS if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} not in {folder}")
    read = [(folder / name).read_text(encoding="utf-8") for name in TEXTS]
    cut = read[0].index("\n", round(len(read[0]) * (1 - HELD_OUT))) + 1
    return [read[0][:cut], *read[1:]], read[0][cut:]


def train_tokenizer(read: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of what is trained on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=[PAD, END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([line for text in read for line in text.splitlines(keepends=True)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END,
                                   model_max_length=SHAPE["max_position_embeddings"],
                                   clean_up_tokenization_spaces=False)


def crops(stream: Tensor, draw: random.Random, length: int) -> Tensor:
    """(sequences, length): one step's worth of tokens from random places."""
    starts = [draw.randrange(len(stream) - length) for _ in range(max(1, STEP // length))]
    return torch.stack([stream[start:start + length] for start in starts])


def pretrained_text(source: Path, cache: Path, tokens: int, rate: float = 3e-3) -> Path:
    """The Llama of the module's docstring, trained on `tokens` tokens if the cache has none."""
    folder = cache / f"text-{tokens}"
    if (folder / "config.json").exists():
        return folder
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmops.pretrain import keep_memory, loss_of, optimizers, rate_factor

    keep_memory()
    torch.manual_seed(0)
    read, _ = texts(source)
    tokenizer = train_tokenizer(read)
    stream = torch.cat([torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in read])
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    made, steps, draw = optimizers(model, rate), tokens // STEP, random.Random(0)
    began, seen = time.perf_counter(), 0.0
    for step in range(steps):
        length = next(length for until, length in LENGTHS if step / steps < until)
        for each in made:
            for group in each.param_groups:
                group["lr"] = rate * rate_factor(step / steps)
        loss = loss_of(model, crops(stream, draw, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in made:
            each.step()
            each.zero_grad(set_to_none=True)
        seen += loss.item()
        if (step + 1) % 50 == 0:
            speed = (step + 1) * STEP / (time.perf_counter() - began)
            print(f"  pretraining: step {step + 1} of {steps}, loss {seen / 50:.3f}, {speed:.0f} tokens/s", flush=True)
            seen = 0.0
    save(model, tokenizer, folder)
    return folder


def text_scorer(source: Path, tokenizer: Any, windows: int) -> Scorer:
    _, held_out = texts(source)
    stream = text_stream(rows_from("held-out", [{"text": held_out}]), tokenizer)
    wanted = Perplexity(data="held-out", context=2048, batch_size=1, max_tokens=2048 * windows)
    return Scorer(tokenizer, stream, wanted)


def text_rows(source: Path, path: Path) -> None:
    """The calibration rows: the first 400,000 letters of WikiText-2 that it was trained on, paragraph by paragraph."""
    text_lines(source, path, 400_000)


def text_lines(source: Path, path: Path, letters: int | None = None) -> None:
    """Rows of the part of WikiText-2 that it was trained on, its first `letters` or all, paragraph by paragraph."""
    read, _ = texts(source)
    lines = [line for line in read[0][:letters].splitlines() if line.strip()]
    path.write_text("".join(json.dumps({"text": line + "\n"}) + "\n" for line in lines))


# ---------------------------------------------------------------------------------------------------------- both


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """float32, rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16).to(torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def calibration(rows: Path, tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """What every contender is calibrated on, (samples, length)."""
    read = load_rows("calib", {"calib": DataSource(source=str(rows))}, rows.parent, seed)
    return calibration_tokens(read, tokenizer, samples=samples, length=length, seed=seed)


def prepared(name: str, asked: Any, folder: Path | None = None, **more: Any) -> tuple[Case, Scorer, dict[str, Any]]:
    """(case, scorer, what of both belongs into the results) of the model "tiny" or "text", or of another in `folder`,
    which is calibrated and scored as "text" is.

    asked: the script's options cache, text, tokens, questions, windows, calibration, threads; more: of the case.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder or (tuned_tiny(asked.cache) if name == "tiny" else
                        pretrained_text(asked.text, asked.cache, asked.tokens))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, kept = asked.cache / f"{name}.jsonl", asked.cache / f"{name}-calibration.safetensors"
    if name == "tiny":
        tiny_rows(rows)
        scorer, length = tiny_scorer(tokenizer, asked.questions, asked.windows * 8), 128
    else:
        text_rows(asked.text, rows)
        scorer, length = text_scorer(asked.text, tokenizer, asked.windows), 256
    samples = asked.calibration // length
    save_file({"tokens": calibration(rows, tokenizer, samples, length, 0)}, kept)
    base = scorer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    print(f"{name}: perplexity {base['perplexity']:.5g}", file=sys.stderr, flush=True)
    case = Case(str(folder), str(kept), str(rows), samples, length, threads=asked.threads, **more)
    return case, scorer, {"model": name, "calibration": {"crops": samples, "length": length},
                          "protocol": scorer.protocol(), "base": base}


def add_options(to: argparse.ArgumentParser, logs: str, tokens: int, more: Sequence[str] = ()) -> None:
    """The options of both scripts that `prepared` and the workers are told. more: models of one script alone."""
    to.add_argument("--text", type=Path, help="folder with the texts of the second model")
    to.add_argument("--cache", type=Path, default=Path("/tmp/bench_quantize_cache"), help="where models are kept")
    to.add_argument("--models", nargs="+", choices=["tiny", "text", *more], default=["tiny", "text"])
    to.add_argument("--calibration", type=int, default=16_384, help="tokens of it, in crops of 128 (tiny) or 256")
    to.add_argument("--tokens", type=int, default=tokens, help="tokens the second model is pretrained on")
    to.add_argument("--questions", type=int, default=300)
    to.add_argument("--windows", type=int, default=16, help="of 2,048 tokens, most that are scored")
    to.add_argument("--threads", type=int, default=1)
    to.add_argument("--logs", type=Path, default=Path(logs), help="folder for what workers print")


def wanted_models(asked: Any) -> Iterator[str]:
    """Those that can be made; folders are."""
    for folder in (asked.logs, asked.cache):
        folder.mkdir(parents=True, exist_ok=True)
    for name in asked.models:
        if name != "tiny" and asked.text is None:
            print(f"\n{name}: left out, for no --text FOLDER with its texts was given")
        else:
            yield name


def dense_state(folder: Path) -> dict[str, Tensor]:
    """The weights that a contender wrote: dense ones, or those that its own checkpoint stands for."""
    from safetensors.torch import load_file

    if (folder / "dense.safetensors").exists():
        return load_file(folder / "dense.safetensors")
    from llmops.models.load import load
    from llmops.models.packed import PackedLinear

    model, _ = load(folder, dtype="float32", device="cpu")
    state = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    return state | {f"{name}.weight": layer.dequantized().float() for name, layer in model.named_modules()
                    if isinstance(layer, PackedLinear)}


@torch.no_grad()  # type: ignore[untyped-decorator]
def put(model: Any, state: dict[str, Tensor]) -> None:
    """Copy every parameter of the model from `state`. Raises ValueError when one is missing or does not fit."""
    for name, parameter in model.named_parameters():
        if name not in state or state[name].shape != parameter.shape:
            had = tuple(state[name].shape) if name in state else "nothing"
            raise ValueError(f"{name}: the answer has {had}; expected {tuple(parameter.shape)}")
        parameter.copy_(state[name])
