"""The settings of an unlearning run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch

from cir.model.sites import Site
from cir.system.checks import is_number
from cir_kernels.rounding import ROUNDINGS

LayerRange = tuple[float, float]
MODES = ("orthogonal", "sequential", "soft")
STATISTICS = ("tokens", "weight_gradients")


def _check_types(config: CIRConfig | BreakingConfig | EditConfig) -> None:
    """Numbers are numbers, finite and no truth values; what is to be whole is whole."""
    for field in fields(config):
        value, kinds = getattr(config, field.name), str(field.type).split(" | ")
        if value is None and "None" in kinds:
            continue
        if "bool" in kinds:
            _require(isinstance(value, bool), field.name, "True or False", repr(value))
        elif kinds[0] in ("int", "float"):
            whole = kinds[0] == "int"
            what = "a whole number" if whole else "a finite number"
            _require(is_number(value, whole), field.name, what, repr(value))
    _require(config.max_length >= 2, "max_length", "at least 2", config.max_length)


def _check_common(config: CIRConfig | BreakingConfig) -> None:
    """What both kinds of configuration have."""
    _require(config.seed >= 0, "seed", "zero or more", config.seed)
    if config.rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {config.rounding!r}")
    _require(config.retain_length >= 8, "retain_length", "at least 8", config.retain_length)
    _require(
        config.retain_tokens >= config.retain_length, "retain_tokens", "at least retain_length", config.retain_tokens
    )
    _require(config.budget > 0, "budget", "a positive number", config.budget)
    worst = config.worst_window
    _require(worst is None or worst > 0, "worst_window", "a positive number", worst)
    recall = config.target_recall
    _require(recall is None or 0 <= recall <= 1, "target_recall", "0 to 1", recall)
    tokens = config.disruption_tokens
    _require(tokens is None or tokens >= 1, "disruption_tokens", "at least 1", tokens)


def _check_rounding(self: CIRConfig | BreakingConfig, dtype: torch.dtype) -> None:
    """Raise ValueError if weights of ``dtype`` cannot be rounded so."""
    valid = self.rounding != "compensated" or dtype == torch.bfloat16
    _require(valid, "rounding", "bfloat16 weights for compensated", dtype)


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}")


DIRECTIONS = 512
"""Beyond which a quarter of a site's width is more than is collapsed by default."""
LAYERS = 0.3
"""Of a model's depth, what is updated where it cannot be told where the facts are."""


