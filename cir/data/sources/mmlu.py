"""MMLU: general ability."""

from __future__ import annotations

from cir.data.sources.source import CHOICES, Source, multiple_choice, same_choice

MMLU = Source(
    "cais/mmlu",
    {"facts": (("all", "test"),)},
    "multiple-choice questions on 57 subjects, to measure ability",
    f"subject, {CHOICES}",
    "Hendrycks et al. 2021, arXiv 2009.03300",
    multiple_choice,
    same_choice,
    benchmark={"facts": (("all", "test"),)},
)
