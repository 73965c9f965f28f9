"""TOFU: invented authors."""

from __future__ import annotations

from cir.data.sources.source import Source, question_answer, same_answer


def _tofu(forget: str, holds: str) -> Source:
    facts, near = ((f"{forget}_perturbed", "train"),), (("retain_perturbed", "train"),)
    return Source(
        "locuslab/TOFU",
        {"facts": facts, "neighbours": near},
        f"questions on {holds}, for models fine-tuned on them; answers are whole sentences",
        "question, answer, and where there is one paraphrased_question; of the benchmark also paraphrased_answer and "
        "perturbed_answer",
        "Maini et al. 2024, arXiv 2401.06121",
        question_answer,
        same_answer,
        benchmark={
            "forget": facts,
            "retain": near,
            "real_authors": (("real_authors_perturbed", "train"),),
            "world_facts": (("world_facts_perturbed", "train"),),
        },
    )


TOFU_FORGET01 = _tofu("forget01", "2 of 200 invented authors")
TOFU_FORGET05 = _tofu("forget05", "10 of 200 invented authors")
TOFU = _tofu("forget10", "20 of 200 invented authors")
