"""The loss mask, proved by decoding: five families of templates, tools included, against what was written down by hand.

`python -m pytest -s tests/data/test_template_masks.py -k table` prints trained and total tokens of each.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tests.data.families import FAMILIES, family_tokenizer

from llmops.data.chat import template_hash, terminators
from llmops.data.options import Limits
from llmops.data.render import Encoded, encode, prompts_and_answers
from llmops.data.sources import Rows, rows_from
from llmops.errors import DataError

TOOLS = [{"type": "function", "function": {
    "name": name, "description": f"{name} of a place", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
    for name in ("get_weather", "get_time")]
Turn = dict[str, Any]


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def system(text: str) -> Turn:
    return {"role": "system", "content": text}


def said(text: str, thought: str = "") -> Turn:
    return {"role": "assistant", "content": text, **({"reasoning_content": thought} if thought else {})}


def calls(*names: str, city: str = "Oslo") -> Turn:
    return {"role": "assistant", "content": None, "tool_calls": [
        {"id": f"abcdefgh{number}", "type": "function", "function": {"name": name, "arguments": {"city": city}}}
        for number, name in enumerate(names)]}


def result(text: str, number: int = 0) -> Turn:
    return {"role": "tool", "content": text, "tool_call_id": f"abcdefgh{number}"}


CASES: dict[str, list[Turn]] = {
    "single": [user("Where does the old miller live?"), said("He lives in Velmoor.")],
    "multi": [user("Two and three?"), said("Five."), user("Sure?"), said("Yes, I am."), user("Ok?"), said("Yes\nor no.")],
    "system": [system("You are a brief helper."), user("Two and three?"), said("Five."), user("Sure?"), said("Yes.")],
    "thought": [user("Two and three?"), said("Five.", "add them"), user("Sure?"), said("Yes.", "check it")],
    "tool": [user("How warm is it?"), calls("get_weather"), result('{"degrees":\n "7 or 8"}'), said("Seven degrees.")],
    "tools twice": [system("You are brief."), user("How warm?"), calls("get_weather"), result("7"), said("Seven."),
                    user("And there?"), calls("get_weather", city="Rome"), result("20 \u00b0"), said("Twenty.")],
    "two calls": [user("Warm and late?"), calls("get_weather", "get_time"), result("7"), result("12 h", 1),
                  said("Seven, at noon.")],
    "call last": [user("How warm is it?"), calls("get_weather")],
}
NO_TOOLS = {"gemma", "chatml"}


def rows_of(*conversations: list[Turn]) -> Rows:
    """Rows as they come from a file, with tools where a turn calls one."""
    return rows_from("train", [{"messages": turns, **({"tools": TOOLS} if _calling(turns) else {})}
                               for turns in conversations])


def _calling(turns: list[Turn]) -> bool:
    return any(turn.get("tool_calls") for turn in turns)


def fits(family: str, case: str) -> bool:
    """Whether the family can write the case at all."""
    if _calling(CASES[case]):
        return family not in NO_TOOLS and (family, case) != ("llama3", "two calls")
    return case != "thought" or family == "qwen3"


FITTING = [(family, case) for family in FAMILIES for case in CASES if fits(family, case)]
REFUSED = [(family, case) for family in FAMILIES for case in CASES if not fits(family, case)]


def stretches(encoded: Encoded, tokenizer: Any) -> list[str]:
    """The text of every unbroken stretch of trained tokens, token for token: `decode` may trim."""
    found: list[str] = []
    for example in encoded.examples:
        ids: list[int] = []
        for token, label in zip([*example["input_ids"], -1], [*example["labels"], -100], strict=True):
            assert label in (token, -100)
            if label != -100:
                ids.append(token)
            elif ids:
                found.append(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))
                ids = []
    return found


def expected(family: str, turns: list[Turn]) -> list[str]:
    """What the assistant says in each of its turns, terminator included, by the family's public format."""
    kind = FAMILIES[family]
    return [(kind.call([{**call["function"], "id": call["id"]} for call in turn["tool_calls"]])
             if turn.get("tool_calls") else kind.say(turn["content"], turn.get("reasoning_content", ""))) + kind.end
            for turn in turns if turn["role"] == "assistant"]


def prove(family: str, case: str) -> tuple[int, int]:
    """Assert the mask of one case, and return its (trained, total) tokens."""
    turns, tokenizer = CASES[case], family_tokenizer(family)
    encoded = encode(rows_of(turns), tokenizer, max_length=4096, limits=Limits())
    answers = expected(family, turns)
    assert stretches(encoded, tokenizer) == answers
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family].end)
    assert sum(example["labels"].count(end) for example in encoded.examples) == len(answers)
    trained = "".join(stretches(encoded, tokenizer))
    for turn in turns:
        assert turn["role"] == "assistant" or turn["content"] not in trained
    for example in encoded.examples:
        whole = tokenizer.backend_tokenizer.decode(example["input_ids"], skip_special_tokens=False)
        assert all(" ".join(turn["content"].split()[:1]) in whole for turn in turns[:2] if turn["content"])
        assert tokenizer.bos_token_id is None or example["input_ids"].count(tokenizer.bos_token_id) == 1
    return encoded.report["trainable_tokens"], encoded.report["tokens"]


