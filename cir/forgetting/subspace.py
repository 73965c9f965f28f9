"""Common subspaces of activations and gradients: streamed moments in, a basis for each site out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cir.config import MODES, rank_at
from cir.model.sites import Site, apart
from cir.model.taps import hit
from cir_kernels import Moments, accumulate_moments, collapse, new_moments, symmetric

OVERSAMPLING = 32
"""Columns of the test matrix beyond twice the rank (beyond the rank + 64, where that is less)."""


@dataclass(frozen=True)
class Subspace:
    """What is common at one site, as the collapse X - (X P) M^T P^T reads it.

    Attributes:
        basis: P, (D, k) float32.
        mixer: M, (k, k) float32; None for the identity.
        variance: (c,) float64, variance a token along the principal components kept, largest first.
    """

    basis: Tensor
    mixer: Tensor | None
    variance: Tensor

    def collapse_(self, x: Tensor) -> Tensor:
        """Take the common subspace out of rows ``x`` (T, D), in place."""
        return collapse(x, self.basis, self.mixer, out=x)


def principal_components(moments: Moments, rank: int, centred: bool = True) -> tuple[Tensor, Tensor]:
    """The leading eigenpairs of the covariance that ``moments`` streamed.

    With a test matrix: single-pass Nystroem, stabilised by a shift (Tropp et al., NeurIPS 2017, algorithm 3),
    in float64 throughout. Without one: the full eigendecomposition.

    Returns:
        Components (D, rank) with orthonormal columns and their variances (rank,), largest first, float64.
        Directions without variance are zero columns.

    Raises:
        ValueError: if no rows were seen, ``rank`` exceeds the columns kept, or a moment is not finite.
    """
    scatter = _checked(moments)
    omega = moments.omega
    if rank > scatter.shape[1]:
        raise ValueError(f"expected at most {scatter.shape[1]} components, got {rank}")
    mean = moments.total / moments.count * centred
    if omega is None:
        variance, components = torch.linalg.eigh(scatter.addr_(moments.total, mean, alpha=-1))
    else:
        omega = omega.double()
        action = torch.addr(scatter, moments.total, mean @ omega, alpha=-1)
        variance, components = _nystroem(action, omega)
    variance = variance.flip(-1)[:rank].clamp_min(0) / moments.count
    components = torch.linalg.qr(components.flip(-1)[:, :rank])[0]
    real = variance > scatter.shape[1] * torch.finfo(variance.dtype).eps * variance[:1]
    return components * real, variance * real


def _checked(moments: Moments) -> Tensor:
    """S Omega (D, s), or S (D, D) where there is no test matrix."""
    if not moments.count:
        raise ValueError("expected moments of at least one token, got none")
    if not torch.isfinite(moments.action).all():
        raise ValueError("expected finite moments, got NaN or infinity")
    return symmetric(moments.action, len(moments.total)) if moments.omega is None else moments.action


def _nystroem(action: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs, ascending, of the rank-s approximation of S from S Omega, whatever the columns of Omega."""
    shift = torch.finfo(action.dtype).eps * torch.linalg.norm(action)
    shift = shift.clamp_min(torch.finfo(action.dtype).tiny)
    root = _root(action, omega, shift)
    if root is None:
        # Fewer independent rows than columns, by rounding: drop the null directions instead.
        shifted = action + shift * omega
        core = omega.T @ shifted
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        scale = torch.where(values > shift, values.clamp_min(shift).rsqrt(), 0)
        root = shifted @ (vectors * scale)
    # S is root root^T: the Gram matrix (s, s) holds its eigenvalues, and is cheaper than an SVD of (D, s).
    values, vectors = torch.linalg.eigh(root.T @ root)
    components = (root @ vectors) / values.clamp_min(shift).sqrt()
    return (values - shift), components


def _root(action: Tensor, omega: Tensor, shift: Tensor) -> Tensor | None:
    """B (D, s) with B B^T = S + ``shift`` I on the span of S Omega; None where rounding leaves no Cholesky factor."""
    shifted = action + shift * omega
    core = omega.T @ shifted
    factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
    return None if failed else torch.linalg.solve_triangular(factor.mT, shifted, upper=True, left=False)


