from __future__ import annotations

import math

import pytest
import torch

from cir.proof.metrics import auc, harmonic_mean, ks_pvalue, rouge_l, written
from tests.tiny import tiny_llama, word_tokenizer


def test_greedy_answers_are_those_of_each_prompt_alone():
    tokenizer = word_tokenizer()
    model = tiny_llama().double()
    prompts = [f"word{i} " * (1 + 3 * i) for i in range(10)]
    together = written(model, tokenizer, prompts, 5)
    assert together == [written(model, tokenizer, [prompt], 5)[0] for prompt in prompts]
    assert len(set(together)) > 3


def test_rouge_by_hand():
    assert rouge_l("The cat sat.", "the CAT-sat on a mat") == (3 / 6, 2 * 3 / (3 + 6))
    assert rouge_l("c b a", "a b c") == (1 / 3, 1 / 3)
    assert rouge_l("a x b y c", "a b c d") == (3 / 4, 2 * 3 / 9)
    assert rouge_l("", "a") == rouge_l("b", "a") == rouge_l("?", "?") == (0, 0)


def test_kolmogorov_smirnov_by_hand():
    assert ks_pvalue([1, 2], [3, 4]) == pytest.approx(2 / 6)
    assert ks_pvalue([1, 2, 3], [4, 5]) == pytest.approx(2 / 10)
    assert ks_pvalue([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert ks_pvalue([1, 2, 4], [3, 5, 6]) == pytest.approx(12 / 20)  # 2 apart in 3: 6 ways on each side
    assert ks_pvalue([1, 3], [2, 4]) == ks_pvalue([1, 2], [2, 1]) == 1
    apart = ks_pvalue(range(300), range(300, 600))
    assert apart == pytest.approx(2 / math.comb(600, 300), rel=1e-9)  # no digits are lost far below 1
    with pytest.raises(ValueError, match="expected values of both samples, got 2 and 0"):
        ks_pvalue([1, 2], [])


def test_kolmogorov_smirnov_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for n, m, shift in ((5, 9, 0.5), (40, 40, 0.3), (40, 17, 1.0), (30, 30, 3.0)):
        first = torch.randn(n, generator=generator).mul(4).round().tolist()  # with ties
        second = torch.randn(m, generator=generator).add(shift).mul(4).round().tolist()
        expected = stats.ks_2samp(first, second, method="exact").pvalue
        assert ks_pvalue(first, second) == pytest.approx(expected, rel=1e-6)


def test_auc_and_harmonic_mean_by_hand():
    assert auc([3, 1], [2, 1]) == (1 + 1 + 0 + 0.5) / 4
    assert auc([1], [2]) == 0
    assert harmonic_mean([1, 0.5]) == pytest.approx(2 / 3)
    assert harmonic_mean([1, 0]) == 0
