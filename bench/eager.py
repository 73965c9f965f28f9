"""Ours and the paper's steps in eager PyTorch: the baselines of the benchmarks and the oracles of the tests.

:class:`EagerCIR` is CIR as its authors run it, written from the description of the algorithm
(arXiv 2509.11816): trimmed layers, but LM head and logits computed; weight gradients computed by autograd and then
again from collapsed tokens; components projected out one after the other; every token kept in a list; one low-rank
PCA for each linear and epoch. :class:`EagerForgetter` is the default method.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cir.config import BreakingConfig, CIRConfig
from cir.data.tokens import Batch, pad
from cir.forgetting.forgetter import LEAST_DOSE, LEAST_FALL
from cir.forgetting.subspace import SiteSubspaces
from cir.model.sites import MLP, Stack, Target

Basis = tuple[Tensor, Tensor]
"""Mean (D,) and components (D, k - 1)."""


def pca(rows: Tensor, rank: int) -> Basis:
    """Mean and rank - 1 leading components of ``rows`` (T, D), as the authors compute them."""
    rows = rows.float()  # there is no QR decomposition in half precision
    return rows.mean(0), torch.pca_lowrank(rows, q=rank - 1, niter=16)[2]


def exact_pca(rows: Tensor, rank: int) -> Basis:
    """The same from a float64 SVD of the centred rows."""
    rows = rows.double()
    return rows.mean(0), torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][: rank - 1].T


def project_out(rows: Tensor, basis: Basis) -> Tensor:
    """Rows without the unit mean and then, one after the other, without each component."""
    mean, components = basis
    for direction in (mean / mean.norm(), *components.T):
        direction = direction.to(rows)
        rows = rows - (rows @ direction)[:, None] * direction
    return rows


def padded(batch: Batch, mask: Tensor) -> Tensor:
    """``mask`` (N,) over the real tokens of ``batch`` as (B, L), False at its padding."""
    return batch.attention_mask.masked_scatter(batch.attention_mask, mask)


class EagerCIR:
    """The forget steps of one model. Of ``config`` the ranks, the rate and ``skip_first`` are read. ``solve`` is
    :func:`pca` or :func:`exact_pca`. ``trims``: run no layer above the loss layers, as the authors' code does not
    either.
    """

    def __init__(
        self,
        model: Any,
        stack: Stack,
        loss_layers: Sequence[int],
        config: BreakingConfig,
        solve: Callable[[Tensor, int], Basis] = pca,
        trims: bool = True,
    ) -> None:
        self.trims = trims
        self.model, self.stack, self.loss_layers = model, stack, list(loss_layers)
        self.ranks = int(config.rank_activation), int(config.rank_gradient)
        self.rate, self.skip_first, self.solve = config.rate, config.skip_first, solve
        self.mlps: tuple[MLP, ...] = stack.mlps[: self.loss_layers[-1] + 1]
        self.linears = [target.linear for mlp in self.mlps for target in mlp.targets]
        self.bases: dict[nn.Linear, tuple[Basis, Basis]] = {}
        self.retain: list[tuple[Batch, Tensor]] = []
        self.retained = 0
        self.originals: list[tuple[list[Tensor], list[float]]] = []

    def record(self, batches: Sequence[Batch]) -> None:
        """The original MLP outputs of the loss layers, and their mean norms, for each batch."""
        with self._trimmed(), torch.no_grad():
            for batch in batches:
                counted = padded(batch, batch.counted(self.skip_first))
                outputs = [out[counted] for out in self._forward(batch)[0]]
                self.originals.append((outputs, [float(out.norm(dim=1).mean()) for out in outputs]))

    def record_retain(self, batches: Sequence[Batch]) -> None:
        """The original hidden states at the last layer of benign text."""
        with self._trimmed(), torch.no_grad():
            self.retain = [(batch, self._last_hidden(batch)) for batch in batches]

    def retain_step(self, rate: float) -> None:
        """Plain SGD on the distance of the hidden states to the original ones, of the next batch in turn."""
        batch, original = self.retain[self.retained % len(self.retain)]
        self.retained += 1
        with self._trimmed():
            distance = (self._last_hidden(batch).float() - original.float()).norm(dim=-1).mean()
            (distance / original.float().norm(dim=-1).mean()).backward()
        with torch.no_grad():
            for linear in self.linears:
                linear.weight -= rate * linear.weight.grad  # type: ignore[operator]
        self.model.zero_grad(set_to_none=True)

    def epoch(self, batches: Sequence[Batch], retain_rate: float = 0.0) -> None:
        """One epoch: steps where bases are there already, and the bases of the next.

        With ``retain_rate``, a retain step follows each forget step.
        """
        inputs: dict[nn.Linear, list[Tensor]] = defaultdict(list)
        grads: dict[nn.Linear, list[Tensor]] = defaultdict(list)
        with self._trimmed():
            for batch, original in zip(batches, self.originals, strict=True):
                taken = self._backward(batch, original)
                for linear, (a, g) in taken.items():
                    inputs[linear].append(a.cpu())
                    grads[linear].append(g.cpu())
                if self.bases:
                    self._step(taken)
                self.model.zero_grad(set_to_none=True)
                if self.bases and retain_rate:
                    self.retain_step(retain_rate)
        for linear in self.linears:
            self.bases[linear] = (
                self.solve(torch.cat(inputs[linear]).to(linear.weight.device), self.ranks[0]),
                self.solve(torch.cat(grads[linear]).to(linear.weight.device), self.ranks[1]),
            )

    def _step(self, taken: dict[nn.Linear, tuple[Tensor, Tensor]]) -> None:
        for linear, (a, g) in taken.items():
            of_input, of_grad = self.bases[linear]
            linear.weight.grad = project_out(g, of_grad).T @ project_out(a, of_input)
        norm = torch.stack([linear.weight.grad.norm() for linear in self.linears]).norm()  # type: ignore[union-attr]
        with torch.no_grad():
            for linear in self.linears:
                linear.weight -= self.rate / norm * linear.weight.grad  # type: ignore[operator]

    def _backward(
        self, batch: Batch, original: tuple[list[Tensor], list[float]]
    ) -> dict[nn.Linear, tuple[Tensor, Tensor]]:
        outputs, taps = self._forward(batch)
        counted = padded(batch, batch.counted(self.skip_first))
        predicting = padded(batch, batch.predicting(self.skip_first))
        losses = [
            (out[counted] * before).sum(1).clamp_min(0).mean() / norm**2
            for out, before, norm in zip(outputs, *original, strict=True)
        ]
        torch.stack(losses).mean().backward()
        return {
            linear: (a.detach()[predicting], y.grad[predicting])  # type: ignore[index]
            for linear, (a, y) in taps.items()
        }

    def _forward(self, batch: Batch) -> tuple[list[Tensor], dict[nn.Linear, tuple[Tensor, Tensor]]]:
        """MLP outputs of the loss layers, and each linear's input and (gradient-retaining) output."""
        taps: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
        outputs: list[Tensor] = []

        def tap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
            taps[module] = (args[0], output)  # type: ignore[index]

        hooks = [linear.register_forward_hook(tap) for linear in self.linears]
        hooks += [
            self.mlps[layer].down.linear.register_forward_hook(lambda module, args, out: outputs.append(out))
            for layer in self.loss_layers
        ]
        try:
            self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs, taps

    def _last_hidden(self, batch: Batch) -> Tensor:
        """Hidden states (T, D) of the counted tokens after the last layer run."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hook = self.stack.layers[len(self.mlps) - 1].register_forward_hook(keep)
        try:
            self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            hook.remove()
        return found[0][padded(batch, batch.counted(self.skip_first))]

    @contextmanager
    def _trimmed(self) -> Iterator[None]:
        layers = self.stack.layers
        if self.trims:
            setattr(self.stack.decoder, self.stack.attribute, layers[: len(self.mlps)])
        try:
            yield
        finally:
            setattr(self.stack.decoder, self.stack.attribute, layers)


Taps = dict[nn.Linear, tuple[Tensor, Tensor]]
"""Input and output of each linear."""


class EagerForgetter:
    """Steps of the default method in the plain way: each fact's sentences in a forward of their own, padded, through
    all layers and the whole vocabulary, and a weight gradient for each fact, collapsed from both sides.

    Args:
        written, relearned: linears. told: of each fact its sentences' ids, and the places in them that tell it.
        common: what is collapsed. lengths: of a step of relearning, for each of the ``relearned``.
    """

    def __init__(
        self,
        model: Any,
        written: Sequence[Target],
        relearned: Sequence[Target],
        told: Sequence[Sequence[tuple[list[int], Sequence[int]]]],
        common: SiteSubspaces,
        config: CIRConfig,
        lengths: Sequence[float],
    ) -> None:
        self.model, self.config, self.told, self.lengths = model, config, told, lengths
        self.written, self.relearned = ([target.linear for target in of] for of in (written, relearned))
        self.bases = [
            tuple(common[site.name].basis.to(target.weight.dtype) for site in (target.gradient, target.activation))
            for target in written
        ]
        norms = [linear.weight.detach().norm() for linear in self.written]
        self.longest = config.max_change * float(torch.stack(norms).norm())

    def odds(self, fact: int) -> tuple[Tensor, Taps]:
        """(T,) log-odds of the answers of one fact, and what they come from."""
        taps: Taps = {}

        def tap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            taps[module] = args[0], output if output.requires_grad else output.requires_grad_(True)  # type: ignore[index]

        batch = pad([ids for ids, _ in self.told[fact]])
        hooks = [linear.register_forward_hook(tap) for linear in {*self.written, *self.relearned}]
        try:
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        finally:
            for hook in hooks:
                hook.remove()
        found = []
        for row, place in zip(*self._places(fact), strict=True):
            answer, of = self.told[fact][row][0][place + 1], logits[row, place]
            found.append(of[answer] - torch.cat([of[:answer], of[answer + 1 :]]).logsumexp(0))
        return torch.stack(found), taps

    def step(self, before: Sequence[Tensor], halves: Sequence[Sequence[int]]) -> None:
        """One, in place. ``before``: log-odds of each fact before the first. ``halves``: facts, asked after the
        other half was relearned.
        """
        config, everyone = self.config, range(len(self.told))
        first = {tuple(half): self._gradient(half) for half in halves}
        back: dict[int, Tensor] = {}
        grads: dict[int, list[Tensor]] = {}
        kept = [linear.weight.detach().clone() for linear in self.relearned]
        for asked, taught in (halves, halves[::-1]):
            for lesson in range(config.relearning_steps):
                total = self._gradient(taught) if lesson else first[tuple(taught)]
                for linear, length, grad in zip(self.relearned, self.lengths, total, strict=True):
                    linear.weight.data += length * grad.sign()
            for fact in asked:
                then, taps = self.odds(fact)
                back[fact] = then.detach()
                returns = (then * (back[fact] > config.relearning_floor)).sum()
                grads[fact] = self._of(fact, returns, taps, self.written)
            for linear, original in zip(self.relearned, kept, strict=True):
                linear.weight.data.copy_(original)
        total = [torch.zeros_like(linear.weight) for linear in self.written]
        for fact in everyone:
            for own, update in zip(total, self._update(fact, before[fact], back[fact], grads.pop(fact)), strict=True):
                own.data += update
        for linear, update in zip(self.written, total, strict=True):
            linear.weight.data += update

    def _update(self, fact: int, before: Tensor, back: Tensor, grads: list[Tensor]) -> list[Tensor]:
        """What takes one fact its dose further down."""
        config, returns = self.config, back > self.config.relearning_floor
        now, taps = self.odds(fact)
        left = now.detach() - (before - LEAST_FALL).clamp_max(config.floor)
        alone = (left > 0) & ~returns
        own = self._of(fact, (now * alone).sum(), taps, self.written)
        grads = [a + b for a, b in zip(grads, own, strict=True)]
        collapsed = []
        for grad, (g, a) in zip(grads, self.bases, strict=True):
            grad = grad - g @ (g.T @ grad)
            collapsed.append(grad - (grad @ a) @ a.T)
        effect = sum(float((a * b).sum()) for a, b in zip(grads, collapsed, strict=True))
        squared = sum(float(a.square().sum()) for a in collapsed)
        left = torch.where(returns, left.maximum(back - config.relearning_floor), left)[returns | (left > 0)]
        dose = float(left.clamp(min(LEAST_DOSE, config.dose), config.dose).sum())
        scale = min(dose / effect, self.longest / squared**0.5) if effect > 0 and squared > 0 else 0.0
        return [-scale * grad for grad in collapsed]

    def _gradient(self, facts: Sequence[int]) -> list[Tensor]:
        """That of all that are ``facts``, one after the other."""
        total = [torch.zeros_like(linear.weight) for linear in self.relearned]
        for fact in facts:
            odds, taps = self.odds(fact)
            for own, grad in zip(total, self._of(fact, odds.sum(), taps, self.relearned), strict=True):
                own.data += grad
        return total

    def _of(self, fact: int, loss: Tensor, taps: Taps, linears: Sequence[nn.Linear]) -> list[Tensor]:
        """Weight gradients, of the tokens where the answers are predicted."""
        at = self._places(fact)
        found = torch.autograd.grad(loss, [taps[linear][1] for linear in linears])
        return [g[at].T @ taps[linear][0].detach()[at] for g, linear in zip(found, linears, strict=True)]

    def _places(self, fact: int) -> tuple[list[int], list[int]]:
        """Row and place of each token that predicts an answer's."""
        pairs = [(row, place - 1) for row, (_, places) in enumerate(self.told[fact]) for place in places]
        return [row for row, _ in pairs], [place for _, place in pairs]
