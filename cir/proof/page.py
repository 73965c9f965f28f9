"""The page of a certificate, for people."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

LABELS = {
    "recall": "Recall: probability of the answer",
    "paraphrase_recall": "Recall when asked in other words",
    "token_extraction": "Answer tokens that are the likeliest",
    "generation_extraction": "Probes whose greedy continuation holds the answer",
    "accuracy": "Multiple choice, right letter first",
    "accuracy_t1": "Multiple choice, probability of the right letter",
    "neighbour_recall": "Recall of neighbours (should stay)",
    "same_subject_recall": "Recall of other facts about the same subjects (should stay)",
    "loss": "Loss on ordinary text, nats a token (should stay)",
    "kl": "Change of what is said about that text, KL in nats a token",
    "kl_worst_window": "The same, of the window that changed most",
    "quantized_8bit": "Recall with weights rounded to 8 bits",
    "quantized_4bit": "Recall with weights rounded to 4 bits",
    "pruned": "Recall with the smaller half of the changes undone",
    "sampled": "Probes with the answer in one of many drawn continuations",
    "few_shot": "Recall after four related questions and answers",
    "linear_probe": "Answers that a linear map reads from hidden states",
}
LIMITS = (
    "It holds for the probes, texts and attacks listed, not for every way to ask or to attack.",
    "Facts that share no probe with these, and knowledge from which the facts follow, were not examined.",
    "A fine-tuning attacker who has the facts themselves can always teach them again.",
    "Figures are means; the one after the ± is a standard error over facts, questions or windows of text.",
)


def page(certificate: Mapping[str, Any]) -> str:
    """The certificate as one self-contained HTML page."""
    before, after = certificate["before"], certificate["after"]
    recalls = [
        [name, f"{was:.1%}", f"{after['recall'].get(name, float('nan')):.1%}"]
        for name, was in before["recall"].items()
    ]
    aside = certificate["set_aside"]
    parts = [
        "<h1>Certificate of unlearning</h1>",
        f"<p>{len(recalls)} facts were to be forgotten.",
        f" Not known to begin with, and counted nowhere: {html.escape(', '.join(aside))}." if aside else "",
        "</p>",
        "<h2>Measures</h2>",
        _table(("", "before", "after"), _outcomes(before["measures"], after["measures"])),
        "<h2>Attacks</h2>",
        _table(("", "before", "after"), _outcomes(before["attacks"], after["attacks"])),
        "<h2>Each fact: recall</h2>",
        _table(("fact", "before", "after"), recalls),
        "<h2>What this does not guarantee</h2>",
        "<ul>" + "".join(f"<li>{html.escape(limit)}</li>" for limit in LIMITS) + "</ul>",
        "<h2>How it was made</h2>",
        f"<pre>{html.escape(json.dumps({k: certificate[k] for k in _MADE}, indent=2))}</pre>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Certificate of unlearning</title><style>'
        "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;width:100%}td,th{padding:.25rem .5rem;border-bottom:1px solid #ddd;"
        "text-align:right;font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left}"
        "pre{overflow-x:auto;background:#f6f6f6;padding:1rem}</style><body>" + "".join(parts) + "</body></html>\n"
    )


_MADE = ("method", "sources", "settings", "data_sha256", "weights_sha256", "versions")


def _outcomes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[list[str]]:
    return [
        [LABELS.get(name, name[:1].upper() + name[1:]), *(_figure(side.get(name)) for side in (before, after))]
        for name in {**before, **after}
    ]


def _figure(outcome: Mapping[str, float] | None) -> str:
    return "" if outcome is None else f"{outcome['value']:.4f} ± {outcome['stderr']:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