def ridge_subspace(moments: Moments, ridge: float) -> Subspace:
    """X m (C + m I)^-1, with C the uncentred second moments and m = ``ridge`` of their mean eigenvalues.

    With a root B of C this is X - (X Q) Q^T for Q = B L^-T, L L^T = B^T B + m I: triangular factors alone, where the
    eigenvectors would take some ten times the work. From a test matrix it is that of the Nystroem approximation of C:
    what that leaves out counts as unused.
    """
    scatter = _checked(moments)
    width, omega = len(moments.total), moments.omega
    # Of a test matrix with entries of one variance this is unbiased, and varies little over many columns.
    trace = (scatter.diagonal().sum() if omega is None else (omega.double() * scatter).sum()) * (
        1.0 if omega is None else width / omega.double().square().sum()
    )
    shift = ridge * trace / width
    if not shift > 0:
        return Subspace(scatter.new_zeros(width, 0).float(), None, scatter.new_zeros(0))
    root, part = None, 1e-6
    while root is None:  # so little beside m that it does not matter, and more only where rounding asks for it
        if omega is None:
            root, failed = torch.linalg.cholesky_ex(scatter + torch.diag((part * shift).expand(width)))
            root = None if failed else root
        else:
            root = _root(scatter, omega.double(), part * shift)
        part *= 100
    gram = root.T @ root
    gram.diagonal().add_(shift)
    factor = torch.linalg.cholesky(gram)
    basis = torch.linalg.solve_triangular(factor.mT, root, upper=True, left=False)
    return Subspace(basis.float(), None, scatter.new_zeros(0))


def common_subspace(moments: Moments, rank: int, mode: str, ridge: float = 0.0) -> Subspace:
    """The subspace of ``rank`` directions to collapse, from the moments of one site.

    ``ridge``: see :func:`ridge_subspace`; as many directions as the moments hold.
    ``orthogonal``: span of the mean and the rank - 1 leading components, M = I: a projector.
    ``sequential``: the paper's own order, the unit mean first and then each of the rank - 1 components;
    M = [[1, 0], [-V^T mu, I]]. Not a projector, as mu is not orthogonal to V.
    ``soft`` (RepSelect, arXiv 2606.17168): the rank leading directions of the uncentred moments, so that the
    mean counts among them, each scaled by lambda_min / lambda_i instead of removed.
    """
    if mode == "soft":
        basis, variance = principal_components(moments, rank, centred=False)
        kept = torch.where(variance > 0, variance[-1] / variance.clamp_min(1e-300), 1.0)
        return Subspace(basis.float(), torch.diag(1 - kept).float(), variance)
    if mode == "ridge":
        return ridge_subspace(moments, ridge)
    components, variance = principal_components(moments, rank - 1)
    # A mean of rounding errors, left by an earlier collapse, has no direction.
    mean = _unit(moments.total / moments.count, negligible=1e-6 * variance[:1].sum().sqrt())
    if mode == "orthogonal":
        rest = _unit(mean - components @ (components.T @ mean), negligible=torch.full_like(mean[0], 1e-6))
        return Subspace(torch.cat([components, rest[:, None]], dim=1).float(), None, variance)
    basis = torch.cat([mean[:, None], components], dim=1)
    mixer = torch.eye(rank, dtype=basis.dtype, device=basis.device)
    mixer[1:, 0] = -(components.T @ mean)
    return Subspace(basis.float(), mixer.float(), variance)


def _unit(vector: Tensor, negligible: Tensor) -> Tensor:
    """``vector`` at length 1, or zero where it is no longer than ``negligible``."""
    norm = vector.norm()
    return torch.where(norm > negligible, vector / norm, 0)


class SiteSubspaces(Mapping[str, Subspace]):
    """The common subspace of every site, by site name. Fitted on a model and kept: :class:`cir.Subspaces`."""

    def __init__(
        self, subspaces: Mapping[str, Subspace], mode: str, fitted_on: Mapping[str, Any] | None = None
    ) -> None:
        self._subspaces = dict(subspaces)
        self.fitted_on = dict(fitted_on or {})
        """What ``Subspaces.fit`` notes: ``fingerprint`` of the model, its loss ``layers``, the ``contrast`` facts."""
        self.mode = mode

    def __getitem__(self, name: str) -> Subspace:
        return self._subspaces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._subspaces)

    def __len__(self) -> int:
        return len(self._subspaces)

    def to(self, device: torch.device) -> SiteSubspaces:
        """The same with all bases on ``device``."""
        moved = {
            name: Subspace(s.basis.to(device), None if s.mixer is None else s.mixer.to(device), s.variance.to(device))
            for name, s in self.items()
        }
        return SiteSubspaces(moved, self.mode, self.fitted_on)

    def left(self, sites: Sequence[Site]) -> dict[str, float]:
        """By kind of site, the mean share of its directions that :meth:`collapse_` leaves, of a ridge's."""
        shares: dict[str, list[float]] = {}
        for site in apart(sites):
            if site.name in self:
                taken = float(self[site.name].basis.double().square().sum())
                shares.setdefault(site.kind, []).append(1 - taken / site.width)
        return {kind: sum(own) / len(own) for kind, own in shares.items()}

    def collapse_(self, tokens: dict[str, Tensor], sites: Iterable[Site]) -> dict[str, Tensor]:
        """Collapse rows (T, width), in place, at those of ``sites`` that have a subspace; returns ``tokens``."""
        for site in sites:
            if not site.experts:
                if site.name in self:
                    self[site.name].collapse_(tokens[site.name])
                continue
            rows = tokens[site.name].flatten(0, 1)
            for number, _, places in hit(tokens[site.routes], site.experts):
                if (own := site.of_expert(number).name) in self:
                    rows[places] = self[own].collapse_(rows[places])
        return tokens


