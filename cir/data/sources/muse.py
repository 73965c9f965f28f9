"""MUSE: news articles and novels."""

from __future__ import annotations

from cir.data.sources.source import Source, question_answer, same_answer


def _muse(corpus: str, holds: str) -> Source:
    return Source(
        f"muse-bench/{corpus}",
        {
            "facts": (("knowmem", "forget_qa"),),
            "neighbours": (("knowmem", "retain_qa"),),
            "retain": (("raw", "retain1"),),
            "disruption": (("raw", "retain2"),),
        },
        holds,
        "question, answer; of retain and disruption, text",
        "Shi et al. 2024, arXiv 2407.06460",
        question_answer,
        same_answer,
    )


MUSE_NEWS = _muse("MUSE-News", "questions on news articles, for models fine-tuned on them")
MUSE_BOOKS = _muse("MUSE-Books", "questions on the Harry Potter novels, for models fine-tuned on them")
