"""The field's benchmarks, each by its own metrics: TOFU, MUSE, CounterFact, zsRE, RWKU, WMDP and MMLU.

In all, unlike the authors' code, ROUGE-L compares words without stemming, and nothing is quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cir.data.datasets import benchmark_rows
from cir.model.finding import unwrapped
from cir.model.shards import check_whole
from cir.proof.benchmarks import choices, edits, muse, rwku, tofu
from cir.proof.benchmarks.result import BenchmarkResult
from cir.system.files import shown

__all__ = ["BenchmarkResult", "benchmark"]

_KINDS: dict[str, tuple[Callable[..., BenchmarkResult], tuple[str, ...]]] = {
    "tofu": (tofu.tofu, ("reference", "prompt")),
    "muse": (muse.muse, ("reference",)),
    "counterfact": (edits.counterfact, ()),
    "zsre": (edits.zsre, ("prompt",)),
    "rwku": (rwku.rwku, ("prompt",)),
    "wmdp": (choices.choices, ()),
    "mmlu": (choices.choices, ()),
}
"""What measures a benchmark, by the first part of its name, and the options it takes."""


def benchmark(
    name: str,
    model: Any,
    tokenizer: Any,
    path: str | Path | None = None,
    *,
    reference: Any = None,
    prompt: str | None = None,
    limit: int | None = None,
) -> BenchmarkResult:
    """Measure ``model`` by one of :data:`cir.data.datasets.BENCHMARKS`; changes nothing. No figure is in percent.

    What is measured is told by :func:`.tofu.tofu` (``tofu``, which is forget10, ``tofu-forget05`` and
    ``tofu-forget01``), :func:`.muse.muse` (``muse-news`` and ``muse-books``), :func:`.edits.counterfact`,
    :func:`.edits.zsre`, :func:`.rwku.rwku`, and :func:`.choices.choices` (``wmdp-bio``, ``wmdp-bio-robust``,
    ``wmdp-chem``, ``wmdp-cyber`` and ``mmlu``).

    Args:
        model, tokenizer: any causal LM of transformers.
        path: a local copy, as :func:`cir.data.datasets.benchmark_rows` reads it; None for the hub or its cache.
        reference: for TOFU's forget quality and MUSE's PrivLeak, a model that never knew what was to be forgotten, of
            the same tokenizer, or the ``reference`` of its own result.
        prompt: of TOFU, zsRE and RWKU, how a question is asked, with {} for it, instead of the benchmark's way: the
            template of a chat model.
        limit: at most so many rows of each part, evenly spread.

    Raises:
        ValueError: on an unknown name; too few rows; a row without a column, which the message names; a ``reference``
            or ``prompt`` that the benchmark has no use for, or that does not fit.
        FileNotFoundError: if ``path`` lacks a part, or there is neither a connection nor a copy in the cache.
        NonFiniteError: if what the model says is NaN or infinite.
    """
    model = unwrapped(model)
    check_whole(model)
    parts = benchmark_rows(name, path, limit=limit)
    measure, takes = _KINDS[name.lower().split("-")[0]]
    given = {"reference": reference, "prompt": prompt}
    for option, value in given.items():
        if value is not None and option not in takes:
            raise ValueError(f"{option}: expected none for {name}, got {shown(value)}")
    if prompt is not None and (not isinstance(prompt, str) or prompt.count("{}") != 1):
        raise ValueError(f"prompt: expected text with {{}} once, for the question, got {shown(prompt)}")
    return measure(model, tokenizer, parts, **{option: given[option] for option in takes})