def columns_at(site: Site, rank: int, exact: bool = False) -> int:
    """Columns of S Omega to stream for ``rank`` directions; the site's width where S itself is."""
    # As many extra columns as components where few are kept: the slower the spectrum falls, the more it takes.
    columns = min(rank + min(rank, 64) + OVERSAMPLING, site.width)
    # The whole scatter takes no more work than a sketch of half its width.
    return site.width if exact or columns > site.width / 2 else columns


class SubspaceStream:
    """Streams tokens of many sites into moments, and solves them into :class:`SiteSubspaces` once an epoch.

    Memory is D x s float64 a site, s = columns of the test matrix, whatever the number of tokens. Every solve
    starts the next stream warm: its test matrix is the solved components plus fresh random columns.

    Args:
        sites: what to stream.
        rank_activation, rank_gradient: k of the two kinds of site, the mean included, see :func:`rank_at`; 0 streams
            none of the kind.
        mode: of :func:`common_subspace`. ridge_activation, ridge_gradient: m of ``ridge``.
        exact: keep the full D x D scatter instead of a sketch.
        seed: of the random columns.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        *,
        rank_activation: float | None,
        rank_gradient: float | None,
        mode: str = "orthogonal",
        ridge_activation: float = 0.0,
        ridge_gradient: float = 0.0,
        exact: bool = False,
        seed: int = 0,
    ) -> None:
        if mode not in (*MODES, "ridge"):
            raise ValueError(f"mode: expected one of {', '.join(MODES)} or ridge, got {mode!r}")
        kinds = {"activation": rank_activation, "gradient": rank_gradient}
        self._ranks = {site: rank_at(site, kinds[site.kind]) for site in sites}
        for site, rank in self._ranks.items():
            if not 0 <= rank <= site.width:
                raise ValueError(f"{site.name}: expected a rank of 0 to {site.width}, got {rank}")
        self._sites = [site for site, rank in self._ranks.items() if rank]
        self._mode, self._exact = mode, exact
        self._ridges = {"activation": ridge_activation, "gradient": ridge_gradient}
        self._generator = torch.Generator().manual_seed(seed)
        self._random: dict[tuple[int, int, torch.device], Tensor] = {}
        self._moments: dict[str, Moments] = {}
        self._components: dict[str, Tensor] = {}

    def observe(self, tokens: Mapping[str, Tensor]) -> None:
        """Add rows (T, width) of each site named in ``tokens``, of each expert as of a site of its own."""
        for site in self._sites:
            if site.name in tokens:
                for name, rows in site.spread(tokens):
                    accumulate_moments(self._moments_at(name, site, rows), rows)

    def solve(self) -> SiteSubspaces:
        """Turn what was observed into subspaces, and start the next stream empty and warm."""
        # The moments of a site are let go as its basis comes, the narrow ones first: what solves a wide one is most.
        # An expert that nothing led to has nothing to spare.
        solved = {
            one.name: common_subspace(
                self._moments.pop(one.name), self._ranks[site], self._mode, self._ridges[site.kind]
            )
            for site in sorted(self._sites, key=lambda site: site.width)
            for one in apart([site])
            if one.name in self._moments or not site.experts
        }
        self._components = {name: subspace.basis for name, subspace in solved.items()}
        self._random = {}
        return SiteSubspaces(solved, self._mode)

    def _moments_at(self, name: str, site: Site, rows: Tensor) -> Moments:
        if name not in self._moments:
            self._moments[name] = new_moments(site.width, self._omega(name, site, rows.device), rows.device)
        return self._moments[name]

    def _omega(self, name: str, site: Site, device: torch.device) -> Tensor | None:
        shape = (site.width, columns_at(site, self._ranks[site], self._exact))
        if shape[1] == site.width:
            return None
        key = (*shape, device)
        if key not in self._random:  # sites of one shape share the draw, of which each stream has its own
            drawn = torch.randn(shape, generator=self._generator) / site.width**0.5
            self._random[key] = drawn.to(device, torch.bfloat16)
        omega = self._random[key]
        if name in self._components:
            warm = self._components[name]
            omega = torch.cat([warm.to(omega), omega[:, warm.shape[1] :]], dim=1)
        return omega
