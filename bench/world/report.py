"""The rows of :mod:`bench.world` as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cir.measures import estimate

COLUMNS = {
    "rise": ("text", "{:+.2%}"),
    "worst_window": ("window", "{:+.2f}"),
    "kl": ("KL", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "worst": ("attacked", "{:.3f}"),
    "gold_attacked": ("gold", "{:.3f}"),
    "neighbours": ("relation", "{:.3f}"),
    "same_subject": ("subject", "{:.3f}"),
    "unrelated": ("rest", "{:.3f}"),
    "forget_quality": ("quality", "{:.3f}"),
    "seconds": ("s", "{:.0f}"),
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each size, method and budget: means over seeds.

    ``attacked`` is recall after the attack that brings most back and ``gold`` that of the model that never knew,
    after the same; ``differs`` their mean difference by fact, with its standard error (over seeds where there are
    several).
    """
    heads = [head for head, _ in COLUMNS.values()]
    lines = [["size", "method", "budget", "seeds", *heads, "differs"]]
    for key in dict.fromkeys((row["size"], label(row), row["budget"]) for row in rows):
        own = [row for row in rows if (row["size"], label(row), row["budget"]) == key]
        line = [key[0], key[1], f"{key[2]:.1%}" if key[2] else "", str(len(own))]
        for column, (_, form) in COLUMNS.items():
            found = estimate(row[column] for row in own if row.get(column) is not None)
            line.append("" if found is None else form.format(found.value))
        differs = [row["gold"]["worst"] for row in own if "worst" in row.get("gold", {})]
        mean = estimate(difference["value"] for difference in differs)
        if mean is not None:
            stderr = mean.stderr if len(differs) > 1 else differs[0]["stderr"]
            line.append(f"{mean.value:+.3f} ± {stderr:.3f}")
        lines.append(line)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=False)) for line in lines)


def label(row: Mapping[str, Any]) -> str:
    """The method's name, and what was changed of its configuration."""
    return " ".join([row["method"], *(f"{name}={value}" for name, value in (row.get("changes") or {}).items())])
