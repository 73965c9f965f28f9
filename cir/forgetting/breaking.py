"""The paper's passes over the facts: fit what is common to them, then break what is not, MLP by MLP."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cir.config import BreakingConfig
from cir.data.tokens import Batch
from cir.forgetting.memory import TOKENS_AT_ONCE
from cir.forgetting.objectives import OriginalOutput, hidden_retain, mlp_breaking, original_output
from cir.forgetting.plan import EpochLosses
from cir.forgetting.subspace import SiteSubspaces, SubspaceStream
from cir.forgetting.update import phase, plain_step, selective_step
from cir.model.capture import Capture, Hidden, Tokens
from cir.model.sites import Target, sites_of

logger = logging.getLogger(__name__)


class _Step:
    """Sentences, and what the model said of their counted tokens before any update, by layer."""

    def __init__(self, batch: Batch, original: dict[int, OriginalOutput], skip_first: int) -> None:
        self.batch, self.original, self._skip = batch, original, skip_first
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
            self._parts[sentences] = [
                _Step(
                    batch, {layer: replace(o, rows=rows[layer][i]) for layer, o in self.original.items()}, self._skip
                )
                for i, batch in enumerate(batches)
            ]
        return self._parts[sentences]


class Breaker:
    """The forget and retain steps on one captured model; its weights change in :meth:`epoch` alone.

    Args:
        tape: the capture of the model's layers 0..last loss layer.
        targets: the linears to update.
        loss_layers: layers whose MLP output is broken.
        batches: the facts' sentences. retain: benign text.
        config: see :class:`BreakingConfig`.
        at_once: tokens of a step in one forward and backward; fewer once memory runs out.
    """

    def __init__(
        self,
        tape: Capture,
        targets: Sequence[Target],
        loss_layers: Sequence[int],
        batches: Sequence[Batch],
        retain: Sequence[Batch],
        config: BreakingConfig,
        at_once: int = TOKENS_AT_ONCE,
    ) -> None:
        self._tape, self._targets, self._config = tape, targets, config
        self._loss_layers, self._retain = loss_layers, retain
        self._sites = sites_of(targets)
        self._stream = SubspaceStream(
            self._sites,
            rank_activation=config.rank_activation,
            rank_gradient=config.rank_gradient,
            mode=config.mode,
            exact=config.exact,
            seed=config.seed,
        )
        self._common = SiteSubspaces({}, config.mode)
        self._at_once = at_once
        with phase("record originals"):
            self._steps = [self._recorded(batch, lambda hidden: hidden.mlp_outputs(loss_layers)) for batch in batches]
        self._retain_steps: list[_Step] = []
        self._retained = 0
        self._updates, self._remainders = config.seed << 32, dict[str, Tensor]()

    def fit(self, on_step: Callable[[], object] = lambda: None, stop: threading.Event | None = None) -> None:
        """Record the retain text, and fit bases on the facts; no weight changes. Epochs come after this."""
        last = self._loss_layers[-1]
        for batch in self._retain if self._config.retain_rate else ():
            if stop is not None and stop.is_set():
                return
            with phase("read retain text"):
                self._retain_steps.append(self._recorded(batch, lambda hidden: {last: hidden.real(hidden.last)}))
            on_step()
        for i in range(len(self._steps)):
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
                tokens = self._common.collapse_(tokens, self._sites) if last else self._observed_and_collapsed(tokens)
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
        """The loss (a scalar) of step ``i``, and its rows at every site."""

        def breaking(part: _Step) -> tuple[Tensor, Hidden]:
            hidden = self._tape.forward(part.batch, part.predicting)
            return mlp_breaking(hidden.mlp_outputs(part.original), part.original, part.counted), hidden

        return self._in_parts(self._steps[i], breaking)

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
        of_tokens = self._config.statistics == "tokens"
        self._stream.observe(tokens if of_tokens else weight_gradient_rows(self._targets, tokens))

    def _observed_and_collapsed(self, tokens: Tokens) -> Tokens:
        if self._config.statistics == "tokens":
            self._stream.observe(tokens)
            return self._common.collapse_(tokens, self._sites)
        self._observe(tokens)
        return self._common.collapse_(tokens, self._sites)

    def _solve(self) -> None:
        if self._steps:
            with phase("solve"):
                self._common = self._stream.solve()

    @torch.no_grad()
    def _recorded(self, batch: Batch, outputs: Callable[[Hidden], dict[int, Tensor]]) -> _Step:
        """``batch`` beside the ``outputs`` of its forward."""
        mask = batch.counted(self._config.skip_first)
        hidden = self._tape.forward(batch, mask, observe=lambda tokens: None)
        originals = {layer: original_output(output, mask) for layer, output in outputs(hidden).items()}
        return _Step(batch, originals, self._config.skip_first)


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


def _mean(losses: Sequence[Tensor]) -> float | None:
    return float(torch.stack(list(losses)).mean()) if losses else None
