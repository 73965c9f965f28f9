from __future__ import annotations

import numpy as np
import pytest

from cir.measures import evaluate
from cir.proof.attacks import attack
from cir.proof.relearning import relearn
from cir.system.checks import check_number
from tests.tiny import facts, tiny_llama, word_tokenizer


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), True, "1", None, 0, -1, 1.5, [1]])
def test_what_is_no_count_is_refused(wrong):
    with pytest.raises(ValueError, match="count: expected a whole number of at least 1, got"):
        check_number("count", wrong, 1)


def test_numbers_are_taken():
    for right in (1, np.int64(2), 10**400):
        check_number("count", right, 1)
    for right in (0, 0.5, np.float32(0.5)):
        check_number("rate", right, 0, whole=False)


def test_measures_and_attacks_refuse_them_before_any_work():
    model, tokenizer, some = tiny_llama(), word_tokenizer(), facts(4)
    for call in (
        lambda: evaluate(model, tokenizer, some, generate=-1),
        lambda: evaluate(model, tokenizer, some, text="word1 " * 999, max_tokens=0),
        lambda: attack(model, tokenizer, some, samples=0),
        lambda: relearn(model, tokenizer, some[:2], some[2:], epochs=0),
        lambda: relearn(model, tokenizer, some[:2], some[2:], lr=float("nan")),
        lambda: relearn(model, tokenizer, some[:2], some[2:], lora_rank=-1),
    ):
        with pytest.raises(ValueError, match=r"expected a (whole )?number of at least"):
            call()
