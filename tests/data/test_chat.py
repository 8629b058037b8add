"""The loss mask of chats: proved against the text, for the templates of four families and some awkward ones."""

from __future__ import annotations

from typing import Any

import pytest
from tests.data.makers import CHATML, FAMILIES, chat, make_tokenizer, message_rows, trained

from llmops.data.chat import render_chat, terminators
from llmops.data.options import Limits
from llmops.data.render import encode, prompts_and_answers
from llmops.errors import DataError

CONVERSATIONS = {
    "single": chat("Where does the old miller live?", "He lives in Velmoor."),
    "multi": chat("What is two and three?", "Five.", "And the river?", "It is ☂ naïve, 12.5 %.", "Ok?", "Yes\nand no."),
    "system": chat("Two and three?", "They make five.", "Sure?", "Yes.", system="You are brief."),
    "injected": chat("What ends a turn?", "A line break \n\n, I think", "Yes?", "  spaces around  "),
}


def encoded(messages: list[dict[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    return encode(message_rows(messages), tokenizer, max_length=4096, limits=Limits()).examples


def brute_force_mask(text: str, answers: list[str], ids: list[int], tokenizer: Any) -> list[bool]:
    """Character by character: find each answer in the text, then ask of every token which bytes it stands for."""
    wanted = bytearray(len(text.encode()))
    at = 0
    for answer in answers:
        at = text.index(answer, at)
        first, last = len(text[:at].encode()), len(text[:at + len(answer)].encode())
        wanted[first:last] = b"\1" * (last - first)
        at += len(answer)
    mask, position = [], 0
    alphabet = {character: byte for byte, character in enumerate(_byte_alphabet())}
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in tokenizer.convert_ids_to_tokens(ids):
        raw = token.encode() if tokenizer.convert_tokens_to_ids(token) in special else bytes(alphabet[c] for c in token)
        assert text.encode()[position:position + len(raw)] == raw
        mask.append(any(wanted[position:position + len(raw)]))
        position += len(raw)
    assert position == len(text.encode())
    return mask


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


#: Gemma's refuses system turns: see test_a_system_turn_that_the_template_refuses_moves_into_the_users.
CASES = [(family, name) for family in ("llama3", "chatml", "mistral", "gemma", "marked") for name in CONVERSATIONS
         if (family, name) != ("gemma", "system")]


@pytest.mark.parametrize(("family", "conversation"), CASES)
@pytest.mark.parametrize("trims", [False, True], ids=["plain-offsets", "trimmed-offsets"])
def test_the_loss_stands_on_the_assistants_text_and_its_terminator(family: str, conversation: str, trims: bool) -> None:
    messages = CONVERSATIONS[conversation]
    tokenizer = make_tokenizer(family, adds_bos=True, trims_offsets=trims)
    end = FAMILIES[family][4]
    (example,) = encoded(messages, tokenizer)
    trim = family in ("llama3", "gemma")
    lead = " " if family == "mistral" else ""
    answers = [lead + (m["content"].strip() if trim else m["content"]) + end
               for m in messages if m["role"] == "assistant"]
    assert trained(example, tokenizer) == answers
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert example["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = brute_force_mask(text, answers, example["input_ids"], tokenizer)
    assert [label != -100 for label in example["labels"]] == mask


@pytest.mark.parametrize("family", ["llama3", "chatml", "mistral", "gemma", "marked"])
def test_the_prompt_of_evaluation_begins_the_training_example(family: str) -> None:
    tokenizer = make_tokenizer(family)
    rows = message_rows(CONVERSATIONS["multi"])
    (example,) = encode(rows, tokenizer, max_length=4096, limits=Limits()).examples
    (prompt,) = prompts_and_answers(rows, tokenizer)
    length = len(prompt.input_ids)
    assert example["input_ids"][:length] == prompt.input_ids
    assert example["labels"][length - 1] == -100 and example["labels"][length] != -100
    assert prompt.answer == "Yes\nand no."


def test_turns_that_later_turns_change_become_examples_of_their_own() -> None:
    tokenizer = make_tokenizer("thinking")
    messages = CONVERSATIONS["system"]
    result = encode(message_rows(messages, CONVERSATIONS["single"]), tokenizer, max_length=4096, limits=Limits())
    assert [trained(example, tokenizer) for example in result.examples] == [
        ["<think></think>They make five.<|im_end|>"], ["<think></think>Yes.<|im_end|>"],
        ["<think></think>He lives in Velmoor.<|im_end|>"]]
    assert result.origin == [0, 0, 1]
    assert result.report["turn_by_turn"] == 1 and result.report["examples"] == 3 and result.report["rows"] == 2
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(result.examples[1]["input_ids"]).startswith(asked)


def test_a_prompt_that_does_not_begin_its_turn_is_refused() -> None:
    template = ("{% for turn in messages %}{{ '<|im_start|>' ~ messages | length ~ turn.content ~ '<|im_end|>' }}"
                "{% endfor %}")
    with pytest.raises(DataError, match=r"train, row 1: .*prompt of turn 2.*\{% generation %\}"):
        render_chat(CONVERSATIONS["single"], make_tokenizer("chatml", template=template), "train, row 1")


@pytest.mark.parametrize("template", [
    "{% for turn in messages %}{{ turn.role ~ ': ' ~ turn.content ~ '\\n' }}{% endfor %}",
    "{% for turn in messages %}{{ '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content }}{% endfor %}",
    "{% for turn in messages %}{{ '<|im_start|>' ~ turn.role ~ '\\n' }}{% generation %}{{ turn.content }}"
    "{% endgeneration %}{% endfor %}",
    CHATML.replace("~ '<|im_end|>\\n' }}", "~ ('' if loop.last else '<|im_end|>\\n') }}"),
    CHATML.replace("'<|im_end|>\\n'", "'<|im_start|>\\n'"),
], ids=["no-special-token", "only-openers", "marked", "not-the-last", "an-opener-behind"])
def test_a_template_that_drops_the_terminator_is_refused(template: str) -> None:
    tokenizer = make_tokenizer("chatml", template=template)
    with pytest.raises(DataError, match="end-of-turn token.*never stop.*<|im_end|>.*add it to the template"):
        encoded(CONVERSATIONS["multi"], tokenizer)


def test_what_follows_the_terminator_is_not_trained() -> None:
    template = CHATML.replace("~ '<|im_end|>\\n' }}", "~ '<|im_end|>\\n \\n\\n' }}")
    tokenizer = make_tokenizer("chatml", template=template)
    (example,) = encoded(CONVERSATIONS["single"], tokenizer)
    assert trained(example, tokenizer) == ["He lives in Velmoor.<|im_end|>"]
    assert example["labels"][-1] == -100


def test_a_mark_that_holds_the_terminator_is_kept_as_it_is() -> None:
    template = FAMILIES["marked"][0].replace("{% endgeneration %}", "{{ '<|im_end|>' }}{% endgeneration %}").replace(
        "{{ '<|im_end|>\\n' }}", "{{ '\\n' if turn.role == 'assistant' else '<|im_end|>\\n' }}")
    tokenizer = make_tokenizer("marked", template=template)
    (example,) = encoded(CONVERSATIONS["single"], tokenizer)
    assert trained(example, tokenizer) == ["He lives in Velmoor.<|im_end|>"]


def test_terminators_are_those_that_end_a_turn() -> None:
    for family, ends in {"llama3": {"<|eot_id|>"}, "chatml": {"<|endoftext|>", "<|im_end|>"},
                         "gemma": {"<eos>", "<end_of_turn>"}}.items():
        tokenizer = make_tokenizer(family)
        assert ends <= set(tokenizer.convert_ids_to_tokens(sorted(terminators(tokenizer))))
        opener = {"llama3": "<|start_header_id|>", "chatml": "<|im_start|>", "gemma": "<start_of_turn>"}[family]
        assert tokenizer.convert_tokens_to_ids(opener) not in terminators(tokenizer)
        assert not {tokenizer.bos_token_id, tokenizer.pad_token_id} & terminators(tokenizer)


def test_a_system_turn_that_the_template_refuses_moves_into_the_users() -> None:
    tokenizer = make_tokenizer("gemma")
    rows = message_rows(CONVERSATIONS["system"], CONVERSATIONS["single"])
    result = encode(rows, tokenizer, max_length=4096, limits=Limits())
    assert tokenizer.decode(result.examples[0]["input_ids"]).startswith(
        "<bos><start_of_turn>user\nYou are brief.\n\nTwo and three?<end_of_turn>\n<start_of_turn>model\n")
    assert trained(result.examples[0], tokenizer) == ["They make five.<end_of_turn>", "Yes.<end_of_turn>"]
    assert result.report["system_folded"] == 1
    (asked, _) = prompts_and_answers(rows, tokenizer)
    assert result.examples[0]["input_ids"][:len(asked.input_ids)] == asked.input_ids


def test_a_refused_role_names_the_row_and_the_templates_reason() -> None:
    picky = make_tokenizer("gemma", template=FAMILIES["gemma"][0].replace("'system'", "'assistant'").replace(
        "no system", "no assistant"))
    with pytest.raises(DataError, match="train, row 1: the chat template refuses the turns user, assistant.*no "
                                        "assistant turns"):
        encoded(CONVERSATIONS["single"], picky)
    never = make_tokenizer("gemma", template="{{ raise_exception('never') }}")
    with pytest.raises(DataError, match=r"train, row 1: the chat template refuses the turns system, user \(never\)"):
        encoded(CONVERSATIONS["system"], never)


def test_two_bos_are_refused() -> None:
    twice = make_tokenizer("llama3", template="{{ bos_token }}" + FAMILIES["llama3"][0])
    with pytest.raises(DataError, match=r"two <\|begin_of_text\|>; expected one"):
        encoded(CONVERSATIONS["single"], twice)
    with pytest.raises(DataError, match=r"two <\|begin_of_text\|>"):
        prompts_and_answers(message_rows(CONVERSATIONS["single"]), twice)


def test_a_tokenizer_that_adds_bos_does_not_add_a_second_to_a_template() -> None:
    tokenizer = make_tokenizer("llama3", adds_bos=True)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    (example,) = encoded(CONVERSATIONS["single"], tokenizer)
    assert example["input_ids"].count(tokenizer.bos_token_id) == 1


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(DataError, match="no chat template; expected a chat model"):
        encoded(CONVERSATIONS["single"], make_tokenizer())


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False
        chat_template = CHATML

        def __init__(self) -> None:
            self.fast = make_tokenizer("chatml")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.fast, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return self.fast(*args, **options)

    with pytest.raises(DataError, match="Slow.*tokenizer.json"):
        encoded(CONVERSATIONS["single"], Slow())
