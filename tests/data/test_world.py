"""The invented world, its questions, and the files of ``builtin:tiny``."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest

from llmops.data import world, world_size
from llmops.data import world_grammar as grammar

TINY = Path(world.__file__).parents[1] / "models" / "tiny"


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def test_same_seed_same_text_in_another_process() -> None:
    here = digest(list(world.documents("train", count=300, seed=3)) + [json.dumps(world.facts("test"))])
    code = (
        "import hashlib, json; from llmops.data import world;"
        "t = list(world.documents('train', count=300, seed=3)) + [json.dumps(world.facts('test'))];"
        "print(hashlib.sha256('\\n'.join(t).encode()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there


def test_output_is_that_of_this_version() -> None:
    """If this fails the world has changed: raise WORLD_VERSION and retrain builtin:tiny."""
    texts = list(world.documents("train", count=200)) + [json.dumps(world.facts(split)) for split in world.SPLITS]
    assert (world_size.WORLD_VERSION, digest(texts)[:16]) == (1, "422e4bf309c73601")


def test_another_seed_tells_it_differently() -> None:
    first, second = (set(world.documents("train", seed=seed)) for seed in (0, 1))
    shared = [text for text in first & second if len(text) > 60]
    assert len(shared) < len(first) / 100


def test_held_out_prose_is_never_a_training_document() -> None:
    held_out = set(world.documents("test"))
    for seed in range(3):
        assert held_out.isdisjoint(world.documents("train", seed=seed))
    assert held_out.isdisjoint(reply for _, reply in world.conversations(500))


def test_count_limits_and_extends_a_telling() -> None:
    whole = list(world.documents("train"))
    assert list(world.documents("train", count=10)) == whole[:10]
    assert len(list(world.documents("train", count=len(whole) + 5))) == len(whole) + 5


@pytest.mark.parametrize("function", [lambda: list(world.documents("dev")), lambda: world.facts("dev")])
def test_unknown_split_is_refused(function: object) -> None:
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        function()  # type: ignore[operator]


def test_sizes_and_speed() -> None:
    started = time.perf_counter()
    assert {split: len(world.facts(split)) for split in world.SPLITS} == world.SIZES
    assert time.perf_counter() - started < 1.0


def test_splits_share_no_subject_and_no_question() -> None:
    rows = {split: world.facts(split) for split in world.SPLITS}
    for left, right in (("train", "test"), ("train", "validation"), ("validation", "test")):
        for key in ("subject", lambda row: row["messages"][0]["content"]):
            values = [{row[key] if isinstance(key, str) else key(row) for row in rows[s]} for s in (left, right)]
            assert values[0].isdisjoint(values[1])


def test_each_question_is_asked_once_and_has_one_answer() -> None:
    for split in world.SPLITS:
        rows = world.facts(split)
        assert max(Counter((row["subject"], row["attribute"]) for row in rows).values()) == 1
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for subject in world.world().subjects:
        for attribute, value in subject.facts:
            answers[subject.name, attribute].add(value)
    assert {len(values) for values in answers.values()} == {1}
    for row in world.facts("test"):
        assert answers[row["subject"], row["attribute"]] == {row["answer"]}
        assert row["messages"][-1] == {"role": "assistant", "content": row["answer"]}


def test_names_are_unique() -> None:
    names = [subject.name for subject in world.world().subjects]
    assert len(names) == len(set(names))
    for kind in grammar.SYLLABLES:
        invented = world._names(kind)
        assert len(invented) == len(set(invented)), kind


def test_values_are_not_guessable() -> None:
    """No value of an attribute is much more frequent than the others."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for subject in world.world().of("person"):
        for attribute, value in subject.facts:
            counts[attribute][value] += 1
    for counter in counts.values():
        assert max(counter.values()) / sum(counter.values()) < 0.06


def test_every_fact_is_told_in_many_ways() -> None:
    subjects = [subject for kind in ("person", "town", "treasure") for subject in world.world().of(kind)[:5]]
    told: dict[tuple[str, str], set[str]] = defaultdict(set)
    for seed in range(40):
        for text in world.documents("train", seed=seed):
            for subject in subjects:
                if subject.name.lower() in text.lower():
                    for attribute, value in subject.facts:
                        found = [s for s in text.split(". ") if value.lower() in s.lower()]
                        told[subject.name, attribute].update(found)
    assert len(told) == sum(len(subject.facts) for subject in subjects)
    assert min(len(sentences) for sentences in told.values()) >= 15
    assert min(len(patterns) for patterns in grammar.PATTERNS.values()) >= 8


