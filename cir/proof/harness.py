"""General ability, MMLU for one, as EleutherAI's lm-eval measures it: an extra, ``pip install 'cir[eval]'``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from cir.measures import Estimate
from cir.model.finding import unwrapped
from cir.model.shards import check_whole


def check_installed() -> None:
    """Raise ValueError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks: expected the package lm-eval, which is not installed: pip install 'cir[eval]'")


def harness(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8
) -> dict[str, Estimate]:
    """Scores on ``tasks`` of lm-eval, with its own prompts, and standard errors as it gives them.

    Args:
        model, tokenizer: of transformers. tasks: names that lm-eval knows, which loads their data.
        limit: questions of each task at most; None for all.

    Returns:
        Accuracy by task: length-normalised where the task has no other. ``count`` is the questions asked.

    Raises:
        ValueError: if lm-eval is not installed, or a task measures no accuracy.
    """
    check_installed()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = unwrapped(model)
    check_whole(model)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)
    return {task: _accuracy(task, found) for task in tasks}


def _accuracy(task: str, found: dict[str, Any]) -> Estimate:
    scores = found["results"][task]
    metric = next((name for name in ("acc,none", "acc_norm,none") if name in scores), None)
    if metric is None:
        raise ValueError(f"tasks: expected one that measures accuracy, got {task} with {', '.join(scores)}")
    # A group, as mmlu is, has its questions in its subtasks.
    parts = found.get("group_subtasks", {}).get(task) or [task]
    counts = found.get("n-samples", {})
    count = sum(counts[part]["effective"] for part in parts if part in counts)
    stderr = scores.get(metric.replace(",", "_stderr,"), 0.0)
    return Estimate(float(scores[metric]), float(stderr) if stderr != "N/A" else 0.0, count)
