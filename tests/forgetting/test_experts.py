"""What a mixture of experts has in the place of a linear: rows by the router, a basis and an update for each."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import cir
from cir.config import CIRConfig
from cir.forgetting.doses import gram
from cir.forgetting.planning import plan
from cir.forgetting.subspace import SubspaceStream
from cir.forgetting.update import _groups as groups
from cir.forgetting.update import add_outer, outer_norm_sq, restore, sign_step, sizes, snapshot
from cir.measures import mean_recall, recall
from cir.model.finding import find_stack
from cir.model.sites import apart, sites_of
from tests.model.families import build
from tests.tiny import TEXT, facts, knowing_mixture, word_tokenizer

TOLD = cir.load_facts(facts(12))
CONFIG = CIRConfig(layers=0.5, max_change=0.1, retain_tokens=1024, budget=9.0, worst_window=9.0)


@pytest.fixture(scope="module")
def mixture():
    return knowing_mixture()


@pytest.fixture
def targets(mixture):
    model = copy.deepcopy(mixture)
    stack = find_stack(model)
    model.double()  # in which transformers does not run experts, and need not here
    return stack.mlps[1].targets  # of the experts, those that read and those that write


def rows_of(targets, count=7):
    """Random rows at every site, and two of five experts for each, or one and none."""
    generator = torch.Generator().manual_seed(0)
    routes = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(count)])
    tokens = {}
    for site in sites_of(targets):
        shape = (count, 2, site.width) if site.experts else (count, site.width)
        tokens[site.name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        if site.experts:
            tokens[site.routes] = routes
    return tokens


def changes(target, tokens):
    """(T, E, D_out, D_in): what each token adds to the weights of each expert."""
    g, a = (tokens[site.name] for site in (target.gradient, target.activation))
    routes = tokens[target.gradient.routes or target.activation.routes]
    found = torch.zeros(len(routes), *target.weight.shape, dtype=torch.float64)
    for token, own in enumerate(routes.tolist()):
        for slot, number in enumerate(own):
            if number < target.experts:
                rows = [x[token, slot] if x.ndim == 3 else x[token] for x in (g, a)]
                found[token, number] += torch.outer(*rows)
    return found


def test_inner_products_are_those_of_the_changes_of_all_experts(targets):
    left, right = rows_of(targets), rows_of(targets)
    for name, rows in right.items():
        if rows.is_floating_point():
            rows.mul_(2).add_(torch.randn_like(rows))
            assert not torch.equal(rows, left[name])
    writers = [target for target in targets if target.activation.experts]
    expected = sum(changes(t, left).flatten(1) @ changes(t, right).flatten(1).T for t in writers)
    torch.testing.assert_close(gram(writers, left, right), expected)
    fewer = {name: rows[1:4] for name, rows in right.items()}
    torch.testing.assert_close(gram(writers, left, fewer), expected[:, 1:4])


def test_updates_and_their_norm_are_those_of_each_token_alone(targets):
    tokens = rows_of(targets)
    whole = {target.name: changes(target, tokens).sum(0) for target in targets}
    squared = sum(float(change.square().sum()) for change in whole.values())
    assert float(outer_norm_sq(groups(targets, tokens))) == pytest.approx(squared, rel=1e-10)
    before = [target.weight.detach().clone() for target in targets]
    held = snapshot(targets)
    add_outer(targets, tokens, 0.5)
    for target, weight in zip(targets, before, strict=True):
        torch.testing.assert_close(target.weight.detach() - weight, 0.5 * whole[target.name])
    restore(targets, held)
    assert all(torch.equal(t.weight, weight) for t, weight in zip(targets, before, strict=True))
    sign_step(targets, tokens, [1e-3 * size for size in sizes(targets)], seed=1)
    for target, weight in zip(targets, before, strict=True):
        length = 1e-3 * weight.square().mean().sqrt()
        torch.testing.assert_close(target.weight.detach() - weight, length * whole[target.name].sign())


def test_every_expert_has_a_basis_of_its_own_rows_and_those_without_have_nothing_to_spare(targets):
    sites, tokens = sites_of(targets), rows_of(targets)
    for name in {site.routes for site in sites if site.experts}:
        tokens[name][tokens[name] == 3] = 5  # none to the fourth
    ranks = {"rank_activation": 4, "rank_gradient": 4, "ridge_activation": 0.1, "ridge_gradient": 0.1}
    stream = SubspaceStream(sites, mode="ridge", **ranks)
    stream.observe(tokens)
    common = stream.solve()
    alone = SubspaceStream(apart(sites), mode="ridge", **ranks)
    for site in sites:
        alone.observe(dict(site.spread(tokens)))
    names = {name for site in sites for name, _ in site.spread(tokens)}
    assert common.keys() == names
    assert not any("[3/5]" in name for name in names)
    tokens = rows_of(targets)
    collapsed = common.collapse_({name: rows.clone() for name, rows in tokens.items()}, sites)
    for site in sites:
        for (name, rows), (_, before) in zip(site.spread(collapsed), site.spread(tokens), strict=True):
            expected = common[name].collapse_(before.clone()) if name in common else before
            torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_forgets_the_same_each_time(mixture, dtype):
    tokenizer, runs = word_tokenizer(), []
    start = copy.deepcopy(mixture).to(dtype)
    for _ in range(2):
        model = copy.deepcopy(start)
        told = {"contrast": TOLD[4:], "retain": TEXT, "config": CONFIG, "progress": False}
        report = cir.unlearn(model, tokenizer, TOLD[:4], **told)
        runs.append(dict(model.named_parameters()))
    assert report.after.mean_recall < 0.05 < 0.9 < report.before.mean_recall
    assert mean_recall(recall(model, tokenizer, TOLD[4:])) > 0.95 * mean_recall(recall(start, tokenizer, TOLD[4:]))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    moved = {name for name, before in start.named_parameters() if not torch.equal(runs[0][name], before)}
    written = ("self_attn.o_proj.weight", "mlp.experts.down_proj")
    assert moved == {f"model.layers.{layer}.{name}" for layer in (2, 3) for name in written}


def test_subspaces_of_a_mixture_are_kept(mixture, tmp_path):
    model, tokenizer = copy.deepcopy(mixture), word_tokenizer()
    fitted = cir.Subspaces.fit(model, tokenizer, TEXT, TOLD[4:8], config=CONFIG, progress=False)
    assert any(name.endswith("experts.down_proj.in[4/5]") for name in fitted)
    fitted.save(tmp_path / "subspaces")
    kept = cir.Subspaces.load(tmp_path / "subspaces")
    outcomes = []
    for subspaces in (fitted, kept):
        own = copy.deepcopy(model)
        cir.unlearn(own, tokenizer, TOLD[:4], subspaces=subspaces, retain=TEXT, config=CONFIG, progress=False)
        outcomes.append([parameter.detach() for parameter in own.parameters()])
    for a, b in zip(*outcomes, strict=True):  # bases lie in memory as they were solved, or as they were read
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_what_is_not_built_for_mixtures_is_refused_before_anything_changes(mixture, unchanged):
    unchanged(mixture)
    config = replace(CIRConfig.repselect(), retain_length=32, budget=9.0)
    with pytest.raises(ValueError, match="statistics: expected tokens for a mixture of experts"):
        cir.unlearn(mixture, word_tokenizer(), TOLD[:4], retain=TEXT, config=config, progress=False)
    with pytest.raises(ValueError, match="expected a dense model to plan for, got a mixture of experts"):
        plan(mixture.config, 4, gpu="h100")
    with pytest.raises(ValueError, match=r"experts.gate_up_proj: expected .* got MixtralExperts with torch.float64"):
        find_stack(copy.deepcopy(mixture).double())


def test_where_two_modules_say_what_an_mlp_does_what_breaks_one_is_refused(unchanged):
    model, tokenizer = build("granitemoeshared"), word_tokenizer()
    unchanged(model)
    config = replace(CIRConfig.paper(), loss_layers=(1, 2), retain_length=32)
    with pytest.raises(ValueError, match=r"one module that puts out all of a layer's MLP, got two in layers \[1\]"):
        cir.unlearn(model, tokenizer, TOLD[:4], retain=TEXT, config=config, progress=False)
    with pytest.raises(ValueError, match="layer 0: expected one module that puts out all of its MLP, got two"):
        cir.locate(model, tokenizer, TOLD[:4], progress=False)
