"""`llmops explain`: which items a variant answers otherwise than its parent, at which token, and which layers cause it.

Both variants are loaded from the store. The items come from the ledger; the questions behind them are made anew from
the data that the run was scored on, and known again by their hashes. What changed is kept beside the run
(`runs/RUN/explain/`), and the report shows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops.compare import rows_of
from llmops.errors import LlmopsError, unknown
from llmops.ledger import Ledger
from llmops.pairing import stored_score
from llmops.recipe.schema import Recipe
from llmops.report.figures import number
from llmops.report.reading import group, name_of, parent_of, score_ids, state_of, status_text
from llmops.store import Store, replace_file

if TYPE_CHECKING:
    from llmops.evaluate.score import Item, Score
    from llmops.progress import Watcher

__all__ = ["explain", "explained", "lines", "origin"]

ORIGIN = "origin.json"
TEXT = 400  # characters of a question that are kept
BAR = 24
VIEWED = 128  # tokens of an answer that are looked at one by one


def origin(recipe: Recipe) -> dict[str, Any]:
    """What a run was scored on, as plain values: enough to load its variants and make its questions again."""
    return {"base_dir": str(recipe.base_dir), "seed": recipe.seed, "model": recipe.model.model_dump(mode="json"),
            "runtime": recipe.runtime.model_dump(mode="json"),
            "data": {name: source.model_dump(mode="json", by_alias=True) for name, source in recipe.data.items()},
            "evaluate": [[entry.metric, entry.options.model_dump(mode="json")] for entry in recipe.evaluate]}


def explained(folder: Path) -> list[dict[str, Any]]:
    """What was explained of a run, for its report; a damaged file is passed over."""
    found = []
    for path in sorted((folder / "explain").glob("*.json")):
        try:
            found.append(dict(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return found


def explain(runs: str | None, run: str | None, variant: str, against: str | None = None, *, items: int = 16,
            watcher: Watcher | None = None) -> dict[str, Any]:
    """Everything found, as plain values; written to `runs/RUN/explain/`, and the report is made again.

    items: how many changed items of each score are shown, and run again. Raises LlmopsError for what is not there, a
    variant that is not sound, and data that are not those which were scored.
    """
    rows, store = {name_of(row): row for row in rows_of(runs, run)}, Store(runs)
    row = _sound(variant, rows)
    against = against or parent_of(row)
    if against is None:
        raise LlmopsError(f"{variant} is the model as it came, and has no parent; expected a variant to hold it "
                          "against: name one with --against")
    other = _sound(against, rows)
    if against == variant:
        raise LlmopsError(f"{variant} against itself: nothing differs; name another variant with --against")
    name = str(group(row, "identity").get("run"))
    source = _origin(store.folder(name))
    changed = _changed(store.ledger(), row, other)
    found: dict[str, Any] = {"run": name, "variant": variant, "against": against, "notes": [],
                             "keys": [each["identity"]["key"] for each in (row, other)],
                             "scores": {score: body for score, (body, _) in changed.items()}}
    _models(found, {score: picked[:items] for score, (_, picked) in changed.items()}, source, rows, store, watcher)
    folder = store.folder(name) / "explain"
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"{variant}--{against}.json", json.dumps(found, indent=1, ensure_ascii=False))
    from llmops.runner import publish

    publish(name, store, store.ledger(), list(rows))
    return found


def _sound(variant: str, rows: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if variant not in rows:
        raise LlmopsError(unknown("variant", variant, rows))
    row = rows[variant]
    if state_of(row) != "ok":
        raise LlmopsError(f"{variant} is {status_text(row)}; expected a variant that was built and scored")
    if not row.get("quality"):
        raise LlmopsError(f"{variant} has no scores, so no items to explain; expected `evaluate` in its recipe, and no "
                          "score: false on it")
    return row


def _origin(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / ORIGIN).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise LlmopsError(f"{folder / ORIGIN}: cannot be read ({error}); expected what the run was scored on; run "
                          "`llmops tune` with its recipe again, which writes it and does no work twice") from error


# --------------------------------------------------------------------------------------------------------------- items


def _changed(ledger: Ledger, row: Mapping[str, Any], other: Mapping[str, Any],
             ) -> dict[str, tuple[dict[str, Any], list[tuple[Item, Item]]]]:
    """Score -> (counts, pairs of items that changed: the worst first). A score of other prompts says why not."""
    from llmops.evaluate.statistics import check_comparable

    found: dict[str, tuple[dict[str, Any], list[tuple[Item, Item]]]] = {}
    for score_id in score_ids([row]):
        mine, theirs = (stored_score(ledger, each, score_id) for each in (row, other))
        if mine is None or theirs is None:
            found[score_id] = {"not_comparable": f"{name_of(other)} has no {score_id}"}, []
            continue
        try:
            check_comparable(mine, theirs)
        except LlmopsError as reason:
            found[score_id] = {"not_comparable": str(reason)}, []
            continue
        pairs = sorted(_pairs(mine, theirs), key=lambda pair: _loss(pair[0], pair[1], mine), reverse=True)
        losses = [_loss(item, before, mine) for item, before in pairs]
        lost, gained = sum(loss > 0 for loss in losses), sum(loss < 0 for loss in losses)
        found[score_id] = {"n": len(mine.items), "changed": len(pairs), "lost": lost, "gained": gained}, pairs
    return found


def _pairs(mine: Score, theirs: Score) -> list[tuple[Item, Item]]:
    return [(a, b) for a, b in zip(mine.items, theirs.items, strict=True) if (a.answer, a.score) != (b.answer, b.score)]


def _loss(item: Item, other: Item, score: Score) -> float:
    """How much worse the item got; items of an exp_mean are losses."""
    rising = score.higher_is_better and score.protocol.get("aggregation") != "exp_mean"
    a, b = (each.score if each.score is not None else 0.0 for each in (item, other))
    return b - a if rising else a - b


# -------------------------------------------------------------------------------------------------------------- models


def _models(found: dict[str, Any], picked: Mapping[str, list[tuple[Item, Item]]], source: Mapping[str, Any],
            rows: Mapping[str, Mapping[str, Any]], store: Store, watcher: Watcher | None) -> None:
    """Run both variants: tokens of the items that changed, then the layers."""
    from llmops.evaluate.options import EVALUATIONS, Evaluation
    from llmops.models.load import hush

    hush()
    variant, tokenizer = _load(found["variant"], rows, source, store, found)
    reference, _ = _load(found["against"], rows, source, store, found)
    best: tuple[int, str, list[Any]] = (-1, "", [])  # whose answers the layers are held to: the score that changed most
    for metric, body in source["evaluate"]:
        entry = Evaluation(metric, EVALUATIONS[metric].model_validate(body))
        for score, known in _known(entry, source, reference, tokenizer, found).items():
            counts = found["scores"].get(score, {})
            if "changed" not in counts:
                continue
            lost = sum(item.id not in known for item, _ in picked[score])
            if lost and metric == "harness":
                found["notes"].append(f"{score}: no tokens: {_unasked(lost, len(picked[score]), bool(known))}")
                continue
            if lost:
                raise LlmopsError(f'{score}: the data are not those that were scored ({lost} of {len(picked[score])} '
                                  f'items are not in them); expected "{entry.options.data}" as it was: put it back, or '
                                  "score again")
            shown = _replayed(counts, picked[score], known, entry.options, variant, reference, tokenizer)
            rank = counts["changed"] if metric != "perplexity" else 0  # of windows every one changes
            if rank > best[0]:
                best = rank, score, shown
    _layers(found, best[1], best[2], variant, reference, tokenizer, rows, watcher)


def _known(entry: Any, source: Mapping[str, Any], reference: Any, tokenizer: Any,
           found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Score -> item's id -> Question, of one entry of `evaluate`; {} with a note where lm-eval cannot be asked."""
    from llmops.data.options import DataSource
    from llmops.data.sources import load_rows
    from llmops.evaluate.replay import questions

    options, base_dir = entry.options, Path(source["base_dir"])
    if entry.metric == "harness":
        from llmops.evaluate.harness_replay import harness_questions

        if options.include is not None:
            options = options.model_copy(update={"include": str(base_dir / options.include)})
        try:
            asked = harness_questions(reference, tokenizer, options, entry.id)
        except LlmopsError as reason:
            found["notes"].append(f"{entry.id}: no tokens and layers: {reason}")
            return {}
        return {f"harness:{task}": known for task, known in asked.items()}
    data = {name: DataSource.model_validate(body) for name, body in source["data"].items()}
    rows = load_rows(options.data, data, base_dir, source["seed"])
    return {entry.id: questions(entry.metric, reference, tokenizer, rows, options)}


