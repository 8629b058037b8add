"""Small tokenizers and chat templates in the manner of four model families, and rows to feed them.

The templates are written here, each with the trait that makes its family hard: Llama 3 puts a header and a blank line
before each turn, ChatML a line break behind it, Mistral has no role for the assistant and no generation prompt, Gemma
calls the assistant "model", refuses system turns, and ends turns with a token that is not the tokenizer's eos.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmops.data.sources import Rows

SENTENCES = ("Where does the old miller live?", "He lives in Velmoor, by the river.", "What is two and three?",
             "Two and three make five.", "You are a brief and kind helper.", "Naïve café: ☂ 12.5 %") * 4

LLAMA3 = (
    "{{ bos_token }}{% for turn in messages %}"
    "{{ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' ~ (turn.content | trim) ~ '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
MISTRAL = (
    "{{ bos_token }}{% set note = namespace(text='') %}{% for turn in messages %}"
    "{% if turn.role == 'system' %}{% set note.text = turn.content ~ '\\n\\n' %}"
    "{% elif turn.role == 'user' %}{{ '[INST] ' ~ note.text ~ turn.content ~ ' [/INST]' }}{% set note.text = '' %}"
    "{% else %}{{ ' ' ~ turn.content ~ eos_token }}{% endif %}{% endfor %}")
GEMMA = (
    "{{ bos_token }}{% for turn in messages %}"
    "{% if turn.role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "{{ '<start_of_turn>' ~ ('model' if turn.role == 'assistant' else turn.role) ~ '\\n' ~ (turn.content | trim) "
    "~ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}")
#: Drops what stands before </think> from all but the last turn, and writes an empty thought into the last.
THINKING = (
    "{% for turn in messages %}{% if turn.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' ~ ('<think></think>' if loop.last else '') ~ turn.content ~ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
#: Marks the assistant's text itself, and leaves the terminator out of the mark.
MARKED = (
    "{% for turn in messages %}{{ '<|im_start|>' ~ turn.role ~ '\\n' }}{% if turn.role == 'assistant' %}"
    "{% generation %}{{ turn.content }}{% endgeneration %}{% else %}{{ turn.content }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

#: family -> (template, special tokens, bos, eos, what ends a turn)
FAMILIES: dict[str, tuple[str, tuple[str, ...], str | None, str, str]] = {
    "llama3": (LLAMA3, ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
               "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "chatml": (CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>"),
    "mistral": (MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>"),
    "gemma": (GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<end_of_turn>"),
    "marked": (MARKED, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|endoftext|>", "<|im_end|>"),
    "thinking": (THINKING, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>"),
}


@lru_cache(maxsize=1)
def _words() -> str:
    """A byte-level BPE of about 330 tokens, learned from a few sentences, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return str(tokenizer.to_str())


def make_tokenizer(family: str | None = None, *, template: str | None = None, adds_bos: bool = False,
                   trims_offsets: bool = False) -> Any:
    """A fast tokenizer of a family (None: no template, eos "</s>"). adds_bos: it begins plain text with BOS."""
    own, special, bos, eos, _ = FAMILIES[family] if family else (None, ("<s>", "</s>"), "<s>", "</s>", "</s>")
    core = Tokenizer.from_str(_words())
    core.add_special_tokens(["<pad>", *special])
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)] if trims_offsets else []
    if adds_bos and bos:
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                                   special_tokens=[(bos, core.token_to_id(bos))]))
    if steps:
        core.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = template if template is not None else own
    return tokenizer


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant in alternation, after an optional system turn."""
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def message_rows(*conversations: Sequence[dict[str, str]]) -> Rows:
    return Rows("train", "messages", [{"messages": list(turns)} for turns in conversations])


def text_rows(*texts: str) -> Rows:
    return Rows("train", "text", [{"text": text} for text in texts])


def pair_rows(*pairs: tuple[str, str]) -> Rows:
    return Rows("train", "prompt_completion", [{"prompt": prompt, "completion": text} for prompt, text in pairs])


def choice_rows(*rows: tuple[str, list[str], int]) -> Rows:
    return Rows("quiz", "choices", [{"question": q, "choices": list(c), "answer": a} for q, c, a in rows])


def trained(example: dict[str, list[int]], tokenizer: Any) -> list[str]:
    """The text of every unbroken stretch of trained tokens."""
    stretches: list[list[int]] = []
    before = -100
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, -100)
        if label != -100:
            if before == -100:
                stretches.append([])
            stretches[-1].append(token)
        before = label
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in stretches]
