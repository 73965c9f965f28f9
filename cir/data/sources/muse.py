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
        "question, answer; of retain and disruption, text; of the benchmark also prompt and gt, and text",
        "Shi et al. 2024, arXiv 2407.06460",
        question_answer,
        same_answer,
        benchmark={
            "verbmem": (("verbmem", "forget"),),
            "forget_qa": (("knowmem", "forget_qa"),),
            "forget_qa_icl": (("knowmem", "forget_qa_icl"),),
            "retain_qa": (("knowmem", "retain_qa"),),
            "retain_qa_icl": (("knowmem", "retain_qa_icl"),),
            "forget": (("privleak", "forget"),),
            "holdout": (("privleak", "holdout"),),
        },
    )


MUSE_NEWS = _muse("MUSE-News", "questions on news articles, for models fine-tuned on them")
MUSE_BOOKS = _muse("MUSE-Books", "questions on the Harry Potter novels, for models fine-tuned on them")