@pytest.mark.parametrize(("family", "case"), FITTING)
def test_the_trained_tokens_are_the_assistants_and_its_terminators(family: str, case: str) -> None:
    trained, total = prove(family, case)
    assert 0 < trained < total


def mask_table(cells: dict[tuple[str, str], str]) -> str:
    """Template x case, one line a template."""
    families, cases = (list(dict.fromkeys(key[side] for key in cells)) for side in (0, 1))
    width = max(map(len, [*cases, *cells.values()])) + 2
    lines = ["".ljust(16) + "".join(case.ljust(width) for case in cases)]
    lines += [family.ljust(16) + "".join(cells[family, case].ljust(width) for case in cases) for family in families]
    return "\n".join(line.rstrip() for line in lines)


def test_the_table_of_all_masks() -> None:
    cells: dict[tuple[str, str], str] = {}
    for family in FAMILIES:
        for case in CASES:
            if fits(family, case):
                cells[family, case] = "{} / {} ok".format(*prove(family, case))
            else:
                with pytest.raises(DataError):
                    encode(rows_of(CASES[case]), family_tokenizer(family), max_length=4096, limits=Limits())
                cells[family, case] = "refused"
    table = mask_table(cells)
    print("\ntrained / total tokens\n" + table)
    assert Counter(cell.split()[-1] for cell in cells.values()) == {"ok": len(FITTING), "refused": len(REFUSED)}
    assert len(table.splitlines()) == 1 + len(FAMILIES)


@pytest.mark.parametrize(("family", "case"), REFUSED)
def test_what_a_template_cannot_write_is_refused(family: str, case: str) -> None:
    with pytest.raises(DataError, match=r"train:1: the chat template (leaves out|refuses the turns).*; (use a|reorder)"):
        encode(rows_of(CASES[case]), family_tokenizer(family), max_length=4096, limits=Limits())


