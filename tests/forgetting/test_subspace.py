from __future__ import annotations

import pytest
import torch

from cir.forgetting.breaking import weight_gradient_rows
from cir.forgetting.subspace import Subspace, SubspaceStream
from cir.model.sites import Site, Target
from tests import oracle

SITE = Site("s", 12, "activation")


def rows(count: int = 300, seed: int = 0, sink: float = 0.0) -> torch.Tensor:
    """Correlated rows with a mean, and where asked one row that dwarfs all others."""
    generator = torch.Generator().manual_seed(seed)
    scales = 2.0 ** -torch.arange(12)
    x = (
        torch.randn(count, 12, generator=generator)
        * scales
        @ torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    )
    x = x + 0.5 * torch.randn(12, generator=generator)
    if sink:
        x[7] *= sink
    return x


def stream(rank: int, mode: str = "orthogonal", **options) -> SubspaceStream:
    return SubspaceStream([SITE], rank_activation=rank, rank_gradient=1, mode=mode, **options)


def solve(x: torch.Tensor, rank: int, mode: str = "orthogonal", **options) -> Subspace:
    source = stream(rank, mode, **options)
    for piece in x.split(37):
        source.observe({"s": piece})
    return source.solve()["s"]


def test_orthogonal_spans_the_mean_and_the_leading_components():
    x = rows()
    mean, covariance = oracle.covariance(x)
    components = torch.linalg.eigh(covariance)[1].flip(1)[:, :3]
    basis = solve(x, 4, exact=True).basis.double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    for direction in (mean / mean.norm(), *components.T):
        assert float((direction - basis @ (basis.T @ direction)).norm()) < 1e-5


def test_sequential_is_one_projection_after_the_other():
    x = rows()
    mean, covariance = oracle.covariance(x)
    want = x.double()
    for direction in (mean / mean.norm(), *torch.linalg.eigh(covariance)[1].flip(1)[:, :3].T):
        want = want - torch.outer(want @ direction, direction)
    got = solve(x, 4, "sequential", exact=True).collapse_(x.clone())
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


def test_soft_scales_directions_down_to_the_smallest_kept():
    x = rows()
    moments = x.double().T @ x.double() / len(x)
    values, vectors = torch.linalg.eigh(moments)
    values, vectors = values.flip(0), vectors.flip(1)
    got = solve(x, 4, "soft", exact=True).collapse_(x.clone()).double() @ vectors
    want = x.double() @ vectors
    want[:, :4] *= values[3] / values[:4]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sink", [0.0, 1e5])
def test_the_sketch_finds_what_the_exact_basis_holds(sink):
    generator = torch.Generator().manual_seed(0)
    width, rank = 200, 12
    decay = torch.exp(-torch.arange(width) / 6)
    x = torch.randn(1000, width, generator=generator) * decay
    if sink:
        x[3] *= sink
    site = Site("s", width, "gradient")
    source = SubspaceStream([site], rank_activation=1, rank_gradient=rank)
    held = []
    for _ in range(2):
        source.observe({"s": x})
        held.append(oracle.held_variance(x, source.solve()["s"].basis, rank - 1))
    assert held[0] > 0.97
    assert held[1] > 0.995


def ridge(site: Site, x: torch.Tensor, rank: float, shift: float, **options) -> torch.Tensor:
    """What the collapse leaves of the rows."""
    source = SubspaceStream([site], rank_activation=rank, rank_gradient=1, mode="ridge", ridge_activation=shift)
    source.observe({site.name: x})
    return source.solve()[site.name].collapse_(x.clone()).double()


def resolvent(x: torch.Tensor, shift: float) -> torch.Tensor:
    """The same by the eigenvectors of the second moments."""
    values, vectors = torch.linalg.eigh(x.double().T @ x.double() / len(x))
    m = shift * values.sum() / x.shape[1]
    return x.double() @ (vectors * (m / (values + m))) @ vectors.T


@pytest.mark.parametrize("count", [300, 5])  # fewer rows than directions, too
def test_ridge_is_the_resolvent_of_the_second_moments(count):
    x = rows(count)
    torch.testing.assert_close(ridge(SITE, x, 12, 0.3), resolvent(x, 0.3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1000, 40])
