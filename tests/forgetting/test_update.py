from __future__ import annotations

import pytest
import torch

from bench.eager import EagerCIR, exact_pca
from cir.config import BreakingConfig
from cir.data.facts import load_facts
from cir.forgetting.batches import fact_batches
from cir.forgetting.breaking import Breaker
from cir.forgetting.update import NonFiniteError, plain_step, restore, selective_step, sign_step, sizes, snapshot
from cir.model.capture import capture
from cir.model.finding import find_stack
from cir.model.sites import sites_of
from tests import oracle
from tests.tiny import facts, tiny_llama


def random_tokens(targets, rows=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {site.name: torch.randn(rows, site.width, generator=generator) for site in sites_of(targets)}


def test_selective_step_moves_all_weights_together_by_the_rate(model):
    targets = find_stack(model).targets(1)
    tokens, before = random_tokens(targets), snapshot(targets)
    norm = selective_step(targets, tokens, 0.25)
    deltas = [t.linear.weight.detach() - w for t, w in zip(targets, before, strict=True)]
    gradients = [oracle.outer_sum(tokens[t.gradient.name], tokens[t.activation.name]) for t in targets]
    total = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    assert abs(norm / float(total) - 1) < 1e-5
    for delta, gradient in zip(deltas, gradients, strict=True):
        torch.testing.assert_close(delta.double(), -0.25 / total * gradient, rtol=1e-3, atol=1e-6)
    assert abs(float(torch.stack([d.double().square().sum() for d in deltas]).sum().sqrt()) / 0.25 - 1) < 1e-5
    restore(targets, before)
    assert all(torch.equal(t.linear.weight, w) for t, w in zip(targets, before, strict=True))


def test_plain_step_is_sgd(model):
    targets = find_stack(model).targets(0)
    tokens, before = random_tokens(targets), snapshot(targets)
    plain_step(targets, tokens, 1e-2)
    for target, weight in zip(targets, before, strict=True):
        gradient = oracle.outer_sum(tokens[target.gradient.name], tokens[target.activation.name])
        torch.testing.assert_close(target.linear.weight.double(), weight - 1e-2 * gradient, rtol=1e-4, atol=1e-5)


def test_what_bfloat16_drops_is_kept_for_the_next_step_of_each_weight():
    moved = {}
    for how in ("nearest", "compensated"):
        model = tiny_llama(torch.bfloat16)
        targets, remainders = find_stack(model).targets(0), {}
        tokens, before = random_tokens(targets), snapshot(targets)
        for step in range(64):  # each alone is less than half of what most weights can move by
            plain_step(targets, tokens, 1e-5, how, step, remainders)
        moved[how] = [t.weight.detach().double() - w.double() for t, w in zip(targets, before, strict=True)]
    assert remainders.keys() == {target.name for target in targets}
    for target, nearest, kept in zip(targets, moved["nearest"], moved["compensated"], strict=True):
        exact = -64e-5 * oracle.outer_sum(tokens[target.gradient.name], tokens[target.activation.name])
        assert (nearest - exact).norm() > 0.5 * exact.norm()
        assert (kept - exact).norm() < 0.5 * (nearest - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sign_step_moves_every_weight_by_as_much_on_average(dtype):
    targets = find_stack(tiny_llama(dtype)).targets(0)
    tokens, before = {n: x.to(dtype) for n, x in random_tokens(targets).items()}, snapshot(targets)
    sign_step(targets, tokens, [1e-3 * size for size in sizes(targets)], seed=3)
    for target, weight in zip(targets, before, strict=True):
        signs = oracle.outer_sum(tokens[target.gradient.name], tokens[target.activation.name]).sign()
        moved = (target.linear.weight.double() - weight.double()) * signs / weight.double().square().mean().sqrt()
        assert moved.mean().item() == pytest.approx(1e-3, rel=0.4 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("step", [selective_step, plain_step])
def test_what_is_not_finite_changes_no_weight(model, step, bad):
    targets = find_stack(model).targets(1)
    tokens, before = random_tokens(targets), snapshot(targets)
    tokens[targets[-1].gradient.name][3, 1] = bad
    with pytest.raises(NonFiniteError, match="no weight was changed"):
        step(targets, tokens, 0.1)
    assert all(torch.equal(t.linear.weight, w) for t, w in zip(targets, before, strict=True))


@pytest.mark.parametrize("step", [selective_step, plain_step])
def test_no_rows_change_nothing(model, step):
    targets = find_stack(model).targets(1)
    before = snapshot(targets)
    step(targets, random_tokens(targets, rows=0), 0.1)
    assert all(torch.equal(t.linear.weight, w) for t, w in zip(targets, before, strict=True))


def test_a_zero_gradient_changes_nothing(model):
    targets = find_stack(model).targets(0)
    tokens, before = {name: 0 * rows for name, rows in random_tokens(targets).items()}, snapshot(targets)
    assert selective_step(targets, tokens, 0.1) == 0
    assert all(torch.equal(t.linear.weight, w) for t, w in zip(targets, before, strict=True))


def paper_and_ours(make, tokenizer, config):
    """The weights that an epoch of the eager paper form and one of ours reach from the same model."""
    weights = []
    for ours in (False, True):
        model = make()
        stack = find_stack(model)
        layers = config.layers(len(stack.mlps))
        targets = stack.targets(layers[-1])
        batches = fact_batches(tokenizer, load_facts(facts(8)), config, model.device)
        before = snapshot(targets)
        if ours:
            with capture(model, stack, layers[-1]) as tape:
                breaker = Breaker(tape, targets, layers, batches, [], config)
                breaker.fit()
                breaker.epoch(config.rate)
        else:
            eager = EagerCIR(model, stack, layers, config, solve=exact_pca)
            eager.record(batches)
            eager.epoch(batches)
            eager.epoch(batches)
        weights.append([t.linear.weight.detach().double() - w for t, w in zip(targets, before, strict=True)])
    return weights


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-5), (torch.float32, 2e-3)])
def test_sequential_and_exact_our_update_is_the_papers(tokenizer, dtype, bound):
    config = BreakingConfig(
        mode="sequential",
        exact=True,
        rank_activation=5,
        rank_gradient=7,
        loss_layers=(1, 3),
        batch_size=4,
        rate=0.05,
    )
    theirs, ours = paper_and_ours(lambda: tiny_llama(dtype), tokenizer, config)
    for their, our in zip(theirs, ours, strict=True):
        assert float((their - our).norm() / their.norm()) < bound
