"""Contents of certificates, made up of a few figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cir.measures import estimate
from cir.proof.stated import FORMAT
from cir.proof.verdict import Thresholds, judge

Pair = tuple[float, float]


def spread(mean: float, count: int) -> list[float]:
    """Rates of that mean, which differ a little from unit to unit."""
    width = 0.02 * mean * (1 - mean)
    return [mean + width * (2 * unit / max(count - 1, 1) - 1) * (count > 1) for unit in range(count)]


def stating(
    measures: Mapping[str, Pair] = {},
    attacks: Mapping[str, Pair] = {},
    *,
    recall: Pair = (0.61, 0.43),
    each: Sequence[float] | None = None,
    kept: Mapping[str, Pair] = {},
    loss: Pair | None = None,
    units: int = 12,
    asked: int = 1,
    **other: Any,
) -> dict[str, Any]:
    """A content, of pairs of what was before and after. ``each``: recall after of each fact. ``units``: facts, other
    facts and windows; ``asked``: facts under attack. ``other``: takes the place of the rest.
    """
    facts = [f"fact {number}" for number in range(units)]

    def side(when: int) -> dict[str, Any]:
        recalls = each if each is not None and when else spread(recall[when], units)
        stay = {**kept, **({"loss": loss} if loss else {})}
        means = {name: spread(pair[when], units) for name, pair in stay.items()}
        of = {"recall": recalls, **means, **{name: spread(pair[when], units) for name, pair in measures.items()}}
        attacked = {name: asdict(estimate(spread(pair[when], asked))) for name, pair in attacks.items()}
        return {
            "measures": {name: asdict(estimate(values)) for name, values in of.items()},
            "attacks": attacked,
            "recall": dict(zip(facts, recalls, strict=True)),
            "kept": {name: dict(zip(map(str, range(units)), values, strict=True)) for name, values in means.items()},
        }

    content = {
        "format": FORMAT,
        "date": "2026-01-31T12:00:00Z",
        "signer": None,
        "method": {"name": "CIR", "model": "some/llama", "budget": 0.001},
        "sources": {"facts": "facts.jsonl", "neighbours": "near.jsonl", "disruption": "heldout.txt"},
        "settings": {"text_tokens": 8192, "generate": 12, "relearning": "relearning, worst" in attacks, "seed": 0},
        "data_sha256": dict.fromkeys(("facts", "neighbours", "related", "text"), "0" * 64),
        "weights_sha256": {"before": "1" * 64, "after": "2" * 64},
        "files_sha256": {"config.json": "3" * 64, "model.safetensors": "4" * 64},
        "set_aside": [],
        "attacker": {"taught": 9, "asked": facts[:asked]},
        "before": side(0),
        "after": side(1),
        "thresholds": asdict(Thresholds()),
        "versions": {"cir": "0.1.0", "torch": "2.5.1", "transformers": "4.50.0", "python": "3.10.12"},
        **other,
    }
    return {**content, "verdict": judge(content).stated()}


CHEAP = ("quantized_8bit", "quantized_4bit", "pruned", "sampled", "few_shot", "linear_probe")
TRAINED = ("adam", "adam, fast", "sgd", "lora", "worst")


def failed() -> dict[str, Any]:
    """Of a run after which most is still recalled, and an attacker got it all, of the one fact that was asked."""
    return stating(
        {"paraphrase_recall": (0.5, 0.4), "generation_extraction": (0.75, 0.5), "kl": (0.0, 0.004)},
        {
            **dict.fromkeys(CHEAP, (0.62, 0.45)),
            **{f"relearning, {name}": (0.95, 0.93) for name in TRAINED},
        },
        kept={"neighbour_recall": (0.5, 0.49)},
        loss=(2.7, 2.702),
    )


def forgotten(units: int = 60) -> dict[str, Any]:
    """Of a run after which all claims hold."""
    return stating(
        {"paraphrase_recall": (0.5, 0.01), "generation_extraction": (0.75, 0.0), "kl": (0.0, 0.004)},
        {
            **dict.fromkeys(CHEAP, (0.62, 0.01)),
            **{f"relearning, {name}": (0.7, 0.03) for name in TRAINED},
        },
        recall=(0.61, 0.004),
        kept={"neighbour_recall": (0.5, 0.49), "same_subject_recall": (0.6, 0.6)},
        loss=(2.7, 2.702),
        units=units,
        asked=units,
    )
