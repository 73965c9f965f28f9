"""Unlearning methods of other papers, with which that of this library is compared.

Each steps with AdamW (constant rate, no weight decay) on one forget and one retain batch, in eval mode, its loss in
float32. What it needs of the original model is recorded on the host before the first step: there is no second model.
Where a paper weighs its retain loss freely, the weight is 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cir.data.tokens import Batch
from cir.forgetting.update import NonFiniteError
from cir.model.capture import frozen
from cir.model.finding import find_stack
from cir.model.sites import Stack

SKIP_FIRST = 1
"""Tokens of a sentence whose hidden states are not to be forgotten: the first is an attention sink that all text
shares, and its norm (9 times the others' in SmolLM2-135M, layer 7) would be most of a squared distance."""


def sentence_nll(logits: Tensor, batch: Batch) -> Tensor:
    """-log p(y) in nats of each row of ``batch`` after its first token: (B,), from ``logits`` (B, L, V)."""
    targets = batch.input_ids[:, 1:].masked_fill(~batch.attention_mask[:, 1:], -100)
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).sum(1)


def predicted(batch: Batch) -> Tensor:
    """|y|: the tokens (B,) of each row that :func:`sentence_nll` sums over."""
    return batch.attention_mask[:, 1:].sum(1)


def npo_loss(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """-2/beta * mean log sigmoid(-beta log(p(y) / p_ref(y))) over rows, from -log p and -log p_ref (B,)."""
    return -2 / beta * F.logsigmoid(beta * (nll - reference)).mean()


def simnpo_loss(nll: Tensor, lengths: Tensor, beta: float, gamma: float) -> Tensor:
    """-2/beta * mean log sigmoid(-beta/|y| log p(y) - gamma) over rows, from -log p and |y| (B,)."""
    return -2 / beta * F.logsigmoid(beta * nll / lengths - gamma).mean()


def rmu_loss(forget: Tensor, target: Tensor, retain: Tensor, original: Tensor, alpha: float) -> Tensor:
    """mean_t ||h_t - c u||^2 / D + alpha * mean_t ||h_t - h_t^orig||^2 / D over forget and retain tokens (..., T, D).

    The division by the width D is that of the authors' code; the paper has it in neither term.
    """
    return (forget - target).square().mean() + alpha * (retain - original).square().mean()


def rerouting_loss(hidden: Tensor, original: Tensor) -> Tensor:
    """mean ReLU(cos(h, h^orig)) over layers and tokens (..., D)."""
    return F.cosine_similarity(hidden, original, dim=-1).relu().mean()


def distance(hidden: Tensor, original: Tensor) -> Tensor:
    """mean ||h - h^orig|| over layers and tokens (..., D)."""
    return (hidden - original).norm(dim=-1).mean()


class Baseline(ABC):
    """The steps of one run on ``model``; a context manager, or close it.

    Args:
        model: a causal LM of transformers, changed in place.
        forget: sentences, padded on the right. retain: text, of which each step takes the next batch, in turn.
        rate: AdamW's. epochs: how many there will be, for what is scheduled over the run.
        seed: of whatever is random, which leaves the global generators alone.

    Attributes:
        trained: the weights of the model that change. They are those of the last step when :meth:`epoch` returns.
        rates: a grid for a model of 135M parameters, some ten steps an epoch and a small budget.

    Raises:
        ValueError: without a batch to forget or to retain, or on a model whose decoder is not found.
    """

    rates: ClassVar[tuple[float, ...]] = (3e-6, 1e-5, 3e-5, 1e-4)
    trained: list[nn.Parameter]

    def __init__(
        self, model: Any, forget: Sequence[Batch], retain: Sequence[Batch], *, rate: float, epochs: int, seed: int
    ) -> None:
        if not forget or not retain:
            raise ValueError(f"expected forget and retain batches, got {len(forget)} and {len(retain)}")
        self.model = model
        self.forget = [batch.to(model.device) for batch in forget]
        self.retain = [batch.to(model.device) for batch in retain]
        self.generator = torch.Generator().manual_seed(seed)
        self.rate, self.step, self.steps = rate, 0, epochs * len(forget)
        with ExitStack() as undo:
            undo.enter_context(frozen(model))
            with torch.no_grad():
                parameters = self.prepare()
            for parameter in parameters:
                parameter.requires_grad_(True)
            self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
            self._undo = undo.pop_all()

    @abstractmethod
    def prepare(self) -> list[nn.Parameter]:
        """Set ``trained``, record what the loss compares with, and return what the optimizer is to change."""

    @abstractmethod
    def loss(self, forget: int, retain: int) -> Tensor:
        """The loss of a step on the forget and the retain batch of these numbers."""

    def epoch(self) -> float:
        """One step for each forget batch; their mean loss.

        Raises:
            NonFiniteError: on a NaN or infinite loss; the weights are those of the step before.
        """
        losses = []
        for forget in range(len(self.forget)):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(forget, self.step % len(self.retain))
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise NonFiniteError(f"expected a finite loss, got {losses[-1]}; this step changed no weight")
            loss.backward()
            self.optimizer.step()
            self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return sum(losses) / len(losses)

    def close(self) -> None:
        """Put ``requires_grad``, gradients and train modes back; the weights stay."""
        self._undo.close()

    def __enter__(self) -> Baseline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Likelihood(Baseline):
    """A forget loss of the sentences' likelihoods + the mean NLL of the retain tokens; all weights are trained."""

    def prepare(self) -> list[nn.Parameter]:
        self.trained = list(self.model.parameters())
        return self.trained

    def loss(self, forget: int, retain: int) -> Tensor:
        kept = self.retain[retain]
        return self.forget_loss(forget) + self.nll(kept).sum() / predicted(kept).sum()

    @abstractmethod
    def forget_loss(self, number: int) -> Tensor:
        """The forget loss of the batch of this number."""

    def nll(self, batch: Batch) -> Tensor:
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return sentence_nll(logits, batch)


class GradDiff(Likelihood):
    """Gradient difference: L = -NLL(forget) + NLL(retain), each the mean over tokens.

    Liu et al., "Continual Learning and Private Unlearning", arXiv 2203.12817; on language models TOFU, arXiv
    2401.06121.
    """

    def forget_loss(self, number: int) -> Tensor:
        batch = self.forget[number]
        return -self.nll(batch).sum() / predicted(batch).sum()


class NPO(Likelihood):
    """Negative preference optimization with a retain term (NPO-RT), beta = 0.1: :func:`npo_loss` + NLL(retain).

    Zhang et al., arXiv 2404.05868.
    """

    beta: ClassVar[float] = 0.1

    def prepare(self) -> list[nn.Parameter]:
        self.reference = [self.nll(batch).cpu() for batch in self.forget]
        return super().prepare()

    def forget_loss(self, number: int) -> Tensor:
        nll = self.nll(self.forget[number])
        return npo_loss(nll, self.reference[number].to(nll.device), self.beta)


class SimNPO(Likelihood):
    """NPO without a reference, normalised by length; beta = 2.5, gamma = 0: :func:`simnpo_loss` + NLL(retain).

    Fan et al., arXiv 2410.07163.
    """

    beta: ClassVar[float] = 2.5
    gamma: ClassVar[float] = 0.0

    def forget_loss(self, number: int) -> Tensor:
        batch = self.forget[number]
        return simnpo_loss(self.nll(batch), predicted(batch), self.beta, self.gamma)


class Representation(Baseline):
    """A loss of the hidden states after ``layers``; those above are not run, nor is the LM head."""

    rates = (1e-4, 3e-4, 1e-3, 3e-3)
    stack: Stack
    layers: list[int]

    def at_depth(self, *shares: float) -> list[int]:
        """The layers at these shares of the depth, which the papers give for models of 32 layers."""
        return [round(share * len(self.stack.layers)) for share in shares]

    def states(self, batch: Batch, skip_first: int = 0) -> Tensor:
        """Hidden states (layers, T, D) in float32 of the real tokens but the first ``skip_first`` of each row."""
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            return lambda module, args, out: found.update({layer: out[0] if isinstance(out, tuple) else out})

        decoder, attribute, layers = self.stack.decoder, self.stack.attribute, self.stack.layers
        with ExitStack() as undo:
            undo.callback(setattr, decoder, attribute, layers)
            setattr(decoder, attribute, layers[: max(self.layers) + 1])
            for layer in self.layers:
                undo.callback(layers[layer].register_forward_hook(keep(layer)).remove)
            decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        counted = batch.counted(skip_first)
        return torch.stack([found[layer][batch.attention_mask][counted].float() for layer in self.layers])


class RMU(Representation):
    """Representation misdirection: the forget tokens' hidden states h at layer l go to c u, the retain tokens' stay.

    :func:`rmu_loss` with alpha = 1200, l at 7/32 of the depth; down_proj of layers l-2..l is trained; u has
    entries uniform in [0, 1) and is scaled to norm 1. Li et al., WMDP, arXiv 2403.03218.

    The paper's c (6.5 on Zephyr-7B) has the unit of h, which other models have on other scales. Here c is 5 times
    the mean norm of the forget tokens' h, the multiple of Adaptive RMU (arXiv 2408.06223): a norm that the layers
    above cannot process is what makes RMU forget.
    """

    alpha: ClassVar[float] = 1200.0
    multiple: ClassVar[float] = 5.0

    def prepare(self) -> list[nn.Parameter]:
        self.stack = find_stack(self.model)
        self.layers = self.at_depth(7 / 32)
        (layer,) = self.layers
        self.trained = [mlp.down.weight for mlp in self.stack.mlps[max(0, layer - 2) : layer + 1]]
        self.original = [self.states(batch).cpu() for batch in self.retain]
        norms = torch.cat([self.states(batch, SKIP_FIRST).norm(dim=-1) for batch in self.forget], dim=1)
        u = torch.rand(self.original[0].shape[-1], generator=self.generator)
        self.target = (self.multiple * norms.mean()) * (u / u.norm()).to(norms.device)
        return self.trained

    def loss(self, forget: int, retain: int) -> Tensor:
        now, kept = self.states(self.forget[forget], SKIP_FIRST), self.states(self.retain[retain])
        return rmu_loss(now, self.target, kept, self.original[retain].to(kept.device), self.alpha)


class CircuitBreakers(Representation):
    """Representation rerouting: L = c_s * :func:`rerouting_loss`(forget) + c_r * :func:`distance`(retain).

    c_s = alpha (1 - t/2T) and c_r = alpha t/2T at step t of T, alpha = 10; hidden states at 10/32 and 20/32 of the
    depth; LoRA W + B A of rank 16 and scale 1 (without its dropout) on all linears up to there. Zou et al., arXiv
    2406.04313.

    Between epochs ``trained`` holds W + B A; within one, W as recorded.
    """

    alpha: ClassVar[float] = 10.0
    rank: ClassVar[int] = 16

    def prepare(self) -> list[nn.Parameter]:
        self.stack = find_stack(self.model)
        self.layers = self.at_depth(10 / 32, 20 / 32)
        self.original_forget = [self.states(batch, SKIP_FIRST).cpu() for batch in self.forget]
        self.original_retain = [self.states(batch).cpu() for batch in self.retain]
        modules = self.stack.layers[: self.layers[-1] + 1].modules()
        self.linears = [module for module in modules if isinstance(module, nn.Linear)]
        self.trained = [linear.weight for linear in self.linears]
        self.base = [weight.detach().to("cpu", copy=True) for weight in self.trained]
        self.factors = [self._factors(weight) for weight in self.trained]
        return [factor for pair in self.factors for factor in pair]

    def _factors(self, weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        """A (rank, D_in) within +-1/sqrt(D_in) and B (D_out, rank) within +-rate, uniform.

        LoRA starts at B = 0. But there the cosine is at its maximum, its gradient rounding error, and the first step
        that AdamW makes of it is a random one, of size rate: here the seed decides it, not the machine.
        """
        d_out, d_in = weight.shape
        a = torch.empty(self.rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5, generator=self.generator)
        b = torch.empty(d_out, self.rank).uniform_(-self.rate, self.rate, generator=self.generator)
        return nn.Parameter(a.to(weight.device)), nn.Parameter(b.to(weight.device))

    def loss(self, forget: int, retain: int) -> Tensor:
        now, kept = self.states(self.forget[forget], SKIP_FIRST), self.states(self.retain[retain])
        rerouted = rerouting_loss(now, self.original_forget[forget].to(now.device))
        moved = distance(kept, self.original_retain[retain].to(kept.device))
        progress = self.step / (2 * self.steps)
        return self.alpha * ((1 - progress) * rerouted + progress * moved)

    def epoch(self) -> float:
        with ExitStack() as undo:
            undo.callback(self._fold)
            for linear, base, (a, b) in zip(self.linears, self.base, self.factors, strict=True):
                linear.weight.copy_(base)
                undo.callback(linear.register_forward_hook(_add_product(a, b)).remove)
            return super().epoch()

    @torch.no_grad()
    def _fold(self) -> None:
        for weight, base, (a, b) in zip(self.trained, self.base, self.factors, strict=True):
            weight.copy_(base.to(weight.device).float() + b @ a)


def _add_product(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    """A hook that adds x A^T B^T to the output of a linear."""
    return lambda linear, args, out: out + F.linear(F.linear(args[0].float(), a), b).to(out.dtype)


BASELINES: dict[str, type[Baseline]] = {
    "graddiff": GradDiff,
    "npo": NPO,
    "simnpo": SimNPO,
    "rmu": RMU,
    "circuit_breakers": CircuitBreakers,
}
