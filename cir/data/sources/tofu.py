"""TOFU: invented authors."""

from __future__ import annotations

from cir.data.sources.source import Source, question_answer, same_answer

TOFU = Source(
    "locuslab/TOFU",
    {"facts": (("forget10_perturbed", "train"),), "neighbours": (("retain_perturbed", "train"),)},
    "questions on invented authors, for models fine-tuned on them; answers are whole sentences",
    "question, answer, and where there is one paraphrased_question",
    "Maini et al. 2024, arXiv 2401.06121",
    question_answer,
    same_answer,
)