def _unasked(lost: int, of: int, some: bool) -> str:
    return (f"lm-eval makes other prompts now ({lost} of {of} items are not among them): its version, or the task's "
            "data, changed" if some else "its answers are drawn at random or searched for, and cannot be written again")


def _replayed(counts: dict[str, Any], pairs: Sequence[tuple[Item, Item]], known: Mapping[str, Any], options: Any,
              variant: Any, reference: Any, tokenizer: Any) -> list[Any]:
    """Put the changed items with their tokens into `counts`; returns the questions with the reference's answers."""
    from llmops.evaluate.replay import answered
    from llmops.evaluate.token_view import view

    def cut(sides: Sequence[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
        return [(prompt, answer[:VIEWED]) for prompt, answer in sides]

    asked = [known[item.id] for item, _ in pairs]
    shown = answered(reference, tokenizer, asked, options, [other.answer for _, other in pairs])
    seen = view(variant, reference, tokenizer, cut(shown))
    choices = [dict(zip(question.answers, view(variant, reference, tokenizer, cut([question.side(text) for text in
                                                                                   question.answers])), strict=True))
               if len(question.answers) > 1 else {} for question in asked]
    counts["items"] = [_told(pair, question.text, tokens, each)
                       for pair, question, tokens, each in zip(pairs, asked, seen, choices, strict=True)]
    # where nothing changed the layers are held to the first items all the same
    return shown or answered(reference, tokenizer, list(known.values())[:16], options)


def _load(name: str, rows: Mapping[str, Mapping[str, Any]], source: Mapping[str, Any], store: Store,
          found: dict[str, Any]) -> tuple[Any, Any]:
    from llmops.models.load import load, merged

    key, model, runtime = rows[name]["identity"]["key"], source["model"], source["runtime"]
    place = model["id"] if name == "base" else store.build(key)
    if isinstance(place, Path) and not place.is_dir():
        raise LlmopsError(f"{place}: is not there; run `llmops tune` again, it will be rebuilt")
    loaded, tokenizer = load(place, base_dir=Path(source["base_dir"]), revision=model["revision"],
                             dtype=runtime["dtype"], device=runtime["device"], kernel=runtime["kernel"],
                             trust_remote_code=model["trust_remote_code"])
    if hasattr(loaded, "merge_and_unload"):
        loaded = merged(loaded)
        found["notes"].append(f"{name}: its adapter was merged into its base to be looked at")
    return loaded.eval(), tokenizer


def _told(pair: tuple[Item, Item], text: str, tokens: Sequence[Any], choices: Mapping[str, Sequence[Any]],
          ) -> dict[str, Any]:
    item, other = pair
    first = next((place for place, token in enumerate(tokens) if token.says != token.says_variant), None)
    return {"id": item.id, "question": text if len(text) <= TEXT else f"{text[:TEXT]}…", "groups": item.groups,
            "expected": item.detail.get("expected"), "answer": item.answer, "answer_before": other.answer,
            "score": item.score, "score_before": other.score, "parts_at": first,
            "loglikelihoods": item.detail.get("loglikelihoods"),
            "loglikelihoods_before": other.detail.get("loglikelihoods"), "tokens": [asdict(each) for each in tokens],
            "choices": [{"choice": choice, "delta_logp": sum(token.delta_logp for token in each),
                         "tokens": [asdict(token) for token in each]} for choice, each in choices.items()]}


def _layers(found: dict[str, Any], score: str, shown: Sequence[Any], variant: Any, reference: Any, tokenizer: Any,
            rows: Mapping[str, Mapping[str, Any]], watcher: Watcher | None) -> None:
    from llmops.evaluate.layer_swaps import attribute
    from llmops.evaluate.live import shared_columns

    rotated = [_rotated(name, rows) for name in (found["variant"], found["against"])]
    if rotated[0] != rotated[1]:
        found["layers"] = {"not_swapped": "one of the two is rotated: its layers only make sense together"}
        return
    if not shown:
        found["layers"] = {"not_swapped": "no score has questions that can be asked again"}
        return
    try:
        whole, swaps = attribute(variant, reference, shown, columns=shared_columns(variant, reference, tokenizer),
                                 progress=watcher.progress if watcher is not None else None)
    except LlmopsError as reason:
        found["layers"] = {"not_swapped": str(reason)}
        return

    def plain(each: Any) -> dict[str, Any]:
        return {"block": each.part.block, "kind": each.part.kind, "names": list(each.part.names), "kl": each.kl,
                "delta_logp": each.delta_logp, "turned": each.turned}

    found["layers"] = {"score": score, "answers": len(shown), "tokens": sum(len(answer) for _, answer in shown),
                       "whole": plain(whole), "swaps": [plain(each) for each in swaps]}


def _rotated(name: str, rows: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
    """The rotating steps that a variant stands on."""
    found, at = set(), rows.get(name)
    while at is not None:
        if group(at, "transform", "options").get("rotate"):
            found.add(str(group(at, "identity").get("key")))
        at = rows.get(parent_of(at) or "")
    return frozenset(found)


# --------------------------------------------------------------------------------------------------------------- words


def lines(found: Mapping[str, Any]) -> list[str]:
    """For a terminal: counts, the changed items, a bar for each layer."""
    told = [f"{found['variant']} against {found['against']} (run {found['run']})"]
    for score, body in found["scores"].items():
        if "not_comparable" in body:
            told += ["", f"{score}: not comparable: {body['not_comparable']}"]
            continue
        told += ["", f"{score}: {body['changed']} of {body['n']} items changed, {body['lost']} lost, {body['gained']} "
                     "gained"]
        told += [line for item in body.get("items", []) for line in _item_lines(item)]
    return [*told, "", *_layer_lines(found.get("layers") or {}), *(f"note: {note}" for note in found["notes"])]


def _item_lines(item: Mapping[str, Any]) -> list[str]:
    text = " ".join(str(item["question"]).split())
    groups = "".join(f" [{column}={value}]" for column, value in item["groups"].items())
    if item["answer"] or item["answer_before"]:
        said = (f"    was {item['answer_before']!r}, is {item['answer']!r}"
                + (f", expected {item['expected']!r}" if item["expected"] is not None else ""))
    else:
        said = f"    loss was {number(item['score_before'])}, is {number(item['score'])}"
    worst = sorted(item["tokens"], key=lambda token: -token["kl"])[:3]
    kl = "; ".join(f"{token['token']!r} KL {number(token['kl'])}, p {number(token['p'])} -> {number(token['q'])}"
                   + (f", now {token['says_variant']!r}" if token["says_variant"] != token["says"] else "")
                   for token in worst)
    choices = "; ".join(f"{each['choice']!r} {each['delta_logp']:+.3f}" for each in item.get("choices") or [])
    return [f"  {text[-100:]}{groups}", said, *([f"    {kl}"] if kl else []),
            *([f"    log p of the choices: {choices}"] if choices else [])]


def _layer_lines(layers: Mapping[str, Any]) -> list[str]:
    if "not_swapped" in layers:
        return [f"layers: not swapped: {layers['not_swapped']}"]
    whole, swaps = layers["whole"], sorted(layers["swaps"], key=lambda each: -each["kl"])
    most = max([each["kl"] for each in swaps], default=0.0)
    width = max((len(_called(each)) for each in swaps), default=0)
    told = [f"layers, each alone in {layers['score']}'s parent: KL in nats a token over {layers['tokens']} tokens of "
            f"{layers['answers']} answers (all together: {number(whole['kl'])}, {whole['turned']} answers change)"]
    for each in swaps[:20]:
        bar = "█" * round(BAR * each["kl"] / most) if most > 0 else ""
        told.append(f"  {_called(each):{width}} {bar:{BAR}} {number(each['kl'])}  {each['turned']} of "
                    f"{layers['answers']} answers, log p {each['delta_logp']:+.3f}")
    return told + ([f"  and {len(swaps) - 20} more, all below {number(swaps[20]['kl'])}"] if len(swaps) > 20 else [])


def _called(each: Mapping[str, Any]) -> str:
    return each["kind"] if each["block"] is None else f"block {each['block']} {each['kind']}"
