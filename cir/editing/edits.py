"""An edit as an artefact: the low-rank change of the weights that makes a model forget one fact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from cir.data.facts import Fact, load_facts
from cir.forgetting.factors import norm_sq, truncated, write_lora
from cir.forgetting.update import Factors, add_factors
from cir.model.finding import find_stack, unwrapped
from cir.model.sites import Target
from cir.system.files import strict_json
from cir.system.writing import write_file

FORMAT = "cir-edit-1"


@dataclass(frozen=True)
class State:
    """A model around one edit.

    Attributes:
        recall: mean recall of the edit's fact. neighbours: of the neighbours watched, None where there are none.
        rise: relative rise of the text loss since before the edit. rise_stderr: its standard error. worst: highest
            rise of one window of it, in nats a token.
        relearned: recall of the fact after the relearning attack, where that was measured.
    """

    recall: float
    neighbours: float | None
    rise: float = 0.0
    rise_stderr: float = 0.0
    worst: float = 0.0
    relearned: float | None = None


@dataclass(frozen=True)
class Edit:
    """What :meth:`cir.Editor.forget` did, small enough to keep and to ship.

    Attributes:
        id: the fact's. number: place in its journal. fact: what was forgotten.
        factors: by linear, B (r, D_out) and A (r, D_in) in the dtype of its weight: the change is B^T A.
        energy: share of the squared norm of the change that the factors hold; the rest was left out.
        before, full, after: the model before; with all of the change; and with the factors, as it now is.
        steps: taken. seconds: of the whole call. stopped: why no further step was taken.
        fingerprint: of the model that the journal's first edit was made on.
    """

    id: str
    number: int
    fact: Fact
    factors: Factors = field(repr=False)
    energy: float
    before: State
    full: State
    after: State
    steps: int
    seconds: float
    stopped: str
    fingerprint: str

    @property
    def forgotten(self) -> bool:
        """Whether recall came down to ``target_recall``; else ``stopped`` says what was in the way."""
        return self.stopped == "forgotten"

    @property
    def rank(self) -> int:
        return max((len(b) for b, _ in self.factors.values()), default=0)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pair in self.factors.values() for t in pair)

    def compress(self, *, rank: int | None = None, energy: float | None = None) -> Edit:
        """The best approximation of at most ``rank``, or holding ``energy`` of this one's squared norm, a linear.

        ``after`` stays that of the whole edit: measure the approximation with :meth:`cir.Editor.measure`.

        Raises:
            ValueError: if neither or both are given, or out of range.
        """
        if (rank is None) == (energy is None):
            raise ValueError(f"expected either a rank or an energy, got {rank} and {energy}")
        if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
            raise ValueError(f"expected a rank of at least 1 or an energy in (0, 1], got {rank or energy}")
        most = self.rank if rank is None else rank
        smaller = {
            name: truncated(b[None], a[None], most, 1.0 if energy is None else energy)[0]
            for name, (b, a) in self.factors.items()
        }
        held = norm_sq(smaller.values()) / max(norm_sq(self.factors.values()), 1e-300)
        return replace(self, factors=smaller, energy=self.energy * min(1.0, held))

    def apply_(self, model: Any, *, sign: int = 1) -> None:
        """Add the change to the weights of ``model`` in place (``sign`` -1: take it away), rounded to nearest.

        Taking away gives back what was there up to rounding; :meth:`cir.Editor.undo` gives it back bit for bit.

        Raises:
            ValueError: if a linear of the edit is not in the model or has another shape; nothing is changed then.
        """
        add_factors(self.targets_in(model), [self.factors], sign=sign)

    def targets_in(self, model: Any) -> list[Target]:
        """The linears of ``model`` that this edit changes, in the order in which an editor has them."""
        stack = find_stack(unwrapped(model))
        every = [*stack.writers(0), *stack.targets(len(stack.mlps) - 1)]
        by_name = {name: target for target in every for name in target.names}
        for name, (b, a) in self.factors.items():
            shape = (b.shape[1], a.shape[1])
            found = tuple(by_name[name].weight.shape[-2:]) if name in by_name else "no such linear"
            if found != shape:
                raise ValueError(f"edit {self.id!r}: expected a model with {name} {shape}, got {found}")
        return list({target.name: target for name, target in by_name.items() if name in self.factors}.values())

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        return save(*self._tensors())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors, about = self._tensors()
        write_file(path, lambda partial: save_file(tensors, partial, metadata=about))

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = {
            f"{name}.{part}": tensor.cpu().contiguous()
            for name, pair in self.factors.items()
            for part, tensor in zip("BA", pair, strict=True)
        }
        about = {key: value for key, value in vars(self).items() if key != "factors"}
        plain = {key: asdict(value) if hasattr(value, "__dict__") else value for key, value in about.items()}
        # One key: safetensors writes several in no fixed order, and the same edit is to be the same bytes.
        return tensors, {FORMAT: json.dumps(plain)}

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file holds no whole edit of this format, or one with figures that are not finite.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Edit:
        """Read what :meth:`to_bytes` made; raises ValueError as :meth:`load`."""
        try:
            tensors = load(data)
            length = int.from_bytes(data[:8], "little")  # of the file's JSON header, which has the metadata
            metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
            if FORMAT not in metadata:
                raise ValueError(f"expected a file of format {FORMAT}, got metadata {sorted(metadata)!r:.80}")
            return cls._of(strict_json(FORMAT, metadata[FORMAT]), tensors)
        except (SafetensorError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected an edit, got {type(error).__name__}: {error!s:.200}") from error

    @classmethod
    def _of(cls, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        factors = {key[:-2]: (tensor, tensors[key[:-1] + "A"]) for key, tensor in tensors.items() if key[-2:] == ".B"}
        for name, (b, a) in factors.items():
            if b.ndim != 2 or a.ndim != 2 or len(b) != len(a) or not b.is_floating_point() or b.dtype != a.dtype:
                raise ValueError(f"{name}: expected B (r, D_out) and A (r, D_in), got {b.shape} and {a.shape}")
            if not (b.isfinite().all() and a.isfinite().all()):
                raise ValueError(f"{name}: expected finite factors, got NaN or infinity")
        if not factors or len(tensors) != 2 * len(factors):
            raise ValueError(f"expected factors B and A of linears, got {sorted(tensors)!r:.80}")
        states = {key: State(**about[key]) for key in ("before", "full", "after")}
        edit = cls(**{**about, **states, "fact": load_facts([about["fact"]])[0], "factors": factors})
        for name, kind in (("id", str), ("stopped", str), ("fingerprint", str), ("number", int), ("steps", int)):
            if not isinstance(getattr(edit, name), kind):
                raise ValueError(f"{name}: expected {kind.__name__}, got {getattr(edit, name)!r:.80}")
        for figure in (edit.energy, edit.seconds, *(f for s in states.values() for f in vars(s).values())):
            if figure is not None and not (isinstance(figure, int | float) and isfinite(figure)):
                raise ValueError(f"expected finite figures, got {figure!r:.80}")
        return edit

    def export_lora(self, folder: str | Path, base_model: str = "") -> None:
        """Write a LoRA adapter that ``peft`` loads as it is, and that serving engines can swap in and out.

        Every linear has the largest rank among them, the others filled with zeros, as engines want one rank; so has
        every expert. Of those of Llama 4 peft mistakes the layout, and refuses the adapter.
        """
        write_lora(folder, self.factors, base_model)