@dataclass(frozen=True)
class CIRConfig:
    """How to forget facts, see docs/method.md; nothing is in units of one model.

    Attributes:
        layers: of the model that are updated, from the top: a share of its depth. None for those from just below the
            layer in which the facts' subjects and answers come together (:func:`cir.forgetting.locate.pair_layer`);
            0.3 where that cannot be told.
        dose: by how many nats a step is to lower the log-odds of each fact's answers, to first order.
        floor: log-odds at which an answer counts as gone, if it fell by two nats.
        relearning_steps: relearn a part of the facts in so many steps, and step along what the others come back by;
            0 for none. Where a fact is alone in its step, contrast facts most like it are relearned.
        relearning_floor: log-odds at which an answer counts as gone after that.
        max_change: of a fact, the Frobenius norm of one step over that of all weights updated, at most.
        ridge_activation, ridge_gradient: m of the soft collapse, in mean eigenvalues of what is collapsed: directions
            that are used less than this are free.
        contrast_weight: of the contrast facts' activations beside the text's, each as a mean over tokens.
        text_weight: of the text's own gradients beside the contrast facts', each as a mean over tokens.
        rank: directions collapsed at each site, at least; an int is a number, a float a share of the site's width,
            None a quarter of it, but no more than 512 or an eighth, whichever is more.
            The others count as unused.
        rounding: of updated 16-bit weights, see :func:`cir_kernels.outer_update_`: ``nearest`` drops what is less
            than half a unit in the last place; ``stochastic`` keeps it on average, and ``compensated`` in 16 further
            bits of each updated bfloat16 weight.
        batch_size: facts of a step. max_length: tokens allowed in a sentence.
        retain_length: tokens of a window of retain text. retain_tokens: of the whole text, used at most.
        max_steps: at most. check_every: steps between measurements.
        budget: highest relative rise of the loss on the disruption text. worst_window: highest rise of one of its
            windows, in nats a token.
        disruption_tokens: tokens of that text measured, half of them where it is nearest the facts, the others
            evenly spread; None for all. The fewer they are, the larger the standard error kept free below the budget.
        full_check: at the end, measure all of that text, and where the loss rose by more than the budget, go back on
            the line to the model as it came. Takes one measurement of the text more at the start, too.
        target_recall: stop once mean recall is at or below this; None to go on until every answer is gone.
        adapter_rank, adapter_energy: an adapter is of the least rank that holds this share of the squared norm of the
            change, and of this rank at most.
        seed: of every random choice.
    """

    layers: float | None = None
    dose: float = 2.0
    floor: float = -4.0
    relearning_steps: int = 3
    relearning_floor: float = -4.5
    max_change: float = 0.05
    ridge_activation: float = 1e-2
    ridge_gradient: float = 1.0
    contrast_weight: float = 10.0
    text_weight: float = 1.0
    rank: float | None = None
    rounding: str = "stochastic"
    batch_size: int = 64
    max_length: int = 128
    retain_length: int = 128
    retain_tokens: int = 8192
    max_steps: int = 40
    check_every: int = 10
    budget: float = 0.001
    worst_window: float = 0.1
    disruption_tokens: int | None = 32768
    full_check: bool = False
    target_recall: float | None = None
    adapter_rank: int = 128
    adapter_energy: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        share = self.layers
        _require(share is None or 0 < share <= 1, "layers", "a share of the depth, above 0 and at most 1", share)
        for name in ("dose", "max_change", "ridge_activation", "ridge_gradient"):
            _require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        for name in ("floor", "relearning_floor"):
            _require(getattr(self, name) < 0, name, "log-odds below 0", getattr(self, name))
        for name in ("contrast_weight", "text_weight", "relearning_steps"):
            _require(getattr(self, name) >= 0, name, "zero or more", getattr(self, name))
        for name in ("batch_size", "max_steps", "check_every", "adapter_rank"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        energy = self.adapter_energy
        _require(0 < energy <= 1, "adapter_energy", "above 0 and at most 1", energy)
        valid = self.rank is None or (self.rank >= 1 if isinstance(self.rank, int) else 0 < self.rank <= 1)
        _require(valid, "rank", "1 or more directions, or a share above 0 and at most 1", self.rank)
        _check_common(self)

    def first_layer(self, depth: int) -> int:
        """The lowest layer whose weights change."""
        return depth - max(1, round((self.layers or LAYERS) * depth))

    check_rounding = _check_rounding

    @classmethod
    def paper(cls) -> BreakingConfig:
        """The authors' configuration for Llama-3.1-8B (arXiv 2509.11816)."""
        return BreakingConfig()

    @classmethod
    def repselect(cls) -> BreakingConfig:
        """RepSelect (arXiv 2606.17168), the authors' later method, as a variant of that: the leading components of
        each weight gradient, from both sides, scaled by lambda_min / lambda_i.
        """
        return BreakingConfig(
            mode="soft",
            statistics="weight_gradients",
            rate=3.0,
            retain_rate=0.0,
            rounding="stochastic",
            retain_batch_size=8,
            max_epochs=10,
        )

    @classmethod
    def preset(cls, name: str) -> CIRConfig | BreakingConfig:
        """``default``, ``paper`` or ``repselect``."""
        presets: dict[str, Callable[[], CIRConfig | BreakingConfig]] = {
            "default": cls,
            "paper": cls.paper,
            "repselect": cls.repselect,
        }
        return presets[name]()


@dataclass(frozen=True)
class BreakingConfig:
    """How to unlearn as the paper does (arXiv 2509.11816): break what the MLPs say. The defaults are its own, for
    Llama-3.1-8B; rates do not transfer between sizes.

    Attributes:
        loss_layers: first and one past the last layer whose MLP output is broken; fractions of the depth
            where both are floats, layer numbers where both are ints. All layers below are updated.
        update_loss_layers: update these too, as the paper does.
        mode: collapse, ``orthogonal``, ``sequential`` (the paper's) or ``soft`` (RepSelect's).
        statistics: whose components are common: those of the facts' ``tokens``, or of their ``weight_gradients``.
        rank_activation, rank_gradient: directions collapsed at each kind of site, the mean included; 0 for none. An
            int is a number of directions, a float a share of the site's width.
        exact: solve bases from full D x D scatters instead of sketches. Slow and large; a check.
        rate: r, the Frobenius norm of each forget step over all weights together.
        retain_rate: learning rate of the retain step that follows each forget step; 0 leaves it out.
        rounding: of updated 16-bit weights, see :func:`cir_kernels.outer_update_`: ``nearest`` drops what is less
            than half a unit in the last place, most of a step on a large model; ``stochastic`` keeps it on average,
            and ``compensated`` in 16 further bits of each updated bfloat16 weight.
        batch_size: sentences a forget step. retain_batch_size: windows a retain step.
        retain_length: tokens of a retain window. retain_tokens: of the whole text, used at most.
        max_length: tokens allowed in a sentence.
        skip_first: tokens at the start of each sentence that count nowhere (attention sinks).
        max_epochs: update epochs at most, after the one that only fits bases.
        budget: highest relative rise of the loss on the disruption text.
        disruption_tokens: tokens of that text measured after each epoch, half of them where it is nearest the facts,
            the others evenly spread; None for all. The fewer they are, the larger the standard error that is kept
            free below the budget.
        worst_window: highest rise of one of its windows, in nats a token; None for no bound, as in the paper.
        full_check, target_recall: as in :class:`CIRConfig`.
        seed: of every random choice.
    """

    loss_layers: LayerRange = (6 / 32, 12 / 32)
    update_loss_layers: bool = True
    mode: str = "sequential"
    statistics: str = "tokens"
    rank_activation: float = 24
    rank_gradient: float = 36
    exact: bool = False
    rate: float = 0.2
    retain_rate: float = 3e-4
    rounding: str = "nearest"
    batch_size: int = 32
    retain_batch_size: int = 12
    retain_length: int = 128
    retain_tokens: int = 16384
    max_length: int = 128
    skip_first: int = 1
    max_epochs: int = 16
    budget: float = 0.001
    disruption_tokens: int | None = 32768
    worst_window: float | None = None
    full_check: bool = False
    target_recall: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if self.statistics not in STATISTICS:
            raise ValueError(f"statistics: expected one of {', '.join(STATISTICS)}, got {self.statistics!r}")
        for name in ("batch_size", "retain_batch_size", "max_epochs"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("rank_activation", "rank_gradient"):
            rank = getattr(self, name)
            valid = rank >= 0 and (isinstance(rank, int) or rank < 1)
            _require(valid, name, "0 or more directions, or a share below 1", rank)
        _require(self.skip_first >= 0, "skip_first", "at least 0", self.skip_first)
        _require(self.rate > 0, "rate", "a positive number", self.rate)
        _require(self.retain_rate >= 0, "retain_rate", "zero or more", self.retain_rate)
        _check_common(self)
        self.layers(2**20)

    check_rounding = _check_rounding

    def check_ranks(self, sites: Iterable[Site]) -> None:
        """Raise ValueError if more directions are to be collapsed at a site than it has."""
        for site in sites:
            name = f"rank_{site.kind}"
            rank = rank_at(site, getattr(self, name))
            _require(rank <= site.width, name, f"at most {site.width}, the width of {site.name}", rank)

    def layers(self, depth: int) -> range:
        """The loss layers of a model of ``depth`` layers.

        Raises:
            ValueError: if the range is empty or reaches outside the model.
        """
        if not isinstance(self.loss_layers, tuple | list) or len(self.loss_layers) != 2:
            raise ValueError(f"loss_layers: expected a first and one past the last, got {self.loss_layers!r}")
        first, stop = self.loss_layers
        if not all(isinstance(end, int | float) for end in (first, stop)):
            raise ValueError(f"loss_layers: expected two numbers, got {self.loss_layers!r}")
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
    """How :class:`cir.Editor` forgets one fact.

    Attributes:
        dose: by how many nats a step is to lower the log-odds of the fact's answer, to first order; halved when
            neighbours suffer.
        max_steps: steps at most. check_every: steps between looks at the fact.
        target_recall: share of the fact's recall at which it counts as forgotten.
        keep: share of the neighbours' mean recall that must stay. neighbours: facts watched at most.
        budget: highest relative rise of the text loss in one edit. worst_window: highest rise of one window of the
            text, in nats a token. text_tokens: of the text, measured: half of them nearest the fact.
        rank, energy: the change is kept as factors of the smallest rank that holds this share of its squared norm,
            and of this rank at most.
        rounding: of 16-bit weights, see :func:`cir_kernels.outer_update_`.
        max_length: tokens allowed in a sentence.
    """

    dose: float = 2.0
    max_steps: int = 40
    check_every: int = 2
    target_recall: float = 0.01
    keep: float = 0.98
    neighbours: int = 32
    budget: float = 0.001
    worst_window: float = 0.03
    text_tokens: int = 4096
    rank: int = 16
    energy: float = 0.999
    rounding: str = "stochastic"
    max_length: int = 128

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("dose", "budget", "worst_window"):
            _require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        for name in ("max_steps", "check_every", "neighbours", "text_tokens", "rank"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("target_recall", "keep", "energy"):
            _require(0 < getattr(self, name) <= 1, name, "above 0 and at most 1", getattr(self, name))
        _require(self.rounding in ("nearest", "stochastic"), "rounding", "nearest or stochastic", self.rounding)


def rank_at(site: Site, rank: float | None) -> int:
    """A rank as a number of directions: an int is one, a float a share of the site's width; None as of CIRConfig."""
    if rank is None:
        return min(site.width // 4, max(site.width // 8, DIRECTIONS))
    return rank if isinstance(rank, int) else round(rank * site.width)
