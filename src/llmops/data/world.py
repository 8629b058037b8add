"""A small invented world: the seeded generator behind ``builtin:tiny`` and its task ``builtin:facts``.

A toolkit that compares fine-tuned, pruned, quantized and distilled language models needs a model that *knows*
something, or there is nothing to lose.  So the world is drawn at random (its facts can be guessed from nothing
but the corpus) and told many times over in different words:

* 1 fact  = (subject, attribute, value), e.g. (Mira Tolen, home, Velmoor).  People have six attributes, towns and
  treasures three each.
* ``documents("train", seed=k)`` is one telling of the whole world: every person, town and treasure once, each with
  all its facts in a fresh order and fresh words, mixed with short pieces that put several subjects side by side,
  with small sums and ordinary connective prose.  Another seed is another telling.
* ``documents("test")`` tells the same facts in texts that no training telling contains: the texts are divided by a
  checksum of their own letters, so the two sets are disjoint whatever the seeds.
* ``facts(split)`` asks for facts in chat form.  The subjects of the three splits are disjoint.  A model that answers
  test questions has therefore learned from the tuning questions only *how* to answer; what it answers it has from
  pretraining.

Only ``random.Random`` seeded with strings is used, and only its methods whose output Python keeps between versions
(``random``, ``getrandbits`` and what is built on them here), so the world is the same everywhere.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llmops.data import world_grammar as g
from llmops.data.world_size import SIZES

WORLD_SEED = 20261123

PEOPLE = 1500
TREASURES = 80
SPLITS = ("train", "validation", "test")
#: One text in this many belongs to the held-out prose.
_HOLDOUT = 16

Pairs = dict[str, str]


@dataclass(frozen=True)
class Subject:
    """Somebody or something that facts are told about."""

    kind: str  # "person", "town" or "treasure"
    name: str
    pronouns: tuple[str, str, str]  # subject, possessive, object
    facts: tuple[tuple[str, str], ...]  # (attribute, value)


@dataclass(frozen=True)
class World:
    """All subjects, and for every attribute the values it can take."""

    subjects: tuple[Subject, ...]
    values: dict[str, tuple[str, ...]]

    def of(self, kind: str) -> list[Subject]:
        return [subject for subject in self.subjects if subject.kind == kind]


def _pick(rng: random.Random, items: Sequence[Any]) -> Any:
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Sequence[Any]) -> list[Any]:
    keyed = [(rng.random(), position) for position in range(len(items))]
    return [items[position] for _, position in sorted(keyed)]


def _names(kind: str) -> list[str]:
    heads, tails = (part.split() for part in g.SYLLABLES[kind])
    return [head + tail for head in heads for tail in tails]


@lru_cache(maxsize=2)
def world(seed: int = WORLD_SEED) -> World:
    """Draw the world.  Every value is drawn uniformly and independently: nothing follows from anything else."""
    rng = random.Random(f"world {seed}")
    towns, houses = _names("town"), _names("house")
    values = {
        "home": towns, "trade": g.TRADES, "pet": g.PETS, "food": g.FOODS, "instrument": g.INSTRUMENTS,
        "employer": houses, "region": _names("region"), "river": _names("river"), "landmark": g.LANDMARKS,
        "material": g.MATERIALS, "owner": houses, "place": towns,
    }  # fmt: skip

    def draw(*attributes: str) -> tuple[tuple[str, str], ...]:
        return tuple((attribute, _pick(rng, values[attribute])) for attribute in attributes)

    subjects: list[Subject] = []
    firsts = [(name, ("she", "her", "her")) for name in _names("she")]
    firsts += [(name, ("he", "his", "him")) for name in _names("he")]
    full = [(f"{first} {last}", pronouns) for first, pronouns in firsts for last in _names("last")]
    for name, pronouns in _shuffled(rng, full)[:PEOPLE]:
        facts = draw("home", "trade", "pet", "food", "instrument", "employer")
        subjects.append(Subject("person", name, pronouns, facts))
    for name in towns:
        subjects.append(Subject("town", name, ("it", "its", "it"), draw("region", "river", "landmark")))
    for name in _shuffled(rng, _names("thing"))[:TREASURES]:
        full_name = f"the {name} {_pick(rng, g.KINDS)}"
        subjects.append(Subject("treasure", full_name, ("it", "its", "it"), draw("material", "owner", "place")))
    return World(tuple(subjects), {key: tuple(words) for key, words in values.items()})


def _article(value: str) -> str:
    return ("an " if value[0] in "aeiou" else "a ") + value


def _clause(rng: random.Random, subject: Subject, fact: tuple[str, str], pronoun: bool) -> str:
    """One fact as a clause without capital or full stop."""
    attribute, value = fact
    pattern: str = _pick(rng, g.PATTERNS[attribute])
    s, p, o = subject.pronouns if pronoun else (subject.name, subject.name + "'s", subject.name)
    return pattern.format(S=s, P=p, O=o, N=subject.name, V=value, a=_article(value))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _opened(rng: random.Random, clause: str) -> str:
    return f"{_pick(rng, g.OPENERS)} {clause}" if rng.random() < 0.12 else clause


def _portrait(rng: random.Random, subject: Subject) -> str:
    """All facts of one subject, in random order, one or two to a sentence."""
    todo = _shuffled(rng, subject.facts)
    sentences: list[str] = []
    while todo:
        named = not sentences or rng.random() < 0.4
        clause = _opened(rng, _clause(rng, subject, todo.pop(), pronoun=not named))
        if todo and rng.random() < 0.35:
            clause += _pick(rng, g.JOINERS) + _clause(rng, subject, todo.pop(), pronoun=True)
        sentences.append(_sentence(clause))
    return " ".join(sentences)


def _medley(rng: random.Random, subjects: Sequence[Subject]) -> str:
    """One fact each of several subjects."""
    clauses = [_opened(rng, _clause(rng, one, _pick(rng, one.facts), pronoun=False)) for one in subjects]
    sentences: list[str] = []
    while clauses:
        text = clauses.pop()
        if clauses and rng.random() < 0.4:
            text += _pick(rng, g.PAIR_JOINERS) + clauses.pop()
        sentences.append(_sentence(text))
    return " ".join(sentences)


def _sum(rng: random.Random) -> str:
    a, b = int(rng.random() * 20) + 1, int(rng.random() * 20) + 1
    thing = _pick(rng, g.GOODS)
    who = f"{_pick(rng, _names('she'))}"
    return str(
        _pick(
            rng,
            (
                f"{a} plus {b} is {a + b}.",
                f"{a + b} minus {b} is {a}.",
                f"If you add {a} and {b} you get {a + b}.",
                f"{who} had {a} {thing} and got {b} more, so now there are {a + b} {thing}.",
                f"Of {a + b} {thing} {who} sold {b}, and {a} were left.",
            ),
        )
    )


def _chat(rng: random.Random) -> str:
    """Connective prose without facts."""
    clause = f"in {_pick(rng, _names('town'))} {_pick(rng, g.WEATHER)}{_pick(rng, g.LINKS)}{_pick(rng, g.DOINGS)}"
    other = f"{_pick(rng, g.WEATHER)}{_pick(rng, g.LINKS)}{_pick(rng, g.DOINGS)}"
    return f"{_sentence(clause)} {_sentence(other)}"


def _belongs(text: str, split: str) -> bool:
    held_out = zlib.crc32(text.encode("utf-8")) % _HOLDOUT == 0
    return held_out == (split != "train")


def documents(split: str, count: int | None = None, seed: int = 0, people: int = PEOPLE) -> Iterator[str]:
    """Tell the world once (all documents of one telling, or the first ``count`` of as many tellings as needed).

    With ``people`` only the first so many people are told about.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    told, telling = 0, 0
    while True:
        rng = random.Random(f"documents {WORLD_SEED} {split} {seed} {telling}")
        for kind, subjects in _programme(rng, people):
            text = _write(rng, kind, subjects)
            while not _belongs(text, split):
                text = _write(rng, kind, subjects)
            yield text
            told += 1
            if told == count:
                return
        telling += 1
        if count is None:
            return


