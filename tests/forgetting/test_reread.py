"""The loss on the same text while only late layers change."""

from __future__ import annotations

import pytest
import torch

from cir.forgetting.reread import Reread
from cir.measures import token_losses
from cir.model.capture import answering
from cir.model.sites import find_stack
from tests.model.test_sites import build


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_losses_are_those_of_whole_forwards_though_lower_layers_run_once(family, first, unchanged):
    model = build(family, vocab_size=128).eval()
    stack = find_stack(model)
    first = min(first, len(stack.mlps) - 1)
    rows = torch.randint(0, 128, (5, 300), generator=torch.Generator().manual_seed(0))
    calls = []
    handle = stack.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with answering(model, stack, first) as tape:
        reread = Reread(tape, rows)
        torch.testing.assert_close(reread.losses(), token_losses(model, rows), atol=2e-5, rtol=2e-5)
        with torch.no_grad():
            for target in stack.writers(first):
                target.linear.weight.mul_(1.5)
        calls.clear()
        now = reread.losses()
        assert bool(calls) == (first == 0)
        torch.testing.assert_close(now, token_losses(model, rows), atol=2e-5, rtol=2e-5)
    handle.remove()
