"""The published table of bench_published_table.py, and what is said of ours beside it. No torch."""

from __future__ import annotations

from _quantize_case import won_back

#: As published (README of IST-DASLab/gptq, LLaMA, act-order and true-sequential), in the order of `COLUMNS`.
PUBLISHED = {"LLaMA-7B": (5.68, 6.29, 6.09, 25.54, 8.07, 6.61), "LLaMA-13B": (5.09, 5.53, 5.36, 11.40, 6.63, 5.62),
             "LLaMA-65B": (3.53, 3.92, 3.84, 10.59, 5.04, 4.17)}


def shares(row: dict[str, float]) -> dict[str, float]:
    """bits -> the share of round-to-nearest's rise over float that GPTQ wins back."""
    return {f"{bits} bit": won_back(row["float"], row[f"{bits} bit RTN"], row[f"{bits} bit GPTQ"]) for bits in (4, 3)}


def order(row: dict[str, float]) -> list[str]:
    """The columns from the least perplexity up."""
    return sorted(row, key=lambda name: row[name])


def table(rows: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(names) + " | won back, 4 bit | 3 bit |", "|-|" + "-:|" * (len(names) + 2)]
    for title, row in rows.items():
        won = [f"{share:.0%}" for share in shares(row).values()]
        lines.append(f"| {title} | " + " | ".join([f"{row[name]:.2f}" for name in names] + won) + " |")
    return "\n".join(lines)


def verdict(row: dict[str, float], published: dict[str, dict[str, float]]) -> tuple[bool, list[str]]:
    """(whether the order is that of every published row, what to say of order and shares)."""
    differ = [name for name, other in published.items() if order(other) != order(row)]
    said = ["the order of the columns is that of every published row" if not differ else
            f"the order is {' < '.join(order(row))}; another than that of {'; '.join(differ)}"]
    for bits, share in shares(row).items():
        known = [shares(other)[bits] for other in published.values()]
        said.append(f"{bits}: GPTQ wins back {share:.0%} of RTN's loss; published {min(known):.0%} to {max(known):.0%}")
    return not differ, said
