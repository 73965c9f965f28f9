"""The settings of an unlearning run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from cir.model.sites import Site
from cir_kernels.rounding import ROUNDINGS

LayerRange = tuple[float, float]
MODES = ("orthogonal", "sequential", "soft")
STATISTICS = ("tokens", "weight_gradients")


@dataclass(frozen=True)
class CIRConfig:
    """How to unlearn (arXiv 2509.11816). The defaults work on a model of 135M parameters as they stand.

    Rates do not transfer between sizes: :meth:`paper` has the authors' for Llama-3.1-8B.

    Attributes:
        loss_layers: first and one past the last layer whose MLP output is broken; fractions of the depth
            where both are floats, layer numbers where both are ints. All layers below are updated.
        update_loss_layers: update these too, as the paper does.
        mode: collapse, ``orthogonal``, ``sequential`` (the paper's) or ``soft`` (RepSelect's).
        statistics: whose components are common: those of the facts' ``tokens``, or of their ``weight_gradients``.
        rank_activation, rank_gradient: directions collapsed at each kind of site, the mean included; 0 for none.
        rank_background: directions of the retain text's activations collapsed as well; 0 as in the paper.
            Of each rank, an int is a number of directions, a float a share of the site's width.
        exact: solve bases from full D x D scatters instead of sketches. Slow and large; a check.
        rate: r, the Frobenius norm of each forget step over all weights together.
        retain_rate: learning rate of the retain step that follows each forget step; 0 leaves it out.
        growth_weight: of a second term of a forget step's loss, by which what the MLPs say of the facts must not
            grow, see :func:`cir.forgetting.objectives.mlp_growth`: it spares text with the words that all facts
            share, and takes more epochs. 0 as in the paper.
        rounding: of updated 16-bit weights, see :func:`cir_kernels.outer_update_`: ``nearest`` drops what is less
            than half a unit in the last place, most of a step on a large model; ``stochastic`` keeps it on average,
            and ``compensated`` in 16 further bits of each updated bfloat16 weight.
        to_answers: break the facts' sentences only up to the first token of the answer, the target of a probe; see
            :func:`cir.data.tokens.rows_to_answers`. Sentences of facts without probes are always whole.
        word_dropout: beside each sentence, break one without this share of its tokens, drawn once; 0 for none.
        batch_size: sentences a forget step. retain_batch_size: windows a retain step.
        retain_length: tokens of a retain window. retain_tokens: of the whole text, used at most.
        max_length: tokens allowed in a sentence.
        skip_first: tokens at the start of each sentence that count nowhere (attention sinks).
        max_epochs: update epochs at most, after the one that only fits bases.
        budget: highest relative rise of the loss on the disruption text.
        disruption_tokens: tokens of that text measured after each epoch, half of them where it is nearest the facts,
            the others evenly spread; None for all. The fewer they are, the larger the standard error that is kept
            free below the budget.
        full_check: at the end, measure all of that text, and where the loss rose by more than the budget, go back on
            the line to the model as it came. Takes one measurement of the text more at the start, too.
        target_recall: stop once mean recall is at or below this; None to go on to the budget.
        seed: of every random choice.
    """

    loss_layers: LayerRange = (6 / 32, 12 / 32)
    update_loss_layers: bool = False
    mode: str = "orthogonal"
    statistics: str = "tokens"
    rank_activation: float = 12
    rank_gradient: float = 12
    rank_background: float = 0.5
    exact: bool = False
    rate: float = 3.0
    retain_rate: float = 0.03
    growth_weight: float = 0.3
    rounding: str = "stochastic"
    to_answers: bool = True
    word_dropout: float = 0.4
    batch_size: int = 32
    retain_batch_size: int = 8
    retain_length: int = 128
    retain_tokens: int = 16384
    max_length: int = 128
    skip_first: int = 1
    max_epochs: int = 10
    budget: float = 0.001
    disruption_tokens: int | None = 32768
    full_check: bool = False
    target_recall: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if self.statistics not in STATISTICS:
            raise ValueError(f"statistics: expected one of {', '.join(STATISTICS)}, got {self.statistics!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        for name in ("batch_size", "retain_batch_size", "max_epochs"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("rank_activation", "rank_gradient", "rank_background"):
            rank = getattr(self, name)
            valid = rank >= 0 and (isinstance(rank, int) or rank < 1)
            _require(valid, name, "0 or more directions, or a share below 1", rank)
        _require(self.retain_length >= 8, "retain_length", "at least 8", self.retain_length)
        _require(
            self.retain_tokens >= self.retain_length,
            "retain_tokens",
            "at least retain_length",
            self.retain_tokens,
        )
        _require(self.skip_first >= 0, "skip_first", "at least 0", self.skip_first)
        _require(self.rate > 0 and math.isfinite(self.rate), "rate", "a positive number", self.rate)
        finite = math.isfinite(self.retain_rate)
        _require(self.retain_rate >= 0 and finite, "retain_rate", "zero or more", self.retain_rate)
        finite = math.isfinite(self.growth_weight)
        _require(self.growth_weight >= 0 and finite, "growth_weight", "zero or more", self.growth_weight)
        _require(self.budget > 0, "budget", "a positive number", self.budget)
        _require(0 <= self.word_dropout < 1, "word_dropout", "a share from 0 to below 1", self.word_dropout)
        recall = self.target_recall
        _require(recall is None or 0 <= recall <= 1, "target_recall", "0 to 1", recall)
        tokens = self.disruption_tokens
        _require(tokens is None or tokens >= 1, "disruption_tokens", "at least 1", tokens)
        self.layers(2**20)

    def check_rounding(self, dtype: torch.dtype) -> None:
        """Raise ValueError if weights of ``dtype`` cannot be rounded so."""
        valid = self.rounding != "compensated" or dtype == torch.bfloat16
        _require(valid, "rounding", "bfloat16 weights for compensated", dtype)

    def check_ranks(self, sites: Iterable[Site]) -> None:
        """Raise ValueError if more directions are to be collapsed at a site than it has."""
        for site in sites:
            names = ["rank_background", "rank_activation"] if site.kind == "activation" else ["rank_gradient"]
            rank = sum(rank_at(site, getattr(self, name)) for name in names)
            _require(rank <= site.width, " + ".join(names), f"at most {site.width}, the width of {site.name}", rank)

    @classmethod
    def paper(cls) -> CIRConfig:
        """The authors' configuration for Llama-3.1-8B."""
        return cls(
            update_loss_layers=True,
            mode="sequential",
            rank_activation=24,
            rank_gradient=36,
            rank_background=0,
            rate=0.2,
            retain_rate=3e-4,
            growth_weight=0.0,
            rounding="nearest",
            to_answers=False,
            word_dropout=0.0,
            retain_batch_size=12,
            max_epochs=16,
        )

    @classmethod
    def repselect(cls) -> CIRConfig:
        """RepSelect (arXiv 2606.17168), the authors' later method, as a variant of this one: the leading components
        of each weight gradient, from both sides, scaled by lambda_min / lambda_i.
        """
        return cls(
            update_loss_layers=True,
            mode="soft",
            statistics="weight_gradients",
            rank_activation=24,
            rank_gradient=36,
            rank_background=0,
            retain_rate=0.0,
            growth_weight=0.0,
            to_answers=False,
            word_dropout=0.0,
        )

    @classmethod
    def preset(cls, name: str) -> CIRConfig:
        """``default``, ``paper`` or ``repselect``."""
        presets: dict[str, Callable[[], CIRConfig]] = {
            "default": cls,
            "paper": cls.paper,
            "repselect": cls.repselect,
        }
        return presets[name]()

    def layers(self, depth: int) -> range:
        """The loss layers of a model of ``depth`` layers.

        Raises:
            ValueError: if the range is empty or reaches outside the model.
        """
        first, stop = self.loss_layers
        if isinstance(first, float) or isinstance(stop, float):
            _require(0 <= first < stop <= 1, "loss_layers", "fractions 0 <= first < stop <= 1", (first, stop))
            first, stop = round(first * depth), math.ceil(stop * depth)
        if not 0 <= first < stop <= depth:
            raise ValueError(f"loss_layers: expected a range within 0..{depth}, got {first}..{stop}")
        return range(int(first), int(stop))

    def last_updated(self, depth: int) -> int:
        """The last layer whose weights change; the first is 0.

        Raises:
            ValueError: if there is none.
        """
        layers = self.layers(depth)
        _require(self.update_loss_layers or layers[0] > 0, "update_loss_layers", "True where none is below", False)
        return layers[-1] if self.update_loss_layers else layers[0] - 1