def refusal(family: str, turns: list[Turn], **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        encode(rows_from("train", [{"messages": turns, **columns}]), family_tokenizer(family), max_length=4096,
               limits=Limits())
    return str(caught.value)


def test_what_a_template_leaves_out_is_named() -> None:
    both = {**calls("get_weather"), "content": "Let me look."}
    assert 'the text of turn 2 ("assistant")' in refusal("llama3", [user("Warm?"), both])
    assert "the tool calls of turn 2 (get_weather)" in refusal("chatml", CASES["call last"])
    assert "the tools of the row (get_weather, get_time)" in refusal("chatml", CASES["single"], tools=TOOLS)
    assert 'the text of turn 2 ("assistant")' in refusal("chatml", CASES["thought"])
    assert "nine characters" in refusal("mistral", [user("Warm?"), {"role": "assistant", "tool_calls": [
        {"function": {"name": "get_weather", "arguments": {}}}]}])
    deaf = FAMILIES["chatml"].template.replace("{% for turn in messages %}",
                                               "{% for turn in messages if turn.role != 'system' %}")
    with pytest.raises(DataError, match='the text of turn 1 \\("system"\\)'):
        encode(rows_of(CASES["system"]), family_tokenizer("chatml", template=deaf), max_length=4096, limits=Limits())
    cut = FAMILIES["qwen3"].template.replace("call.function.arguments | tojson", "'{}'")
    with pytest.raises(DataError, match="arguments of the tool calls of turn 2"):
        encode(rows_of(CASES["tool"]), family_tokenizer("qwen3", template=cut), max_length=4096, limits=Limits())
    first = FAMILIES["qwen3"].template.replace("turn.tool_calls or []", "(turn.tool_calls or [])[:1]")
    with pytest.raises(DataError, match="the tool calls of turn 2"):
        encode(rows_of(CASES["two calls"]), family_tokenizer("qwen3", template=first), max_length=4096, limits=Limits())


def test_reasoning_that_a_template_strips_is_refused_and_that_of_earlier_turns_is_trained() -> None:
    thinking = [user("Two?"), said("<think>\nadd\n</think>\n\nFive."), user("Sure?"), said("<think>\nlook\n</think>\n\nYes.")]
    tokenizer = family_tokenizer("qwen3")
    encoded = encode(rows_of(thinking), tokenizer, max_length=4096, limits=Limits())
    assert stretches(encoded, tokenizer) == ["<think>\nadd\n</think>\n\nFive.<|im_end|>",
                                             "<think>\nlook\n</think>\n\nYes.<|im_end|>"]
    second = tokenizer.decode(encoded.examples[1]["input_ids"])
    assert "add" not in second and "Five." in second  # what the model is given when it is asked again
    strips = FAMILIES["chatml"].template.replace("turn.content", "turn.content.split('</think>')[-1]")
    with pytest.raises(DataError, match=r'leaves out the text of turn 2 \("assistant"\), or part of it'):
        encode(rows_of(thinking), family_tokenizer("chatml", template=strips), max_length=4096, limits=Limits())


def test_a_generation_prompt_that_opens_a_thought_wants_answers_with_one() -> None:
    opens = FAMILIES["chatml"].template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    tokenizer = family_tokenizer("chatml", template=opens)
    with pytest.raises(DataError, match=r"prompt of turn 2 as .*<think>.*a generation prompt that opens a thought"):
        encode(rows_of(CASES["single"]), tokenizer, max_length=4096, limits=Limits())
    encoded = encode(rows_of([user("Two?"), said("<think>\nadd\n</think>\n\nFive.")]), tokenizer, max_length=4096,
                     limits=Limits())
    assert stretches(encoded, tokenizer) == ["add\n</think>\n\nFive.<|im_end|>"]


@pytest.mark.parametrize("family", ["llama3", "mistral", "mistral-spaced", "gemma"])
def test_two_bos_are_refused(family: str) -> None:
    twice = family_tokenizer(family, template="{{- bos_token }}" + FAMILIES[family].template)
    with pytest.raises(DataError, match="begins with two .*; expected one"):
        encode(rows_of(CASES["single"]), twice, max_length=4096, limits=Limits())


@pytest.mark.parametrize("family", ["mistral", "mistral-spaced"])
def test_a_missing_eos_is_not_made_up_for_by_the_next_turns_opener(family: str) -> None:
    """Behind an answer without eos stands [INST], a special token too; it must not be trained as the end."""
    def without(when: str) -> Any:
        return family_tokenizer(family, template=FAMILIES[family].template.replace(
            "turn.content ~ eos_token", f"turn.content ~ ('' if {when} else eos_token)"))

    with pytest.raises(DataError, match="no end-of-turn token.*never stop"):
        encode(rows_of(CASES["multi"]), without("turn.content == 'Five.'"), max_length=4096, limits=Limits())
    last_only = without("not loop.last")
    encoded = encode(rows_of(CASES["multi"]), last_only, max_length=4096, limits=Limits())
    assert stretches(encoded, last_only) == expected(family, CASES["multi"])  # one example a turn, each with its end
    assert encoded.report["turn_by_turn"] == 1
    stops = set(family_tokenizer(family).convert_ids_to_tokens(sorted(terminators(family_tokenizer(family)))))
    assert "</s>" in stops and not {"[INST]", "[/INST]"} & stops


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_of_evaluation_begins_the_training_example(family: str) -> None:
    cases = [CASES[case] for case in CASES if fits(family, case) and case != "call last"]
    tokenizer = family_tokenizer(family)
    rows = rows_of(*cases)
    encoded = encode(rows, tokenizer, max_length=4096, limits=Limits())
    last = dict(zip(encoded.origin, encoded.examples, strict=True))  # of each row the example of its last turn
    for prompt in prompts_and_answers(rows, tokenizer):
        ids, labels = last[prompt.row]["input_ids"], last[prompt.row]["labels"]
        length = len(prompt.input_ids)
        assert ids[:length] == prompt.input_ids
        assert labels[length - 1] == -100 and labels[length] != -100


def test_a_row_that_ends_with_calls_is_not_scored() -> None:
    with pytest.raises(DataError, match="train:1: the conversation ends with tool calls.*expected the assistant's words"):
        prompts_and_answers(rows_of(CASES["call last"]), family_tokenizer("qwen3"))


def test_tools_change_nothing_in_rows_without_them() -> None:
    """A row of another kind may have a column of that name."""
    tokenizer = family_tokenizer("qwen3")
    pair = {"prompt": "Two?", "completion": "Five."}
    plain, named = (encode(rows_from("train", [row]), tokenizer, max_length=99, limits=Limits())
                    for row in (pair, {**pair, "tools": "a hammer"}))
    assert plain.examples == named.examples


def test_the_template_hash_changes_with_what_a_conversation_becomes() -> None:
    base = family_tokenizer("llama3")
    assert template_hash(base) == template_hash(family_tokenizer("llama3")) and len(template_hash(base)) == 64
    other_end = family_tokenizer("llama3")
    other_end.eos_token = "<|eom_id|>"
    several = family_tokenizer("llama3")
    several.chat_template = {"default": FAMILIES["llama3"].template, "tool_use": FAMILIES["qwen3"].template}
    none = family_tokenizer("llama3")
    none.chat_template = None
    changed = [family_tokenizer("llama3", template=FAMILIES["llama3"].template + " "), other_end, several, none,
               family_tokenizer("llama3", adds_bos=False)]
    hashes = [template_hash(base), *(template_hash(tokenizer) for tokenizer in changed)]
    assert len(set(hashes)) == len(hashes)


def test_the_template_hash_survives_saving(tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = family_tokenizer("mistral")
    tokenizer.save_pretrained(tmp_path)
    assert template_hash(AutoTokenizer.from_pretrained(tmp_path)) == template_hash(tokenizer)
