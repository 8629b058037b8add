"""Chat templates in the public formats of five families, tools included, and small tokenizers with their tokens.

Written here, shorter than the originals, with what makes each family hard. Llama 3: a header and a blank line before a
turn, one tool call a turn, whose text is then not written. Qwen3: reasoning only after the last question, an empty
thought where there is none, results of tools in a user turn. Mistral: no role and no generation prompt for the
assistant, tools and system text before the last question only, ids of nine characters. Gemma: "model", no system role
(its text opens the first question), strict alternation, a terminator that is not eos. ChatML: nothing but turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tests.data.makers import CHATML, SENTENCES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LLAMA3 = """{{- bos_token }}
{%- set turns = messages %}{% set system = '' %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}{% endif %}
{%- if tools or system %}
  {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' ~ ('Environment: ipython\\n' if tools else '') ~ system ~ '<|eot_id|>' }}
{%- endif %}
{%- for turn in turns %}
  {%- if turn.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ (turn.content | tojson) ~ '<|eot_id|>' }}
  {%- elif turn.tool_calls %}
    {%- if turn.tool_calls | length != 1 %}{{ raise_exception('one tool call a turn') }}{% endif %}
    {%- set call = turn.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' }}
    {%- if loop.first and tools %}{{- 'You may call:\\n\\n' ~ (tools | tojson(indent=4)) ~ '\\n\\n' }}{% endif %}
    {{- (turn.content | trim) ~ '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

QWEN3 = """{%- set turns = messages %}{% set system = '' %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% endif %}
{%- if tools %}
  {{- '<|im_start|>system\\n' ~ (system ~ '\\n\\n' if system else '') ~ '# Tools\\n\\n<tools>' }}
  {%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{% endfor %}
  {{- '\\n</tools><|im_end|>\\n' }}
{%- elif system %}{{- '<|im_start|>system\\n' ~ system ~ '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(question=0) %}
{%- for turn in turns %}{% if turn.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}
{%- for turn in turns %}
  {%- if turn.role == 'assistant' %}
    {%- set thought = '' %}{% set said = turn.content %}
    {%- if turn.reasoning_content %}{% set thought = turn.reasoning_content %}
    {%- elif '</think>' in said %}
      {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
      {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.question and (loop.last or thought) %}{{- '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' }}{% endif %}
    {{- said }}
    {%- for call in turn.tool_calls or [] %}
      {{- ('\\n' if said or not loop.first else '') ~ '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
      {{- (call.function.arguments | tojson) ~ '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif turn.role == 'tool' %}
    {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
    {{- '\\n<tool_response>\\n' ~ turn.content ~ '\\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
  {%- else %}{{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

MISTRAL = """{{- bos_token }}
{%- set turns = messages %}{% set system = '' %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% endif %}
{%- set ns = namespace(question=0) %}
{%- for turn in turns %}{% if turn.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}
{%- for turn in turns %}
  {%- if turn.role == 'user' %}
    {%- set last = loop.index0 == ns.question %}
    {%- if tools and last %}{{- '[AVAILABLE_TOOLS]GAP' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
    {{- '[INST]GAP' ~ (system ~ '\\n\\n' if system and last else '') ~ turn.content ~ '[/INST]' }}
  {%- elif turn.tool_calls %}
    {{- '[TOOL_CALLS]GAP[' }}
    {%- for call in turn.tool_calls %}
      {%- if not call.id or call.id | length != 9 %}{{ raise_exception('ids of tool calls have nine characters') }}{% endif %}
      {{- (', ' if not loop.first else '') ~ '{"name": "' ~ call.function.name ~ '", "arguments": ' }}
      {{- (call.function.arguments | tojson) ~ ', "id": "' ~ call.id ~ '"}' }}
    {%- endfor %}
    {{- ']' ~ eos_token }}
  {%- elif turn.role == 'tool' %}
    {{- '[TOOL_RESULTS]GAP{"content": ' ~ (turn.content | tojson) ~ ', "call_id": "' ~ turn.tool_call_id ~ '"}' }}
    {{- '[/TOOL_RESULTS]' }}
  {%- else %}{{- 'GAP' ~ turn.content ~ eos_token }}{% endif %}
{%- endfor %}"""

GEMMA = """{{- bos_token }}
{%- set turns = messages %}{% set opening = '' %}
{%- if messages[0].role == 'system' %}
  {%- set opening = messages[0].content ~ '\\n\\n' %}{% set turns = messages[1:] %}
{%- endif %}
{%- for turn in turns %}
  {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant take turns') }}{% endif %}
  {{- '<start_of_turn>' ~ ('model' if turn.role == 'assistant' else turn.role) ~ '\\n' }}
  {{- (opening if loop.first else '') ~ (turn.content | trim) ~ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""


def _no_calls(calls: list[dict[str, Any]]) -> str:
    raise AssertionError("this family has no tools")


def _json_call(name: str, key: str) -> Callable[[dict[str, Any]], str]:
    return lambda call: f'{{"{name}": "{call["name"]}", "{key}": {json.dumps(call["arguments"])}}}'


@dataclass(frozen=True)
class Family:
    """A template, its tokens, and what an assistant turn is expected to look like in it.

    say(text, thought): the trained text of a turn of words; call(calls): of a turn of calls, each with its id;
    both without the terminator `end`. pieces: "bytes" (byte-level BPE) or "spaces" (BPE over words with a leading
    U+2581, as SentencePiece).
    """

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    end: str
    say: Callable[[str, str], str]
    call: Callable[[list[dict[str, Any]]], str] = _no_calls
    added: tuple[str, ...] = ()
    pieces: str = "bytes"

    @property
    def tools(self) -> bool:
        return self.call is not _no_calls


def _mistral_calls(gap: str) -> Callable[[list[dict[str, Any]]], str]:
    return lambda calls: f"[TOOL_CALLS]{gap}" + json.dumps(
        [{"name": call["name"], "arguments": call["arguments"], "id": call["id"]} for call in calls])


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_INST = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
FAMILIES: dict[str, Family] = {
    "llama3": Family(
        LLAMA3, ("<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", lambda text, thought: thought + text.strip(),
        lambda calls: _json_call("name", "parameters")(calls[0])),
    "qwen3": Family(
        QWEN3, _IM, None, "<|im_end|>", "<|im_end|>",
        lambda text, thought: f"<think>\n{thought}\n</think>\n\n{text}",
        lambda calls: "<think>\n\n</think>\n\n" + "\n".join(
            f'<tool_call>\n{_json_call("name", "arguments")(call)}\n</tool_call>' for call in calls),
        added=("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")),
    "mistral": Family(MISTRAL.replace("GAP", ""), _INST, "<s>", "</s>", "</s>",
                      lambda text, thought: thought + text, _mistral_calls("")),
    "mistral-spaced": Family(MISTRAL.replace("GAP", " "), _INST, "<s>", "</s>", "</s>",
                             lambda text, thought: f" {thought}{text}", _mistral_calls(" "), pieces="spaces"),
    "gemma": Family(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<end_of_turn>",
                    lambda text, thought: thought + text.strip(), pieces="spaces"),
    "chatml": Family(CHATML, _IM, None, "<|im_end|>", "<|im_end|>", lambda text, thought: thought + text),
}


@lru_cache(maxsize=2)
def _trained(pieces: str) -> str:
    """A BPE of a few hundred tokens, learned from a few sentences, as JSON."""
    core = Tokenizer(models.BPE(byte_fallback=pieces == "spaces", unk_token="<unk>" if pieces == "spaces" else None))
    alphabet: list[str] = []
    if pieces == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [chr(code) for code in range(33, 127)] + ["\u2581", "\n"]
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if pieces == "spaces" else []
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=330 + len(special), initial_alphabet=alphabet, special_tokens=special, show_progress=False))
    return str(core.to_str())


def family_tokenizer(name: str, *, template: str | None = None, adds_bos: bool = True) -> Any:
    """A fast tokenizer of a family, which begins plain text with BOS where the family has one."""
    family = FAMILIES[name]
    core = Tokenizer.from_str(_trained(family.pieces))
    core.add_special_tokens(["<pad>", *family.special])
    core.add_tokens(list(family.added))
    if adds_bos and family.bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, core.token_to_id(family.bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=family.bos, eos_token=family.eos,
                                        pad_token="<pad>")
    tokenizer.chat_template = template if template is not None else family.template
    return tokenizer