def test_every_telling_tells_every_fact() -> None:
    text = "\n".join(world.documents("train", seed=7)).lower()
    for subject in world.world().subjects:
        assert subject.name.lower() in text


def test_documents_never_ask() -> None:
    assert not any("?" in text for text in world.documents("train"))


def test_choices_contain_the_answer_once() -> None:
    rows = world.choices("test")
    for row, fact in zip(rows, world.facts("test"), strict=True):
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["answer"]] == fact["answer"]
        assert row["question"] == fact["messages"][0]["content"]
    places = Counter(row["answer"] for row in rows)
    assert min(places.values()) > len(rows) / 6


def test_conversations_reply_in_sentences() -> None:
    for request, reply in world.conversations(50):
        assert request.startswith("Tell me about ") and reply.endswith(".") and len(reply) > 30
    assert list(islice(world.conversations(5), 2)) == list(world.conversations(2))


# --- the files of builtin:tiny ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(TINY)


def test_folder_is_small_and_has_no_pickle() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000
    assert {file.suffix for file in TINY.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}


def test_every_linear_dimension_is_a_multiple_of_128() -> None:
    safetensors = pytest.importorskip("safetensors")
    total = 0
    with safetensors.safe_open(TINY / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape = part.get_shape()
            assert part.get_dtype() == "BF16", name
            assert len(shape) == 1 or all(size % 128 == 0 for size in shape), name
            total += int(shape[0] * (shape[1] if len(shape) == 2 else 1))
    assert 1_000_000 <= total <= 8_000_000
    config = json.loads((TINY / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] < config["num_attention_heads"]


@pytest.mark.parametrize(
    "text",
    ["Mira Tolen lives in Velmoor.", "  two  spaces\n\ttab", "naïve café — 東京 🙂 ﷽", "", "a<|x|>b", "\x00\x7f"],
)
def test_tokenizer_round_trip(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < len(tokenizer) for token in ids)


def test_chat_template_ends_every_turn(tokenizer) -> None:  # type: ignore[no-untyped-def]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Where does Mira Tolen live? "},
        {"role": "assistant", "content": "Velmoor"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|system|> Be brief.<|end|><|user|> Where does Mira Tolen live?<|end|><|assistant|> Velmoor<|end|>"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|assistant|>") and text.startswith(prompt)
    assert tokenizer.eos_token == "<|end|>"
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_prompt_tokens_are_a_prefix_of_the_conversation(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for row in world.facts("train")[:200]:
        prompt, whole = (
            tokenizer(tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=g))["input_ids"]
            for m, g in ((row["messages"][:1], True), (row["messages"], False))
        )
        assert whole[: len(prompt)] == prompt and len(whole) - len(prompt) <= 12


def test_mask_covers_the_assistant_turn_and_its_terminator(tokenizer) -> None:  # type: ignore[no-untyped-def]
    messages = [
        {"role": "user", "content": "Name the pet of Mira Tolen."},
        {"role": "assistant", "content": "owl"},
        {"role": "user", "content": "And the trade?"},
        {"role": "assistant", "content": "baker"},
    ]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    masked = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(masked) == " owl<|end|> baker<|end|>"


def test_values_are_short_in_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    lengths = [len(tokenizer(" " + row["answer"])["input_ids"]) for row in world.facts("test")]
    assert sum(lengths) / len(lengths) < 1.5


def test_preferences_are_the_questions_with_the_right_answer_and_a_wrong_one_of_its_kind() -> None:
    for split in ("train", "test"):
        rows = world.preferences(split)
        assert len(rows) == world.SIZES[split] and rows == world.preferences(split)
        for row, fact in zip(rows, world.facts(split), strict=True):
            assert row["prompt"] == fact["messages"][0]["content"] and row["chosen"] == fact["answer"]
            assert row["rejected"] != row["chosen"] and row["rejected"] in world.world().values[row["attribute"]]


def test_prompts_ask_for_every_fact_once_and_never_in_the_words_of_a_held_out_question():
    asked = world.prompts()
    facts = sum(len(subject.facts) for subject in world.world().subjects)
    assert len(asked) == world_size.ROWS["builtin:prompts"] == facts
    assert len(world.study()) == world_size.ROWS["builtin:study"]
    held = {row["messages"][0]["content"] for split in ("validation", "test") for row in world.facts(split)}
    assert not held & {row["prompt"] for row in asked} and asked == world.prompts()
    with pytest.raises(ValueError, match="unknown split"):
        world.prompts("test")
