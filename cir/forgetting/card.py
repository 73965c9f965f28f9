"""A model card: what was forgotten by count and hash, never by text or id, at what cost, and how to check it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TAGS = ["unlearning", "cir"]
LIMITS = """## What this does not say

Recall is that of the prompts which were asked. Other prompts, or fine-tuning on related facts, may bring back more:
`cir attack` and `cir eval --attacks` measure that. A hash of few facts that are well known can be guessed."""


def model_card(section: str, *, base_model: str | None = None, library: str = "transformers") -> Any:
    """A ``huggingface_hub.ModelCard`` of a text and what the hub files it under."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(base_model=base_model, library_name=library, pipeline_tag="text-generation", tags=TAGS)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{section}\n")


def section_of_run(report: Mapping[str, Any]) -> str:
    """What there is to say of a run, of which ``report`` is what :meth:`cir.Report.to_dict` gives."""
    before, after, config = report["before"], report["after"], report["config"]
    first, last = report["layers"]
    rows = {
        **_facts(report["n_facts"], report["facts_hash"]),
        "not known to begin with": len(report["unknown"]),
        "not all forgotten": len(report["unforgotten"]),
        "recall of the facts": f"{_recall(before['mean_recall'])} → {_recall(after['mean_recall'])}",
        "loss on ordinary text": f"{_number(before['loss'], '.4f')} → {_number(after['loss'], '.4f')} nats a token",
        **_harm(after, config["budget"], config["worst_window"]),
        "layers changed": f"{first} to {last}",
        **_adapter(report.get("adapter")),
        "ended": report["stopped"],
        "versions": _versions(report["versions"]),
    }
    settings = f"<details><summary>settings</summary>\n\n```json\n{json.dumps(config, indent=2)}\n```\n\n</details>"
    return f"# Facts forgotten\n\n{_table(rows)}\n\n{settings}\n\n{_check(report['facts_hash'])}\n\n{LIMITS}"


def section_of_edit(edit: Any, facts_hash: str, versions: Mapping[str, str]) -> str:
    """What there is to say of a :class:`cir.Edit` of one fact, as an adapter."""
    before, after = edit.before, edit.after
    kept = "not measured" if before.neighbours is None else f"{before.neighbours:.3f} → {after.neighbours:.3f}"
    rows = {
        **_facts(1, facts_hash),
        "recall of the fact": f"{_recall(before.recall)} → {_recall(after.recall)}",
        "recall of its neighbours": kept,
        **_harm(vars(after), None, None),
        "rank": edit.rank,
        "ended": edit.stopped,
        "fingerprint of the model that the first edit was made on": f"`{edit.fingerprint}`",
        "versions": _versions(versions),
    }
    return f"# A fact forgotten\n\n{_table(rows)}\n\n{_check(facts_hash)}\n\n{LIMITS}"


def _adapter(held: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"adapter": f"rank {held['rank']}, {held['energy']:.1%} of the change"} if held else {}


def _facts(count: int, digest: str) -> dict[str, Any]:
    return {"facts": count, "SHA-256 of the facts as canonical JSON": f"`{digest}`"}


def _harm(after: Mapping[str, Any], budget: float | None, worst: float | None) -> dict[str, str]:
    allowed = "" if budget is None else f" (budget {budget:+.2%})"
    most = "" if worst is None else f" (at most {worst:g})"
    return {
        "rise of that loss": f"{_number(after['rise'], '+.3%')} ± {_number(after['rise_stderr'], '.3%')}{allowed}",
        "rise of the worst window": f"{_number(after['worst'], '+.4f')} nats a token{most}",
    }


def _check(digest: str) -> str:
    return f"""## How to verify

Whoever has the facts can check that they are these, and what is recalled of them:

```sh
python -c "import cir; print(cir.hash_facts(cir.load_facts('facts.jsonl')))"  # {digest}
cir eval --model MODEL --facts facts.jsonl
```"""


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _recall(value: float | None) -> str:
    return _number(value, ".3f") if value is not None else "not measured"


def _number(value: float | None, form: str) -> str:
    """Of JSON, where a figure that is NaN or infinite is null."""
    return "not finite" if value is None else format(value, form)
