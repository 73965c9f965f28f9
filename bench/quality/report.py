"""The rows of :mod:`bench.quality` as a page with tables and plots."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def report(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page ``path`` and the plot beside it."""
    picture = plot(rows)
    path.with_suffix(".png").write_bytes(picture)
    runs = [row for row in rows if row["kind"] == "run"]
    parts = ["<h1>Robustness against disruption</h1>"]
    parts.append(f'<img alt="plots" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
    for budget in sorted({row["budget"] for row in runs}):
        own = [row for row in runs if row["budget"] == budget]
        parts += [f"<h2>Budget {budget:+.1%}</h2>" if budget else "<h2>Nothing done</h2>", _means(own, "method")]
    if ablations := [row for row in rows if row["kind"] == "ablation"]:
        parts += ["<h2>Ablation</h2>", _means(ablations, "variant")]
    parts += ["<h2>Recall of each probed fact</h2>", _by_fact(runs)]
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:right}"
        "td:first-child,th:first-child{text-align:left}"
    )
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Quality</title><style>{style}</style>'
        f"<body>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )


COLUMNS = {
    "rise": "{:+.3%}",
    "kl": "{:.4f}",
    "recall": "{:.3f}",
    "worst": "{:.3f}",
    "quantized_4bit": "{:.3f}",
    "few_shot": "{:.3f}",
    "neighbours": "{:.3f}",
    "same_subject": "{:.3f}",
    "gold_attacked": "{:.3f}",
    "change": "{:.1f}",
    "seconds": "{:.0f}",
}


def _means(rows: Sequence[Mapping[str, Any]], by: str) -> str:
    """A table: a line for each value of ``by``, means over seeds with standard deviations of the recalls."""
    lines = [
        [
            "",
            "seeds",
            "text loss",
            "KL",
            "recall",
            "worst attack",
            "4 bits",
            "few-shot",
            "neighbours",
            "subjects",
            "gold",
            "change",
            "s",
        ]
    ]
    for name in dict.fromkeys(row[by] for row in rows):
        own = [row for row in rows if row[by] == name]
        line = [str(name), str(len(own))]
        for column, form in COLUMNS.items():
            values = torch.tensor([row.get(column, math.nan) for row in own], dtype=torch.float64)
            deviation = f" ± {values.std():.3f}" if len(own) > 1 and column in ("recall", "worst") else ""
            line.append(form.format(float(values.mean())) + deviation)
        lines.append(line)
    return _table(lines)


def _by_fact(runs: Sequence[Mapping[str, Any]]) -> str:
    first = {(row["method"], row["budget"]): row for row in reversed(runs)}
    names = list(next(iter(first.values()))["by_fact"])
    head = ["", *(f"{method} {budget:+.1%}" if budget else method for method, budget in first)]
    return _table([head, *([name, *(f"{row['by_fact'][name]:.3f}" for row in first.values())] for name in names)])


def _table(lines: Sequence[Sequence[str]]) -> str:
    cells = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for tag, line in zip(["th", *["td"] * (len(lines) - 1)], lines, strict=True)
    ]
    return f"<table>{''.join(cells)}</table>"


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Worst attack against disruption, the ways there, and the ways back, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    against, unlearning, relearning = figure.subplots(1, 3)
    runs = [row for row in rows if row["kind"] == "run"]
    methods = list(dict.fromkeys(row["method"] for row in runs))
    for i, method in enumerate(methods):
        color = f"C{i}"
        own = [row for row in runs if row["method"] == method]
        against.plot(
            [100 * row["rise"] for row in own], [row["worst"] for row in own], "o", color=color, label=method
        )
        for row in own[:1]:
            if row["trajectory"]:
                rises, recalls = zip(*row["trajectory"], strict=True)
                unlearning.plot([100 * rise for rise in rises], recalls, "o-", color=color, ms=3)
            relearning.plot(next(iter(row["relearning"].values())), "o-", color=color, ms=3)
    against.set(xlabel="rise of the text loss (%)", ylabel="recall after the worst relearning", ylim=(0, None))
    unlearning.set(xlabel="rise of the text loss (%)", ylabel="recall of all facts, epoch by epoch", ylim=(0, None))
    unlearning.set_xscale("symlog", linthresh=0.1)
    relearning.set(
        xlabel="epochs of relearning (the first attack)", ylabel="recall of the probed facts", ylim=(0, None)
    )
    against.legend(fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
