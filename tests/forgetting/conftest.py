from __future__ import annotations

import pytest
import torch

from cir.forgetting.update import snapshot
from cir.model.capture import answering
from cir.model.finding import find_stack
from tests.tiny import FIRST, knowing_llama, word_tokenizer


@pytest.fixture(scope="module")
def knowing():
    return knowing_llama(), word_tokenizer()


@pytest.fixture
def opened(knowing):
    """The knowing model, its weights put back at the end, its tokenizer and targets, and a capture of it."""
    model, tokenizer = knowing
    stack = find_stack(model)
    targets = stack.writers(FIRST)
    before = snapshot(targets)
    with answering(model, stack, FIRST) as tape:
        yield model, tokenizer, targets, tape
    with torch.no_grad():
        for target, weight in zip(targets, before, strict=True):
            target.linear.weight.copy_(weight)