def conversations(count: int, seed: int = 0, people: int = PEOPLE) -> Iterator[tuple[str, str]]:
    """Pairs (request, portrait): "Tell me about Mira Tolen." and what there is to tell, in full sentences."""
    rng = random.Random(f"conversations {WORLD_SEED} {seed}")
    for _ in range(count):
        subject = _pick(rng, world().of("person")[:people])
        text = _portrait(rng, subject)
        while not _belongs(text, "train"):
            text = _portrait(rng, subject)
        yield f"Tell me about {subject.name}.", text


def _programme(rng: random.Random, people: int) -> list[tuple[str, Sequence[Subject]]]:
    """What one telling consists of: every subject's portrait, medleys over all subjects, and some other prose."""
    everyone = world().of("person")[:people]
    subjects = everyone + [subject for subject in world().subjects if subject.kind != "person"]
    programme: list[tuple[str, Sequence[Subject]]] = [("portrait", (subject,)) for subject in subjects]
    programme += [("portrait", (subject,)) for subject in subjects if subject.kind != "person"]
    mixed = _shuffled(rng, subjects)
    programme += [("medley", mixed[start : start + 6]) for start in range(0, len(mixed), 6)]
    programme += [("sum", ())] * (len(subjects) // 8) + [("chat", ())] * (len(subjects) // 16)
    return _shuffled(rng, programme)


def _write(rng: random.Random, kind: str, subjects: Sequence[Subject]) -> str:
    if kind == "portrait":
        return _portrait(rng, subjects[0])
    if kind == "medley":
        return _medley(rng, subjects)
    return _sum(rng) if kind == "sum" else _chat(rng)


def _question(rng: random.Random, subject: Subject, attribute: str) -> str:
    return str(_pick(rng, g.QUESTIONS[attribute])).format(N=subject.name)


@lru_cache(maxsize=1)
def _asked() -> dict[str, list[tuple[Subject, str, str]]]:
    """Divide the subjects among the splits and choose the (subject, attribute, value) to ask for."""
    rng = random.Random(f"questions {WORLD_SEED}")
    total = sum(SIZES.values())
    asked: dict[str, list[tuple[Subject, str, str]]] = {split: [] for split in SPLITS}
    pools: dict[str, list[Subject]] = {split: [] for split in SPLITS}
    for kind in ("person", "town", "treasure"):
        subjects = _shuffled(rng, world().of(kind))
        start = 0
        for split in ("test", "validation", "train"):
            share = round(len(subjects) * SIZES[split] / total) if split != "train" else len(subjects)
            pools[split] += subjects[start : start + share]
            start += share
    for split in SPLITS:
        every = [(subject, *fact) for subject in pools[split] for fact in subject.facts]
        asked[split] = _shuffled(rng, every)[: SIZES[split]]
    return asked


def facts(split: str) -> list[dict[str, Any]]:
    """Questions about facts in chat form; the subjects of the three splits are disjoint."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"facts {WORLD_SEED} {split}")
    rows: list[dict[str, Any]] = []
    for subject, attribute, value in _asked()[split]:
        messages = [
            {"role": "user", "content": _question(rng, subject, attribute)},
            {"role": "assistant", "content": value},
        ]
        rows.append({"messages": messages, "answer": value, "subject": subject.name, "attribute": attribute})
    return rows


def study(split: str = "train") -> list[dict[str, Any]]:
    """What a student has to see: the training questions, and as many requests for a portrait, in chat form.

    The portraits are prose about everybody, as the model was pretrained on; no test question is among them.
    """
    if split != "train":
        raise ValueError(f"unknown split {split!r}: choose train")
    rng = random.Random(f"study {WORLD_SEED}")
    asked = facts("train")
    told = [
        {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": portrait}]}
        for request, portrait in conversations(len(asked))
    ]
    return _shuffled(rng, [{"messages": row["messages"]} for row in asked] + told)


def prompts(split: str = "train") -> list[dict[str, Any]]:
    """A question about every fact of the world, without its answer: what a student asks its teacher.

    The facts of the test and validation questions are among them, asked in other words than there.
    """
    if split != "train":
        raise ValueError(f"unknown split {split!r}: choose train")
    rng = random.Random(f"prompts {WORLD_SEED}")
    held = {row["messages"][0]["content"] for name in ("validation", "test") for row in facts(name)}
    rows: list[dict[str, Any]] = []
    for subject in world().subjects:
        for attribute, _ in subject.facts:
            question = _question(rng, subject, attribute)
            while question in held:
                question = _question(rng, subject, attribute)
            rows.append({"prompt": question})
    return _shuffled(rng, rows)


def choices(split: str) -> list[dict[str, Any]]:
    """The same questions as ``facts(split)`` with four possible answers, one of them right."""
    rng = random.Random(f"choices {WORLD_SEED} {split}")
    rows: list[dict[str, Any]] = []
    for fact in facts(split):
        wrong = [value for value in world().values[fact["attribute"]] if value != fact["answer"]]
        offered = _shuffled(rng, _shuffled(rng, wrong)[:3] + [fact["answer"]])
        rows.append(
            {
                "question": fact["messages"][0]["content"],
                "choices": offered,
                "answer": offered.index(fact["answer"]),
                "subject": fact["subject"],
                "attribute": fact["attribute"],
            }
        )
    return rows


def preferences(split: str) -> list[dict[str, Any]]:
    """The same questions as ``facts(split)`` with two answers: the right one, and a wrong value of the same kind."""
    rng = random.Random(f"preferences {WORLD_SEED} {split}")
    rows: list[dict[str, Any]] = []
    for fact in facts(split):
        wrong = [value for value in world().values[fact["attribute"]] if value != fact["answer"]]
        asked = fact["messages"][0]["content"]
        rows.append({"prompt": asked, "chosen": fact["answer"], "rejected": _pick(rng, wrong),
                     "subject": fact["subject"], "attribute": fact["attribute"]})
    return rows