@dataclass(frozen=True)
class EditConfig:
    """How :class:`cir.Editor` forgets one fact. The defaults are for a model of 135M parameters.

    Attributes:
        rate: Frobenius norm of each step over all weights together; halved when neighbours suffer.
        max_steps: steps at most. check_every: steps between looks at the fact.
        target_recall: share of the fact's recall at which it counts as forgotten.
        keep: share of the neighbours' mean recall that must stay. neighbours: facts watched at most.
        budget: highest relative rise of the text loss in one edit. text_tokens: of the text, measured, evenly spread.
        rank, energy: the change is kept as factors of the smallest rank that holds this share of its squared norm,
            and of this rank at most.
        rounding: of 16-bit weights, see :func:`cir_kernels.outer_update_`.
        max_length, skip_first: as in :class:`CIRConfig`.
    """

    rate: float = 2.0
    max_steps: int = 40
    check_every: int = 2
    target_recall: float = 0.005
    keep: float = 0.98
    neighbours: int = 32
    budget: float = 0.001
    text_tokens: int = 4096
    rank: int = 16
    energy: float = 0.999
    rounding: str = "stochastic"
    max_length: int = 128
    skip_first: int = 1

    def __post_init__(self) -> None:
        _require(self.rate > 0 and math.isfinite(self.rate), "rate", "a positive number", self.rate)
        for name in ("max_steps", "check_every", "neighbours", "text_tokens", "rank"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("target_recall", "keep", "energy"):
            _require(0 < getattr(self, name) <= 1, name, "above 0 and at most 1", getattr(self, name))
        _require(self.budget > 0, "budget", "a positive number", self.budget)
        _require(self.rounding in ("nearest", "stochastic"), "rounding", "nearest or stochastic", self.rounding)
        _require(self.skip_first >= 0, "skip_first", "at least 0", self.skip_first)


def rank_at(site: Site, rank: float) -> int:
    """A rank as a number of directions: an int is one, a float a share of the site's width."""
    return rank if isinstance(rank, int) else round(rank * site.width)


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}")