def test_ridge_of_a_sketch_counts_what_it_leaves_out_as_unused(count):
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(-torch.arange(200) / 6)
    x = torch.randn(count, 200, generator=generator) * scales
    got, want = ridge(Site("s", 200, "activation"), x, 20, 0.01), resolvent(x, 0.01)
    assert float((got - want).norm() / want.norm()) < 0.1
    # Of what is used most, as much is left as the exact resolvent leaves.
    torch.testing.assert_close(got[:, :8].norm(dim=0), want[:, :8].norm(dim=0), rtol=0.1, atol=0)


def test_directions_left_are_the_trace_of_what_collapse_does():
    x = rows()
    source = stream(12, mode="ridge", ridge_activation=0.3)
    source.observe({"s": x})
    solved = source.solve()
    left = solved["s"].collapse_(torch.eye(12)).trace() / 12
    assert solved.left([SITE, Site("other", 12, "gradient")]) == {"activation": pytest.approx(float(left), abs=1e-6)}
    assert 0.1 < left < 0.9


def test_ridge_of_rows_without_length_leaves_all():
    zeros = torch.zeros(5, 12)
    source = SubspaceStream([SITE], rank_activation=4, rank_gradient=1, mode="ridge", ridge_activation=0.3)
    source.observe({"s": zeros})
    x = rows()
    assert torch.equal(source.solve()["s"].collapse_(x.clone()), x)


def test_the_seed_decides_and_the_global_generator_does_not_move():
    state = torch.random.get_rng_state()
    wide = Site("s", 100, "activation")

    def basis(seed: int) -> torch.Tensor:
        source = SubspaceStream([wide], rank_activation=4, rank_gradient=1, seed=seed)
        source.observe({"s": torch.randn(130, 100, generator=torch.Generator().manual_seed(9))})
        return source.solve()["s"].basis

    assert torch.equal(basis(1), basis(1))
    assert not torch.equal(basis(1), basis(2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_few_or_no_rows():
    assert torch.isfinite(solve(rows(2), 5).basis).all()
    assert torch.isfinite(solve(torch.zeros(5, 12), 5).basis).all()
    with pytest.raises(ValueError, match="at least one token, got none"):
        solve(rows(0), 2)
    x = rows()
    x[3, 3] = torch.inf
    with pytest.raises(ValueError, match="finite moments"):
        solve(x, 2)


def test_refuses_ranks_and_modes():
    with pytest.raises(ValueError, match="s: expected a rank of 0 to 12, got 13"):
        stream(13)
    with pytest.raises(ValueError, match="mode: expected one of orthogonal, sequential, soft or ridge, got 'hard'"):
        stream(2, "hard")


def test_ranks_are_numbers_or_shares_of_the_width():
    sites = [SITE, Site("wide", 40, "activation"), Site("out", 12, "gradient")]
    source = SubspaceStream(sites, rank_activation=0.25, rank_gradient=0)
    generator = torch.Generator().manual_seed(0)
    source.observe({site.name: torch.randn(100, site.width, generator=generator) for site in sites})
    assert {name: subspace.basis.shape for name, subspace in source.solve().items()} == {
        "s": (12, 3),
        "wide": (40, 10),
    }


@pytest.mark.parametrize("shared", [True, False])
def test_weight_gradient_rows_have_the_moments_of_the_weight_gradients(shared):
    generator = torch.Generator().manual_seed(0)
    sites = [Site("a", 7, "activation"), Site("g", 5, "gradient"), Site("u", 6, "gradient")]
    tokens = {site.name: torch.randn(9, site.width, generator=generator) for site in sites}
    linear = torch.nn.Linear(1, 1)
    targets = [Target(linear, sites[0], site, "linear.weight") for site in sites[1 : 3 if shared else 2]]
    rows = weight_gradient_rows(targets, tokens)
    gradients = {t.gradient.name: tokens[t.gradient.name].double().T @ tokens["a"].double() for t in targets}
    assert rows.keys() == {"a", *gradients}
    wanted = {name: gradient @ gradient.T for name, gradient in gradients.items()}
    wanted["a"] = sum(gradient.T @ gradient for gradient in gradients.values())
    for name, moments in wanted.items():
        got = rows[name].double()
        torch.testing.assert_close(got.T @ got, moments, atol=1e-4, rtol=1e-5)
