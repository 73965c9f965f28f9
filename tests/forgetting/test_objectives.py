from __future__ import annotations

import pytest
import torch

from cir.data.tokens import pad
from cir.forgetting.objectives import hidden_retain, mlp_breaking, original_output
from cir.measures import NonFiniteError
from tests import oracle

BATCH = pad([[1, 2, 3, 4], [1, 2, 3]])


def rand(seed: int) -> torch.Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mlp_breaking_is_its_formula():
    mask = BATCH.counted(1)
    before, now = {1: rand(0), 3: rand(1)}, {1: rand(2), 2: rand(5), 3: rand(3)}
    originals = {layer: original_output(out, mask) for layer, out in before.items()}
    got = float(mlp_breaking(now, originals, mask))
    assert abs(got / oracle.breaking_loss(now, before, mask) - 1) < 1e-6
    unchanged = float(mlp_breaking(before, originals, mask))
    assert unchanged > 1  # the mean of squares over the square of the mean
    opposed = {layer: -out for layer, out in before.items()}
    assert float(mlp_breaking(opposed, originals, mask)) == 0


def test_hidden_retain_is_its_formula_and_has_a_gradient_at_zero_distance():
    mask = BATCH.counted(1)
    before, now = rand(0), rand(1)
    assert (
        abs(
            float(hidden_retain(now, original_output(before, mask), mask)) / oracle.retain_loss(now, before, mask) - 1
        )
        < 1e-9
    )
    same = before.clone().requires_grad_(True)
    hidden_retain(same, original_output(before, mask), mask).backward()
    assert torch.isfinite(same.grad).all()


def test_masks_drop_padding_the_first_tokens_and_the_last():
    T, F = True, False
    assert BATCH.counted(1).tolist() == [F, T, T, T, F, T, T]
    assert BATCH.predicting(1).tolist() == [F, T, T, F, F, T, F]
    assert BATCH.predicting(0).tolist() == [T, T, T, F, T, T, F]


def test_outputs_that_cannot_be_broken_are_refused():
    mask = BATCH.counted(1)
    with pytest.raises(ValueError, match="got some that put out zeros alone"):
        original_output(torch.zeros(7, 6), mask)
    with pytest.raises(NonFiniteError, match="got NaN or infinity"):
        original_output(torch.full((7, 6), torch.nan), mask)
