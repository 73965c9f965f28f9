"""What benchmarks measure with: greedy answers, ROUGE-L, the Kolmogorov-Smirnov test, AUC."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from cir.data.tokens import encode

ROWS = 8
"""Prompts that are answered at once."""
_WORD = re.compile(r"[a-z0-9]+")


class Rouge(NamedTuple):
    """ROUGE-L of a text: the share of the wanted words that it has in their order, and the F1 with the share of its
    own words that these are.
    """

    recall: float
    f1: float


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """The greedy continuation of each prompt, of at most so many tokens, without special tokens."""
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    filler = tokenizer.eos_token_id or 0
    said: dict[int, str] = {}
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        width = len(encoded[chosen[-1]])
        # Padded on the left, so that all go on from the same place.
        ids = torch.tensor([[filler] * (width - len(encoded[i])) + encoded[i] for i in chosen], device=model.device)
        lengths = torch.tensor([[len(encoded[i])] for i in chosen], device=model.device)
        mask = (torch.arange(width, device=model.device) >= width - lengths).long()
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=filler,
        )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        said.update(zip(chosen, texts, strict=True))
    return [said[i] for i in range(len(encoded))]


def rouge_l(text: str, wanted: str) -> Rouge:
    """ROUGE-L of ``text`` (Lin 2004), by the longest common subsequence of words: runs of the letters a to z and of
    digits, in lower case.
    """
    words, right = (_WORD.findall(words.lower()) for words in (text, wanted))
    longest = [0] * (len(right) + 1)
    for word in words:
        diagonal = 0
        for j, other in enumerate(right, 1):
            diagonal, longest[j] = longest[j], diagonal + 1 if word == other else max(longest[j], longest[j - 1])
    common = longest[-1]
    if not common:
        return Rouge(0.0, 0.0)
    return Rouge(common / len(right), 2 * common / (len(words) + len(right)))


def ks_pvalue(first: Iterable[float], second: Iterable[float]) -> float:
    """The exact two-sided p-value of the two-sample Kolmogorov-Smirnov test: the share of all ways to mix the two in
    which their distribution functions lie somewhere as far apart (Hodges 1958, Arkiv for Matematik 3).

    Raises:
        ValueError: if either is empty.
    """
    a, b = sorted(first), sorted(second)
    n, m = len(a), len(b)
    if not n or not m:
        raise ValueError(f"expected values of both samples, got {n} and {m}")
    apart = max(abs(bisect_right(a, value) * m - bisect_right(b, value) * n) for value in (*a, *b))
    strayed = [0.0] * (m + 1)  # of the ways that lead to i of the first and j of the second
    for i in range(n + 1):
        for j in range(m + 1):
            if abs(i * m - j * n) >= apart:
                strayed[j] = 1.0
            elif i and j:
                strayed[j] = (strayed[j] * i + strayed[j - 1] * j) / (i + j)
    return strayed[m]


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that one of ``positive`` is above one of ``negative``; as high counts half."""
    ranked = sorted(negative)
    wins = sum(bisect_left(ranked, value) + bisect_right(ranked, value) for value in positive)
    return wins / (2 * len(positive) * len(negative))


def harmonic_mean(values: Iterable[float]) -> float:
    """0 where one is 0."""
    found = list(values)
    return len(found) / sum(1 / value for value in found) if min(found) > 0 else 0.0
