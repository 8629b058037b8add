"""Changed answers, side by side and token by token, and a picture of the layers that cause them.

What is shown was found by `llmops explain` and lies beside the run; a report of a run that nobody asked to be explained
has no such section.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.report.bits import shades
from llmops.report.figures import number
from llmops.report.markup import Markup, tag
from llmops.report.reading import group, name_of
from llmops.report.sections import NOTHING, Page, scrolled

__all__ = ["layer_map", "section"]

LEFT, TOP, ROW, MOST = 150, 6, 20, 560
HOT = (0.02, 0.2, 1.0)  # nats a token from which it is shaded


def section(page: Page, explained: Sequence[Mapping[str, Any]]) -> Markup:
    """One part for each variant that was explained, where its build is still the one that was looked at."""
    keys = {name_of(row): group(row, "identity").get("key") for row in page.rows}
    current = [found for found in explained if found.get("keys") == [keys.get(found.get("variant", "")),
                                                                     keys.get(found.get("against", ""))]]
    if not current:
        return NOTHING
    note = ("Items that a variant answers otherwise than the one it is held against. Tokens are those of the other's "
            "answer, or of every choice, with how much likelier that became (log p, nats); the darker, the further "
            "apart the two are there (KL in nats); underlined: where the variant would say another.")
    return tag("section", tag("h2", "Changed answers, and why", id="why"), tag("p", note, class_="dim"),
               [_part(found) for found in current], aria_labelledby="why")


def _part(found: Mapping[str, Any]) -> Markup:
    title = f"{found['variant']} against {found['against']}"
    layers = found.get("layers") or {}
    picture = tag("p", f"Layers were not swapped: {layers.get('not_swapped')}", class_="dim") \
        if "swaps" not in layers else tag("figure", tag("figcaption", _caption(layers)),
                                          scrolled(f"Layers of {title}", layer_map(layers, title)))
    return Markup(tag("h3", title) + "".join(_score(score, body) for score, body in found["scores"].items()) + picture)


def _score(score: str, body: Mapping[str, Any]) -> Markup:
    if "not_comparable" in body:
        return tag("p", f"{score}: not comparable: {body['not_comparable']}", class_="bad")
    head = (f"{score}: {body['changed']} of {body['n']} items changed, {body['lost']} got worse, {body['gained']} got "
            "better")
    items = body.get("items") or []
    if not items:
        return tag("p", head)
    columns = tag("tr", [tag("th", each, scope="col") for each in ("Question", "Expected", "Before", "Now", "Tokens")])
    rows = [tag("tr", tag("td", str(item["question"])), tag("td", str(item.get("expected") or "")),
                tag("td", _said(item, "_before")), tag("td", _said(item, "")),
                tag("td", _tokens(item))) for item in items]
    table = tag("table", tag("thead", columns), tag("tbody", rows), class_="plain")
    return tag("details", tag("summary", head), scrolled(f"Changed items of {score}", table))


def _said(item: Mapping[str, Any], when: str) -> str:
    answer, score = item[f"answer{when}"], item[f"score{when}"]
    return str(answer) if answer else f"loss {number(score)}" if isinstance(score, int | float) else "nothing"


def _tokens(item: Mapping[str, Any]) -> list[Markup]:
    """Of the other's answer; of a question with choices those of every choice, and how its log-probability changed."""
    choices = item.get("choices") or []
    if not choices:
        return [_token(token) for token in item["tokens"][:64]]
    return [tag("div", [*(_token(token) for token in each["tokens"][:64]), " ",
                        tag("span", f"log p {each['delta_logp']:+.2f}", class_="dim")]) for each in choices]


def _token(token: Mapping[str, Any]) -> Markup:
    heat = sum(token["kl"] >= step for step in HOT)
    other = token["says_variant"] != token["says"]
    change = token.get("delta_logp")
    said = (f"KL {number(token['kl'])}; probability {number(token['p'])} before, {number(token['q'])} now"
            + (f", log-probability {change:+.3f}" if isinstance(change, int | float) else "")
            + (f"; now {token['says_variant']!r} is likeliest" if other else ""))
    return tag("span", token["token"], class_=f"token hot{heat}{' other' if other else ''}", title=said)


def _caption(layers: Mapping[str, Any]) -> str:
    swaps = sorted(layers["swaps"], key=lambda each: -each["kl"])
    worst = ", ".join(f"{_called(each)} ({number(each['kl'])}, {each['turned']} answers)" for each in swaps[:3])
    return (f"Each layer of the variant alone in the other's place: KL in nats a token, on {layers['tokens']:,} tokens "
            f"of {layers['answers']} answers of {layers['score']}. All together: {number(layers['whole']['kl'])}, "
            f"{layers['whole']['turned']} answers change. Most: {worst or 'nothing differs'}. The darker, the more (on "
            "a logarithmic scale; grey: least, or nothing).")


def layer_map(layers: Mapping[str, Any], title: str) -> Markup:
    """Blocks from left to right, kinds of layers from top to bottom; the darker, the more this layer alone does."""
    swaps = layers["swaps"]
    inside = [each for each in swaps if each["block"] is not None]
    outside = [each for each in swaps if each["block"] is None]
    kinds = list(dict.fromkeys(each["kind"] for each in inside))
    blocks = sorted({each["block"] for each in inside}) or [0]
    wide = min(64.0, MOST / len(blocks))
    shade = shades([each["kl"] for each in swaps])
    below = TOP + len(kinds) * ROW + 18 + (6 if outside else 0)
    cells = [_cell(each, LEFT + wide * blocks.index(each["block"]), TOP + kinds.index(each["kind"]) * ROW, wide, shade)
             for each in inside]
    cells += [_cell(each, LEFT, below + place * ROW, wide, shade) for place, each in enumerate(outside)]
    every = max(1, math.ceil(22 / wide))
    names = [tag("text", kind, x=LEFT - 8, y=TOP + place * ROW + 14, text_anchor="end")
             for place, kind in enumerate(kinds)]
    names += [tag("text", each["kind"], x=LEFT - 8, y=below + place * ROW + 14, text_anchor="end")
              for place, each in enumerate(outside)]
    names += [tag("text", str(block), x=f"{LEFT + wide * (place + 0.5):.1f}", y=TOP + len(kinds) * ROW + 12,
                  text_anchor="middle") for place, block in enumerate(blocks) if inside and place % every == 0]
    names += [tag("text", "block", x=LEFT - 8, y=TOP + len(kinds) * ROW + 12, text_anchor="end")] if inside else []
    text = f"what each layer does alone, {title}"
    return tag("svg", tag("title", text), tag("desc", _caption(layers)), tag("g", names, aria_hidden="true"), cells,
               viewBox=f"0 0 {LEFT + MOST + 24} {below + len(outside) * ROW}", role="img", aria_label=text,
               class_="small heat")


def _cell(each: Mapping[str, Any], x: float, y: float, wide: float, shade: Mapping[float, int]) -> Markup:
    said = (f"{_called(each)}: KL {number(each['kl'])} nats a token, {each['turned']} answers change, log-probability "
            f"{each['delta_logp']:+.3f} a token")
    return tag("g", tag("title", said), tag("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{max(wide - 1, 1):.1f}",
                                            height=ROW - 1, class_=f"heat{shade[each['kl']]}"))


def _called(each: Mapping[str, Any]) -> str:
    return str(each["kind"]) if each["block"] is None else f"block {each['block']} {each['kind']}"
