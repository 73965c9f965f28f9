"""Passes over the facts: fit what is common, then step along what is not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cir.config import CIRConfig
from cir.data.tokens import Batch
from cir.forgetting.memory import TOKENS_AT_ONCE
from cir.forgetting.objectives import (
    OriginalOutput,
    hidden_retain,
    mlp_breaking,
    mlp_growth,
    original_output,
    row_norms,
)
from cir.forgetting.subspace import SiteSubspaces, SubspaceStream
from cir.forgetting.update import phase, plain_step, selective_step
from cir.model.capture import Capture, Hidden, Tokens
from cir.model.sites import Target, sites_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochLosses:
    """Means over the steps of an epoch; ``retain`` is None where no retain step was taken."""

    breaking: float
    retain: float | None


class _Step:
    """Sentences, and what the model said of their counted tokens before any update: by layer, and, where
    growth counts, its ``norms`` (T,) in every layer.
    """

    def __init__(
        self, batch: Batch, original: dict[int, OriginalOutput], norms: dict[int, Tensor], skip_first: int
    ) -> None:
        self.batch, self.original, self.norms, self._skip = batch, original, norms, skip_first
        # As places, found once: a mask would make the host wait for the device wherever it is used.
        self.counted, self.predicting = (
            mask.nonzero().squeeze(1) for mask in (batch.counted(skip_first), batch.predicting(skip_first))
        )
        self._parts: dict[int, list[_Step]] = {}

    def parts(self, tokens: int) -> list[_Step]:
        """The same in pieces of at most so many tokens, padding included, or of one sentence."""
        sentences = max(1, tokens // self.batch.input_ids.shape[1])
        if sentences >= len(self.batch.input_ids):
            return [self]
        if sentences not in self._parts:
            batches = self.batch.split(sentences)
            counts = [int(batch.counted(self._skip).sum()) for batch in batches]
            rows = {layer: original.rows.split(counts) for layer, original in self.original.items()}
            norms = {layer: norm.split(counts) for layer, norm in self.norms.items()}
            self._parts[sentences] = [
                _Step(
                    batch,
                    {layer: replace(o, rows=rows[layer][i]) for layer, o in self.original.items()},
                    {layer: norm[i] for layer, norm in norms.items()},
                    self._skip,
                )
                for i, batch in enumerate(batches)
            ]
        return self._parts[sentences]


class Forgetter:
    """The forget and retain steps on one captured model; its weights change in :meth:`epoch` alone.

    Args:
        tape: the capture of the model's layers 0..last loss layer.
        targets: the linears to update.
        loss_layers: layers whose MLP output is broken.
        batches: the facts' sentences. retain: benign text.
        config: see :class:`CIRConfig`.
        subspaces: collapse against these throughout; None to fit them, first in :meth:`fit` and then again
            in every epoch, for the next.
        known: with None above, collapse these first: bases are fitted on what they leave.
        at_once: tokens of a step in one forward and backward; fewer once memory runs out.
    """

    def __init__(
        self,
        tape: Capture,
        targets: Sequence[Target],
        loss_layers: Sequence[int],
        batches: Sequence[Batch],
        retain: Sequence[Batch],
        config: CIRConfig,
        subspaces: SiteSubspaces | None = None,
        known: SiteSubspaces | None = None,
        at_once: int = TOKENS_AT_ONCE,
    ) -> None:
        self._tape, self._targets, self._config = tape, targets, config
        self._loss_layers, self._retain = loss_layers, retain
        self._background = known or SiteSubspaces({}, "orthogonal")
        self._stream = _stream(targets, config) if subspaces is None else None
        # What is collapsed after the background, which the tokens of every batch lose first.
        self._common = SiteSubspaces({}, config.mode) if subspaces is None else subspaces
        self._at_once = at_once
        with phase("record originals"):
            self._steps = [self._recorded(batch) for batch in batches]
        self._retain_steps: list[_Step] = []
        self._retained = 0
        self._updates, self._remainders = config.seed << 32, dict[str, Tensor]()

    @property
    def subspaces(self) -> SiteSubspaces:
        """All that a forget step collapses, as one."""
        return self._background.then(self._common)

    def fit(self, on_step: Callable[[], object] = lambda: None, stop: threading.Event | None = None) -> None:
        """Record the retain text, and fit bases on it and on the facts; no weight changes. Epochs come after this."""
        with phase("read retain text"):
            self._background = self._background.then(self._read_retain(on_step, stop))
        for i in range(len(self._steps) if self._stream is not None else 0):
            if stop is not None and stop.is_set():
                return
            self._observe(self.forget_tokens(i)[1])
            on_step()
        self._solve()

    def epoch(
        self,
        rate: float,
        on_step: Callable[[], object] = lambda: None,
        stop: threading.Event | None = None,
        last: bool = False,
    ) -> EpochLosses:
        """One forget step for each batch, each followed by a retain step where ``retain_rate`` says so.

        Set ``stop`` to end after the step under way. The ``last`` epoch fits no bases for another.

        Raises:
            NonFiniteError: before the step that met a NaN or infinity changes any weight.
        """
        breaking, retain = [], []
        for i in range(len(self._steps)):
            if stop is not None and stop.is_set():
                break
            loss, tokens = self.forget_tokens(i)
            with phase("collapse, moments"):
                tokens = self._common.collapse_(tokens) if last else self._observed_and_collapsed(tokens)
            selective_step(self._targets, tokens, rate, *self._rounding(), loss=loss)
            del tokens  # most of what a step holds; it is not to be held in the next forward
            breaking.append(loss)
            if self._retain_steps:
                with phase("retain"):
                    retain.append(self._retain_step())
            on_step()
        else:
            if not last:
                self._solve()
        return EpochLosses(_mean(breaking) or 0.0, _mean(retain))

    def forget_tokens(self, i: int) -> tuple[Tensor, Tokens]:
        """The loss (a scalar) of step ``i``, and its rows at every site, the background collapsed."""

        def breaking(part: _Step) -> tuple[Tensor, Hidden]:
            hidden = self._tape.forward(part.batch, part.predicting)
            outputs = hidden.mlp_outputs({*part.original, *part.norms})
            loss = mlp_breaking(outputs, part.original, part.counted)
            if part.norms:
                growth = mlp_growth(outputs, part.norms, part.counted)
                loss = loss + self._config.growth_weight * growth.to(loss.device)
            return loss, hidden

        loss, tokens = self._in_parts(self._steps[i], breaking)
        with phase("collapse, background"):
            return loss, self._background.collapse_(tokens)

    def _retain_step(self) -> Tensor:
        def distance(part: _Step) -> tuple[Tensor, Hidden]:
            hidden = self._tape.forward(part.batch, part.counted)
            (original,) = part.original.values()
            return hidden_retain(hidden.real(hidden.last), original, part.counted), hidden

        loss, tokens = self._in_parts(self._retain_steps[self._retained % len(self._retain_steps)], distance)
        self._retained += 1
        plain_step(self._targets, tokens, self._config.retain_rate, *self._rounding(), loss=loss)
        return loss

    def _rounding(self) -> tuple[str, int, dict[str, Tensor]]:
        """How the next update is to be rounded, each with a seed of its own."""
        self._updates += 1
        return self._config.rounding, self._updates, self._remainders

    def _in_parts(self, step: _Step, run: Callable[[_Step], tuple[Tensor, Hidden]]) -> tuple[Tensor, Tokens]:
        """Loss and rows of a step, from as many tokens at once as memory takes: those of all of them together."""
        while True:
            parts = step.parts(self._at_once)
            try:
                passes = [self._pass(part, run, len(part.counted) / len(step.counted)) for part in parts]
                losses, rows = zip(*passes, strict=True)
                return torch.stack(losses).sum(), _joined(rows)
            except torch.OutOfMemoryError:
                sentences, width = max(part.batch.input_ids.shape for part in parts)
                if sentences == 1:
                    raise
            # Out of the handler, whose exception held what the pass had on the device.
            self._at_once = sentences // 2 * width
            logger.warning("out of memory: going on with %d tokens at once", self._at_once)

    def _pass(
        self, part: _Step, run: Callable[[_Step], tuple[Tensor, Hidden]], share: float
    ) -> tuple[Tensor, Tokens]:
        with phase("forward"):
            loss, hidden = run(part)
        with phase("backward"):
            tokens = self._tape.backward(loss * share, hidden)
        return loss.detach() * share, tokens

    def _observe(self, tokens: Tokens) -> None:
        if self._stream is not None:
            of_tokens = self._config.statistics == "tokens"
            self._stream.observe(tokens if of_tokens else weight_gradient_rows(self._targets, tokens))

    def _observed_and_collapsed(self, tokens: Tokens) -> Tokens:
        if self._stream is not None and self._config.statistics == "tokens":
            return self._stream.observe_and_collapse_(tokens, self._common)
        self._observe(tokens)
        return self._common.collapse_(tokens)

    def _solve(self) -> None:
        if self._stream is not None and self._steps:
            with phase("solve"):
                self._common = self._stream.solve()

    @torch.no_grad()
    def _recorded(self, batch: Batch) -> _Step:
        mask = batch.counted(self._config.skip_first)
        hidden = self._tape.forward(batch, mask, observe=lambda tokens: None)
        broken = hidden.mlp_outputs(self._loss_layers)
        held = hidden.mlp_outputs(hidden.outputs) if self._config.growth_weight else {}
        norms = {layer: row_norms(output, mask) for layer, output in held.items()}
        originals = {layer: original_output(output, mask) for layer, output in broken.items()}
        return _Step(batch, originals, norms, self._config.skip_first)

    @torch.no_grad()
    def _read_retain(self, on_step: Callable[[], object], stop: threading.Event | None) -> SiteSubspaces:
        """What the text uses of the activations; for retain steps, its hidden states, from the same forwards."""
        config = self._config
        rank = 0 if self._stream is None else config.rank_background
        sites = [site for site in sites_of(self._targets) if site.kind == "activation"]
        stream = SubspaceStream(sites, rank_activation=rank, rank_gradient=0, seed=config.seed)

        def observe(tokens: Tokens) -> None:
            stream.observe(self._background.collapse_(tokens))

        for batch in self._retain if rank or config.retain_rate else ():
            if stop is not None and stop.is_set():
                return SiteSubspaces({}, "orthogonal")
            # First tokens too: attention sinks are what a change of the weights must not touch.
            hidden = self._tape.forward(batch, batch.counted(0), observe)
            if config.retain_rate:
                mask = batch.counted(config.skip_first)
                kept = {self._loss_layers[-1]: original_output(hidden.real(hidden.last), mask)}
                self._retain_steps.append(_Step(batch, kept, {}, config.skip_first))
            del hidden  # nor is it to be held in the next forward
            on_step()
        return stream.solve()


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """The rows of all parts, which lose them: both at once would be the most that a step holds."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([rows.pop(name) for rows in parts]) for name in list(parts[0])}


def weight_gradient_rows(targets: Sequence[Target], tokens: Tokens) -> Tokens:
    """Rows (T, width) with the second moments of the weight gradients dW = G^T A: of their rows, at the activation
    sites, and of their columns, at the gradient sites.

    dW^T dW = A^T (G G^T) A = R^T R for R = (G G^T)^(1/2) A, with roots of T x T: no dW is formed. Linears that read
    one site add up.
    """
    grams: dict[str, Tensor] = {}
    for target in targets:
        a, g = (tokens[site.name].double() for site in (target.activation, target.gradient))
        grams[target.activation.name] = grams.get(target.activation.name, 0) + g @ g.T
        grams[target.gradient.name] = a @ a.T
    return {name: (_root(gram) @ tokens[name].double()).float() for name, gram in grams.items()}


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _stream(targets: Sequence[Target], config: CIRConfig) -> SubspaceStream:
    return SubspaceStream(
        sites_of(targets),
        rank_activation=config.rank_activation,
        rank_gradient=config.rank_gradient,
        mode=config.mode,
        exact=config.exact,
        seed=config.seed,
    )


def _mean(losses: Sequence[Tensor]) -> float | None:
    return float(torch.stack(list(losses)).mean()) if losses else None
