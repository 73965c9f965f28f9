"""WMDP: hazardous biology and attacks on computers."""

from __future__ import annotations

from cir.data.sources.source import CHOICES, Source, multiple_choice, same_choice


def _wmdp(topic: str, holds: str) -> Source:
    return Source(
        "cais/wmdp",
        {"facts": ((topic, "test"),)},
        holds,
        f"{CHOICES} and, in the corpus form, sentences",
        "Li et al. 2024, arXiv 2403.03218",
        multiple_choice,
        same_choice,
    )


WMDP_BIO = _wmdp("wmdp-bio", "multiple-choice questions on hazardous biology")
WMDP_CYBER = _wmdp("wmdp-cyber", "multiple-choice questions on attacks on computers")
