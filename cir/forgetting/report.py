"""What a run did: figures by epoch, before and after, and all that is needed to repeat it."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cir.config import BreakingConfig, CIRConfig
from cir.data.facts import Fact
from cir.forgetting.card import model_card, section_of_run
from cir.measures import mean_recall


@dataclass
class Measure:
    """A model at one moment.

    Attributes:
        recall: mean recall by fact id, empty where no fact has probes.
        loss: nats a token on the disruption text.
        rise: relative rise of that loss since the start. rise_stderr: its standard error, from the paired
            differences of the windows measured; 0 where the whole text was measured.
        worst: highest rise of the loss of one window measured, in nats a token: the mean over a text hides it.
    """

    recall: dict[str, float]
    loss: float
    rise: float = 0.0
    rise_stderr: float = 0.0
    worst: float = 0.0

    @property
    def mean_recall(self) -> float | None:
        return mean_recall(self.recall)

    @property
    def rise_bound(self) -> float:
        """The rise and one standard error: what it is below with 84 % confidence."""
        return self.rise + self.rise_stderr


@dataclass
class Epoch:
    """One update epoch, or the share of one that the budget allowed, with that share of its ``rate``.

    ``rate`` is the dose in nats or, in the paper's way, a norm; ``forget_loss`` and ``retain_loss`` are means over
    its steps: of the log-odds of the answers or the paper's breaking loss, and of the paper's retain loss.
    ``kept``: inside the budget and the best so far; others were undone or surpassed.
    """

    number: int
    rate: float
    forget_loss: float
    retain_loss: float | None
    measure: Measure
    kept: bool


@dataclass(frozen=True)
class Adapter:
    """What an adapter holds of what a run changed.

    Attributes:
        rank: of every linear. energy: share of the squared norm of the change that it holds.
        whole: the model with all of the change; the report's ``after`` is what it is with the adapter.
    """

    rank: int
    energy: float
    whole: Measure


@dataclass
class Report:
    """The outcome of :func:`cir.unlearn`; ``after`` is the model returned. ``layers`` are the first and the last of
    which weights change. ``n_facts`` is how many were to be forgotten.

    ``stopped`` says why it ended: ``forgotten``, ``target recall reached``, ``budget spent``, ``all epochs done``,
    ``stopped by a callback`` or, after a signal, ``interrupted``.
    ``unforgotten`` names facts some answer of which was not down to the floor, or would have come back, at the last
    step that was taken: where the collapse leaves little of a fact, it is not to be forgotten within the bounds.
    ``unknown`` names facts that the model did not know to begin with, see :func:`cir.measures.unknown_facts`.
    ``chosen`` is what the run found by itself, but for the paper's way: ``counterfactuals``, how many sentences near
    the facts are spared; ``directions_left``, the mean share of its width that the collapse leaves to an update, by
    kind of site; ``relearning_rate``, the length of the last step of relearning, over the weights' root mean square.
    ``seconds`` is by phase; ``peak_memory`` is bytes, of the GPU where there is one, else of the process;
    ``predicted_memory`` is what was thought beforehand to be needed beyond the weights. ``adapter`` is what was
    written, where the model itself was not to change.
    """

    config: CIRConfig | BreakingConfig
    facts_hash: str
    before: Measure
    after: Measure
    layers: tuple[int, int] = (0, 0)
    epochs: list[Epoch] = field(default_factory=list)
    stopped: str = ""
    n_facts: int = 0
    unknown: list[str] = field(default_factory=list)
    unforgotten: list[str] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    predicted_memory: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    adapter: Adapter | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it: a figure that is NaN or infinite is None."""
        plain = asdict(self)
        for name in ("before", "after"):
            plain[name]["mean_recall"] = getattr(self, name).mean_recall
        if self.adapter is not None:
            plain["adapter"]["whole"]["mean_recall"] = self.adapter.whole.mean_recall
        for epoch, source in zip(plain["epochs"], self.epochs, strict=True):
            epoch["measure"]["mean_recall"] = source.measure.mean_recall
        return {name: _finite(value) for name, value in plain.items()}

    def to_json(self) -> str:
        """:meth:`to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each of ``epochs``; ``recall`` is the mean over the facts.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError(
                "to_frame: expected the package pandas, which is not installed: pip install pandas"
            ) from error
        return DataFrame([_row(epoch, epoch.measure) for epoch in self.epochs], columns=COLUMNS)

    def card(self, base_model: str | None = None) -> Any:
        """A ``huggingface_hub.ModelCard``: what was forgotten by count and hash, at what cost, and how to check it.

        ``base_model`` is the hub id of the model before. Write the card with its ``save(folder / "README.md")``.
        """
        return model_card(section_of_run(self.to_dict()), base_model=base_model)

    def plot(self, path: str | Path) -> None:
        """Recall against the rise of the text loss, epoch by epoch, as a PNG (needs matplotlib).

        Raises:
            ValueError: if no fact has probes.
        """
        measures = [self.before, *(epoch.measure for epoch in self.epochs)]
        recalls = [100 * measure.mean_recall for measure in measures if measure.mean_recall is not None]
        if len(recalls) < len(measures):
            raise ValueError("plot: expected facts with probes, got sentences alone, whose recall is not known")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        rises, errors = ([100 * getattr(m, name) for m in measures] for name in ("rise", "rise_stderr"))
        axes.errorbar(rises, recalls, xerr=errors, marker="o", color="tab:blue", capsize=2)
        names = ["start", *(f"epoch {epoch.number}" for epoch in self.epochs)]
        for name, point in zip(names, zip(rises, recalls, strict=True), strict=True):
            axes.annotate(name, point, (6, 6), textcoords="offset points")
        end = 100 * self.after.rise, 100 * (self.after.mean_recall or 0)
        axes.plot(*end, "o", ms=14, mfc="none", color="tab:green", label="the model returned")
        axes.axvline(100 * self.config.budget, ls="--", color="tab:red", label="budget")
        axes.set(
            xlabel="rise of the loss on neutral text (%; bars: one standard error)",
            ylabel="recall of the facts (%)",
            ylim=(0, None),
        )
        axes.legend()
        figure.savefig(path, dpi=120)


COLUMNS = ["epoch", "rate", "forget_loss", "retain_loss", "recall", "loss", "rise", "rise_stderr", "worst", "kept"]


def _row(epoch: Epoch, now: Measure) -> tuple[Any, ...]:
    """The figures of an epoch under :data:`COLUMNS`."""
    losses = epoch.forget_loss, epoch.retain_loss
    measured = now.mean_recall, now.loss, now.rise, now.rise_stderr, now.worst
    return (epoch.number, epoch.rate, *losses, *measured, epoch.kept)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """Seconds by phase. On a GPU a phase ends when its work has, at the price of one synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def hash_facts(facts: Sequence[Fact]) -> str:
    """SHA-256 over the facts as canonical JSON."""
    text = json.dumps([asdict(fact) for fact in facts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("cir", "torch", "transformers", "safetensors", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU since the last reset, or resident of the whole process (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
