"""The tokenizer of a GGUF file: tokens, merges, types and the chat template of a byte-level BPE.

llama.cpp splits text by rules that are compiled into it and have names; the file says which. The name is found by the
splitting rule of the tokenizer, and a rule without a name is refused: the model would read other tokens than it was
trained on, and nothing would say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmops.errors import LlmopsError
from llmops.models.load import load_tokenizer

__all__ = ["add_tokenizer", "splitting_rule"]

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {_LETTERS + r"|\p{N}" + _REST: "qwen2", _LETTERS + r"|\p{N}{1,3}" + _REST: "llama-bpe"}
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


def add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """Put the tokenizer of `folder` into a file. vocabulary: tokens that the model has, which may be more.

    It is taken as transformers loads it, which is not always what lies in tokenizer.json: some families' classes bring
    a splitting rule of their own. Raises LlmopsError when it is no byte-level BPE, or splits by a rule without a name.
    """
    tokenizer = load_tokenizer(folder)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise LlmopsError(f"a {type(tokenizer).__name__}, written in Python; GGUF is written for byte-level BPE: use "
                          "llama.cpp's converter on the dense export")
    body = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = splitting_rule(body)
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [UNUSED] * vocabulary
    for token, index in body["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in body["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in body["model"]["merges"]])
    for index, add in ((tokenizer.bos_token_id, writer.add_bos_token_id),
                       (tokenizer.eos_token_id, writer.add_eos_token_id),
                       (tokenizer.pad_token_id, writer.add_pad_token_id),
                       (tokenizer.unk_token_id, writer.add_unk_token_id)):
        if index is not None:
            add(index)
    writer.add_add_bos_token(_adds_first(body))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def splitting_rule(body: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits text before it merges. Raises LlmopsError when there is none."""
    kind, split = body["model"]["type"], body.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    bytes_last = bool(steps) and steps[-1].get("type") == "ByteLevel"
    if kind != "BPE" or not bytes_last or steps[-1].get("add_prefix_space"):
        raise LlmopsError(f"a tokenizer of type {kind}, split by {[step.get('type') for step in steps]}; GGUF is "
                          "written for byte-level BPE without a prefix space: use llama.cpp's converter on the dense "
                          "export")
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return "gpt-2"
    pattern = (steps[0].get("pattern") or {}).get("Regex") if len(steps) == 2 else None
    if pattern in RULES and not steps[-1].get("use_regex", True):
        return RULES[pattern]
    raise LlmopsError(f"text is split by {pattern or [step.get('type') for step in steps]}, for which llama.cpp has no "
                      f"name known here; expected the rule of gpt-2, {', '.join(RULES.values())}: use llama.cpp's "
                      "converter on the dense export")


def _adds_first(body: Mapping[str, Any]) -> bool:
    """Whether a text is given a token before its first."""
    step = body.get("post_processor") or {}
    steps = step.get("processors", [step])
    return any("SpecialToken" in piece for each in steps for piece in each.get("single", [])[:1])
