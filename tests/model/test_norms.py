from __future__ import annotations

from functools import wraps

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from cir.data.tokens import pad
from cir.model import norms
from cir.model.capture import answering
from cir.model.finding import find_stack
from cir.model.norms import fused_norms, is_rms_norm

BATCH = pad([[1, 5, 9, 20, 7], [1, 30, 2, 11]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (LlamaRMSNorm(48, 1e-6), True),
        (nn.RMSNorm(48, 1e-5), True),
        (nn.RMSNorm(48), False),  # whose eps is that of its input's type
        (GemmaRMSNorm(48), False),  # scales by 1 + weight
        (Qwen3NextRMSNormGated(48), False),
        (nn.LayerNorm(48), False),
        (nn.Linear(48, 48), False),
    ],
)
def test_a_norm_is_fused_where_it_says_the_same(module, expected, dtype):
    torch.manual_seed(0)
    module = module.to(dtype)
    with torch.no_grad():
        module.weight.normal_()
    assert is_rms_norm(module) is expected


def test_captured_rows_are_those_of_the_modules_own_norms(model, monkeypatch, unchanged):
    def rows():
        unchanged(model)
        with answering(model, find_stack(model), 2) as tape:
            below = tape.below(BATCH)
            logits, hidden = tape.predict(below, torch.tensor([3, 7]))
            tokens = tape.backward(logits.square().sum(), hidden)
        unchanged(model)
        return tokens

    assert not list(fused_norms(model))  # launches cost a CPU nothing
    own = rows()
    monkeypatch.setattr(norms, "ON", ("cpu",))
    fused = [module for module, _ in fused_norms(model)]
    assert len(fused) == 2 * len(model.model.layers) + 1
    called = []
    monkeypatch.setattr(norms.F, "rms_norm", lambda *args, of=norms.F.rms_norm: called.append(1) or of(*args))
    found = rows()
    assert len(called) >= len(fused)
    for name, expected in own.items():
        torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-4)


def test_a_forward_that_another_library_hung_on_a_norm_stays(model, monkeypatch):
    monkeypatch.setattr(norms, "ON", ("cpu",))
    norm = model.model.norm
    assert norm in dict(fused_norms(model))
    norm.forward = wraps(norm.forward)(lambda x, own=norm.forward: own(x))
    assert norm not in dict(fused_norms(model))
    assert len(list(fused_norms(model))) == 2 * len(model.model.layers)
