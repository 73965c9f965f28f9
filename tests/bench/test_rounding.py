from __future__ import annotations

import pytest
import torch

import cir
from bench.rounding import Rounded
from cir.forgetting.update import add_outer, restore, snapshot
from cir.model.finding import find_stack
from tests.tiny import TEXT, facts, knowing_llama, tiny_llama


def after_small_updates(rounding):
    targets = find_stack(tiny_llama()).targets(3)
    restore(targets, [weight.bfloat16() for weight in snapshot(targets)])
    generator = torch.Generator().manual_seed(0)
    sites = {site.name: site for target in targets for site in (target.activation, target.gradient)}
    rows = {name: torch.randn(16, site.width, generator=generator) for name, site in sites.items()}
    rounded = Rounded(rounding)
    with rounded.used():
        for seed in range(8):
            add_outer(targets, rows, 5e-6, seed=seed)
    return rounded, snapshot(targets)


@pytest.mark.parametrize(("rounding", "low", "high"), [("nearest", 0, 0.2), ("stochastic", 0.8, 1.2)])
def test_what_is_kept_of_small_updates_is_counted(rounding, low, high):
    rounded, weights = after_small_updates(rounding)
    assert low <= rounded.kept / rounded.wanted <= high
    for weight in weights:
        assert torch.equal(weight, weight.bfloat16().float())


def test_compensated_is_the_float32_sum_rounded_once():
    exact, narrow = (after_small_updates(rounding)[1] for rounding in (None, "compensated"))
    for wanted, weight in zip(exact, narrow, strict=True):
        torch.testing.assert_close(weight, wanted, rtol=2**-8, atol=1e-6)


def test_the_steps_of_a_run_are_rounded(tokenizer):
    model, bounds = knowing_llama(), {"budget": 9.0, "worst_window": 9.0}  # so that nothing is taken back
    config = cir.CIRConfig(layers=0.5, relearning_steps=0, max_steps=4, check_every=2, **bounds)
    targets = find_stack(model).writers(2)
    restore(targets, [weight.bfloat16() for weight in snapshot(targets)])
    before, rounded = snapshot(targets), Rounded("nearest")
    with rounded.used():
        cir.unlearn(model, tokenizer, facts(6), retain=TEXT, config=config, progress=False)
    assert 0.5 < rounded.kept / rounded.wanted < 1.5
    for weight, was in zip(snapshot(targets), before, strict=True):
        assert torch.equal(weight, weight.bfloat16().float())
        assert not torch.equal(weight, was)
