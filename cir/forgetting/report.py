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
from typing import Any

import torch

from cir.config import BreakingConfig, CIRConfig
from cir.data.facts import Fact
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


@dataclass
class Report:
    """The outcome of :func:`cir.unlearn`. ``stopped`` says why it ended; ``after`` is the model returned. ``layers``
    are the first and the last of which weights change.

    ``unforgotten`` names facts some answer of which was not down to the floor, or would have come back, at the last
    step that was taken: where the collapse leaves little of a fact, it is not to be forgotten within the bounds.
    ``unknown`` names facts that the model did not know to begin with, see :func:`cir.measures.unknown_facts`.
    ``seconds`` is by phase; ``peak_memory`` is bytes, of the GPU where there is one, else of the process;
    ``predicted_memory`` is what was thought beforehand to be needed beyond the weights.
    """

    config: CIRConfig | BreakingConfig
    facts_hash: str
    before: Measure
    after: Measure
    layers: tuple[int, int] = (0, 0)
    epochs: list[Epoch] = field(default_factory=list)
    stopped: str = ""
    unknown: list[str] = field(default_factory=list)
    unforgotten: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    predicted_memory: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Strict JSON: a figure that is NaN or infinite is null."""
        return json.dumps(_finite(_plain(self)), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    plain = asdict(value)
    for name in ("before", "after"):
        plain[name]["mean_recall"] = getattr(value, name).mean_recall
    for epoch, source in zip(plain["epochs"], value.epochs, strict=True):
        epoch["measure"]["mean_recall"] = source.measure.mean_recall
    return plain


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
