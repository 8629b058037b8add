"""What every contender of bench_quantize.py is given, and what is made of its answers: rows, pairs, tables. No torch.

A *cell* is one method at one width and group size, of one draw of the model (`_quantize_draws.py`); every contender of
the method takes it in turn. Its answer is a dense model, whatever its own format is, so that all are scored by one
evaluator and no kernel has a say. A row without a draw is of draw 0, the model as it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from _quantize_pairs import alike, common, gathered, over, paired, paired_divergences

OURS = "llmops"
#: contender -> (method, tool, module that the tool's Python must be able to import)
CONTENDERS: dict[str, tuple[str, str, str]] = {
    "rtn-llmops": ("rtn", OURS, "llmops"),
    "rtn-llmcompressor": ("rtn", "llm-compressor", "llmcompressor"),
    "rtn-torchao": ("rtn", "torchao", "torchao"),
    "clip-llmops": ("rtn, clip searched", OURS, "llmops"),
    "clip-llmcompressor": ("rtn, clip searched", "llm-compressor", "llmcompressor"),
    "hqq-llmops": ("hqq", OURS, "llmops"),
    "hqq-hqq": ("hqq", "hqq", "hqq"),
    "gptq-llmops": ("gptq", OURS, "llmops"),
    "gptq-llmcompressor": ("gptq", "llm-compressor", "llmcompressor"),
    "gptq-gptqmodel": ("gptq", "GPTQModel", "gptqmodel"),
    "awq-llmops": ("awq", OURS, "llmops"),
    "awq-llmcompressor": ("awq", "llm-compressor", "llmcompressor"),
    "autoround-llmops": ("autoround", OURS, "llmops"),
    "autoround-autoround": ("autoround", "auto-round", "auto_round"),
    "factors+gptq-llmops": ("awq's factors, gptq", OURS, "llmops"),
    "factors+autoround-llmops": ("awq's factors, autoround", OURS, "llmops"),
    "auto+autoround-llmops": ("bits by layer, awq's factors, autoround", OURS, "llmops"),
    "factors+autoround+distill-llmops": ("awq's factors, autoround, distilled", OURS, "llmops")}
#: Packages whose versions belong beside the figures, by module.
PACKAGES = {"llmcompressor": "llmcompressor", "torchao": "torchao", "hqq": "hqq", "gptqmodel": "gptqmodel",
            "auto_round": "auto-round"}


@dataclass(frozen=True)
class Case:
    """All that a worker needs to know. model: a folder with float32 weights; calibration: a safetensors file whose
    `tokens` are (samples, length); rows: the jsonl file they were cut from, for those who cut for themselves."""

    model: str
    calibration: str
    rows: str
    samples: int
    length: int
    iterations: int = 200
    batch_size: int = 8
    seed: int = 0
    threads: int = 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def methods_of(names: Iterable[str]) -> dict[str, list[str]]:
    """method -> its contenders, ours first, in the order of `CONTENDERS`."""
    made: dict[str, list[str]] = {}
    for name in CONTENDERS:
        if name in names:
            made.setdefault(CONTENDERS[name][0], []).append(name)
    return made


def skipped(method: str, bits: int) -> str:
    """Why a cell is not run, or ""."""
    if bits == 8 and ("awq" in method or "autoround" in method):
        return "not run: at 8 bits plain rounding is already exact to three digits"
    return ""


def standing(ratio: float, half_width: float) -> str:
    """What a ratio of ours to a peer's comes to: "ahead" or "behind" only where its interval leaves out 1, "equal"
    where all windows agree, else "level"."""
    if (ratio, half_width) == (1, 0):
        return "equal"
    return "ahead" if ratio + half_width < 1 else "behind" if ratio - half_width > 1 else "level"


def counted(lines: Iterable[dict[str, Any]], key: str = "ratio", width: str = "half_width") -> dict[str, int]:
    """How many verdicts are ahead, level (or equal) and behind. key, width: names of the ratio and its half width."""
    said = [standing(line[key], line[width]) for line in lines if key in line]
    return {"ahead": said.count("ahead"), "level": said.count("level") + said.count("equal"),
            "behind": said.count("behind")}


def picked(names: Iterable[str], only: str | None) -> list[str]:
    """The contenders of `only`: "ours", "peers" (everyone else's), or None for all."""
    return [name for name in names if only is None or (CONTENDERS[name][1] == OURS) == (only == "ours")]


def stored(results: Sequence[dict[str, Any]], like: dict[str, Any], cells: Iterable[tuple[int, int]],
           names: Iterable[str], draws: Iterable[int] = (0,), codes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of earlier runs that this run need not compute: same model, calibration, protocol (and steps, for
    AutoRound), a cell of `cells` (bits, group), one of `draws` and a contender of `names`. Of several the first that
    was scored.

    results: entries of the lists "results" of earlier files. like: this run's entry, without rows. Perplexities do not
    hang on the machine's load; times do, and are left behind. Ours change with the code: they are taken only where one
    of `codes` is what their rows say.
    """
    wanted, draws, found = set(cells), set(draws), {}
    for result in results:
        if any(result[key] != like[key] for key in ("model", "calibration", "protocol")) or not math.isclose(
                result["base"]["perplexity"], like["base"]["perplexity"], rel_tol=1e-6):
            continue
        for row in result["rows"]:
            where = place(row)
            if ((row["tool"] == OURS and row.get("code", "") not in codes) or row["contender"] not in names
                    or where[1:3] not in wanted or where[3] not in draws or row.get("failed", "").startswith("not run")
                    or ("autoround" in row["method"] and result["iterations"] != like["iterations"])):
                continue
            if where not in found or ("failed" in found[where] and "failed" not in row):
                found[where] = {key: value for key, value in row.items()
                                if key not in ("seconds", "cpu_seconds", "peak_bytes")} | {"stored": True}
    return list(found.values())


def place(row: dict[str, Any]) -> tuple[str, int, int, int]:
    """What a row is of: (contender, bits, group, draw)."""
    return row["contender"], row["bits"], row["group"], row.get("draw", 0)


def best(rows: Sequence[dict[str, Any]], *, ours: bool, key: str = "perplexity") -> dict[str, Any] | None:
    """The row of least perplexity (or divergence) among ours or the peers' (highest, for a score); None when none
    ran."""
    found = [row for row in rows if key in row and (row["tool"] == OURS) == ours]
    if not found:
        return None
    return min(found, key=lambda row: float(row[key])) if key in ("perplexity", "divergence") else max(
        found, key=lambda row: float(row[key]))


def contending(rows: Sequence[dict[str, Any]], key: str = "perplexity") -> list[dict[str, Any]]:
    """The gathered rows that may have the least `key` of their side: without those that another of it, which has all of
    their draws, is below in these. So a method run on fewer draws does not narrow a verdict that it cannot win."""
    measured = [({draw for draw, each in row["draws"].items() if key in each}, row) for row in rows if key in row]

    def beaten(draws: set[int], row: dict[str, Any]) -> bool:
        mine = over(row["draws"], draws)[key]
        return any((row["tool"] == OURS) == (other["tool"] == OURS) and its >= draws
                   and over(other["draws"], draws)[key] < mine for its, other in measured)

    return [row for draws, row in measured if not beaten(draws, row)]


def won_back(base: float, plain: float, solved: float) -> float:
    """The share of round-to-nearest's rise in perplexity that a method takes back: 1 all of it, below 0 it adds."""
    return (plain - solved) / (plain - base)


def verdicts(rows: Sequence[dict[str, Any]], base: float) -> list[dict[str, Any]]:
    """One line per width, group and method: ours beside the best peer with the same method, and ours of all methods
    beside the best of all peers (method "best", over the draws that all have which may be it); and what our GPTQ wins
    back of our rounding to nearest, and of plain rounding as published tables have it (llm-compressor's), which errs
    more than ours.

    Where the divergence was measured, the same for it under names that begin with divergence_: least of ours, least of
    the peers', their ratio. Whatever stands side by side is taken over the draws that all of it has.
    """
    rows = gathered(rows)
    made: list[dict[str, Any]] = []
    for bits, group in sorted({(row["bits"], row["group"]) for row in rows}, reverse=True):
        here = [row for row in rows if (row["bits"], row["group"]) == (bits, group)]
        methods = list(dict.fromkeys(row["method"] for row in here))
        for method in [*methods, "best"]:
            those = here if method == "best" else [row for row in here if row["method"] == method]
            some = common(contending(those) if method == "best" else those)
            mine, peer = best(some, ours=True), best(some, ours=False)
            if mine is None or peer is None:
                continue
            ratio, half = paired(*(_each(row, "losses") for row in (mine, peer)))
            made.append({"bits": bits, "group": group, "method": method, "draws": len(mine["draws"]),
                         "ours": mine["perplexity"],
                         "ours_by": mine["contender"], "peer": peer["perplexity"], "peer_by": peer["contender"],
                         "ratio": ratio, "half_width": half, "won": ratio <= 1, **_nearer(those)})
        for plain, whose in (("rtn-llmops", ""), ("rtn-llmcompressor", ", absmax / 7.5 at 4 bits")):
            some = common([row for row in here if row["contender"] in ("gptq-llmops", plain)])
            scored = {row["contender"]: row["perplexity"] for row in some}
            if len(scored) == 2 and scored[plain] > base:
                made.append({"bits": bits, "group": group, "method": f"gptq wins back of rtn's rise{whose}",
                             "plain": plain, "share": won_back(base, scored[plain], scored["gptq-llmops"]),
                             **_after_factors(here, plain, base)})
    return made


def _nearer(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The divergence part of a verdict, empty where ours or no peer's was measured. rows: gathered."""
    rows = common(contending(rows, "divergence") if len({row["method"] for row in rows}) > 1 else rows, "divergence")
    mine, peer = best(rows, ours=True, key="divergence"), best(rows, ours=False, key="divergence")
    if mine is None or peer is None:
        return {}
    ratio, half = paired_divergences(*(_each(row, "divergences") for row in (mine, peer)))
    return {"divergence_ours": mine["divergence"], "divergence_ours_by": mine["contender"],
            "divergence_peer": peer["divergence"], "divergence_peer_by": peer["contender"],
            "divergence_ratio": ratio, "divergence_half_width": half}


def _after_factors(here: Sequence[dict[str, Any]], plain: str, base: float) -> dict[str, float]:
    """The share that GPTQ after AWQ's factors wins back, over the draws that both have; {} where none are."""
    some = common([row for row in here if row["contender"] in ("factors+gptq-llmops", plain)])
    scored = {row["contender"]: row["perplexity"] for row in some}
    if len(scored) < 2 or scored[plain] <= base:
        return {}
    return {"factors": won_back(base, scored[plain], scored["factors+gptq-llmops"])}


def _each(row: dict[str, Any], key: str) -> list[list[float]]:
    """What a gathered row has under `key`, draw by draw."""
    return [each[key] for each in row["draws"].values()]


def speeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per contender: median seconds over its cells, and the median over cells of ours / theirs (the cells of
    a method are taken in turn, so both stood in the same minute); memory of its first cell, in a fresh process."""
    made = []
    for name, (method, tool, _) in CONTENDERS.items():
        mine = {place(row)[1:]: row for row in rows if row["contender"] == name and "seconds" in row}
        if not mine:
            continue
        line: dict[str, Any] = {"contender": name, "method": method, "tool": tool, "cells": len(mine),
                                "seconds": statistics.median(row["seconds"] for row in mine.values()),
                                "cpu_seconds": statistics.median(row["cpu_seconds"] for row in mine.values()),
                                "peak_bytes": next(iter(mine.values()))["peak_bytes"]}
        own = {place(row)[1:]: row for row in rows if "seconds" in row and row["tool"] == OURS
               and row["method"] == method}
        both = [cell for cell in mine if cell in own]
        if tool != OURS and both:
            for key in ("seconds", "cpu_seconds"):
                line[f"ours_over_{key}"] = statistics.median(own[cell][key] / mine[cell][key] for cell in both)
        made.append(line)
    return made


def perplexity_table(rows: Sequence[dict[str, Any]], base: dict[str, Any]) -> str:
    """Contenders down, widths and groups across; means of the draws that all of a method have; a task score, where
    there is one, in parentheses (of draw 0). A row that says it is of an "earlier" code gets an asterisk."""
    return _contender_table(alike(rows), _shown, _shown(base))


def divergence_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same of the divergences; "" where none was measured."""
    def shown(row: dict[str, Any] | None) -> str:
        return f"{row['divergence']:.3g}" if row and "divergence" in row else ""

    rows = [row for row in alike(row for row in rows if "divergence" in row) if "divergence" in row]
    return _contender_table(rows, shown, "0") if rows else ""


def _contender_table(rows: Sequence[dict[str, Any]], shown: Callable[[dict[str, Any] | None], str], exact: str) -> str:
    cells = sorted({(row["bits"], row["group"]) for row in rows}, reverse=True)
    lines = ["| method | tool | " + " | ".join(f"{bits} bit, g{group}" for bits, group in cells) + " |",
             "|-|-|" + "-:|" * len(cells), "| - | float32 | " + " | ".join(exact for _ in cells) + " |"]
    for name, (method, tool, _) in CONTENDERS.items():
        mine = {(row["bits"], row["group"]): row for row in rows if row["contender"] == name}
        if mine:
            lines.append(f"| {method} | {tool} | " + " | ".join(shown(mine.get(cell)) for cell in cells) + " |")
    return "\n".join(lines)


def _shown(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "perplexity" not in row:
        return "-" if row["failed"].startswith("not run") else "failed"
    score = f" ({row['exact_match']:.1%})" if "exact_match" in row else ""
    return f"{row['perplexity']:.4g}{score}{'*' if row.get('earlier') else ''}"


def speed_table(lines: Sequence[dict[str, Any]]) -> str:
    made = ["| method | tool | s | CPU s | ours / theirs, s | CPU s | MiB over the loaded model |",
            "|-|-|-:|-:|-:|-:|-:|"]
    for line in lines:
        ratios = [f"{line[key]:.2f}" if key in line else "" for key in ("ours_over_seconds", "ours_over_cpu_seconds")]
        made.append(f"| {line['method']} | {line['tool']} | {line['seconds']:.1f} | {line['cpu_seconds']:.1f} | "
                    f"{ratios[0]} | {ratios[1]} | {line['peak_bytes'] / 2**20:.0f} |")
    return "\n".join(made)


def verdict_table(lines: Sequence[dict[str, Any]]) -> str:
    """One row a verdict. Ours is ahead or behind where the interval leaves out 1."""
    nearer = any("divergence_ratio" in line for line in lines)
    made = ["| bits | group | method | draws | ours | best peer | ours / peer | |" + (
        " KL, ours / peer | |" if nearer else ""), "|-:|-:|-|-:|-:|-:|-:|-|" + ("-:|-|" if nearer else "")]
    for line in lines:
        if "share" in line:
            made.append(f"| {line['bits']} | {line['group']} | {line['method']} | | {line['share']:.0%} | | | |"
                        + (" | |" if nearer else ""))
            continue
        ratio = (f"| {line['ratio']:.4f} +- {line['half_width']:.4f} | "
                 f"{standing(line['ratio'], line['half_width'])} |")
        apart = " | |" if nearer else ""
        if "divergence_ratio" in line:
            ours, width = line["divergence_ratio"], line["divergence_half_width"]
            apart = f" {ours:.2f} +- {width:.2f} | {standing(ours, width)} |"
        made.append(f"| {line['bits']} | {line['group']} | {line['method']} | {line['draws']} | "
                    f"{line['ours']:.5g} ({line['ours_by']}) | "
                    f"{line['peer']:.5g} ({line['peer_by']}) {ratio}{apart}")
    return "\n".join(made)
