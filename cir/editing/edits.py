"""An edit as an artefact: the low-rank change of the weights that makes a model forget one fact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from cir.data.facts import Fact, load_facts
from cir.model.capture import Tokens
from cir.model.finding import find_stack
from cir.model.sites import Part, Target, expert_of, unwrapped
from cir.system.files import strict_json
from cir.system.writing import check_output, write_file, write_folder
from cir_kernels import outer_norm_sq, outer_update_

FORMAT = "cir-edit-1"
Factors = dict[str, tuple[Tensor, Tensor]]
"""By linear: B (r, D_out) and A (r, D_in), of which B^T A is added to its weight."""
ENTRIES = 2**24
"""Of rows that are factorised at once, in float64: of linears of one shape, as each of them takes many launches."""


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
            name: _truncated(b[None], a[None], most, 1.0 if energy is None else energy)[0]
            for name, (b, a) in self.factors.items()
        }
        held = _norm_sq(smaller.values()) / max(_norm_sq(self.factors.values()), 1e-300)
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
        rank, tensors, stacks = self.rank, dict[str, Tensor](), dict[str, Tensor]()
        for name, (b, a) in self.factors.items():
            expert = expert_of(name)
            for part, rows in (("A", a), ("B", b)):
                padded = rows.new_zeros(rank, rows.shape[1])
                padded[: len(rows)] = rows
                if expert is None:
                    key = f"base_model.model.{name}.lora_{part}.weight"
                    tensors[key] = (padded if part == "A" else padded.T).contiguous().cpu()
                    continue
                own, number, experts = expert
                key = f"base_model.model.{own.rpartition('.')[0]}.lora_{part}.weight"
                stacks.setdefault(key, rows.new_zeros(experts, *padded.shape, device="cpu"))[number] = padded
        for key, stack in stacks.items():  # the experts of A one after the other, those of B side by side
            of_a = key.endswith("lora_A.weight")
            tensors[key] = stack.flatten(0, 1) if of_a else stack.permute(2, 1, 0).flatten(1).contiguous()
        linears = [name for name in self.factors if expert_of(name) is None]
        layers = sorted({int(part) for name in linears for part in name.split(".") if part.isdigit()})
        of: dict[str, Any] = {"target_modules": sorted({name.rpartition(".")[2] for name in linears})}
        if stacks:  # peft takes any linear named as its experts' old ones for these, but no parameter
            experts_of = {expert[0] for name in self.factors if (expert := expert_of(name)) is not None}
            of = {
                "target_modules": None,
                "target_parameters": sorted([*experts_of, *(f"{n}.weight" for n in linears)]),
            }
        else:
            of["layers_to_transform"] = layers
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            **of,
        }

        def fill(partial: Path) -> None:
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
            (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

        write_folder(check_output(str(folder), overwrite=False), fill)


@torch.no_grad()
def add_factors(
    targets: Sequence[Target], edits: Sequence[Factors], *, sign: int = 1, rounding: str = "nearest"
) -> None:
    """W <- W + sign * the sum of the edits' B^T A for each target, rounded once: the same bits each time."""
    matrices = ((target, name) for target in targets for name in target.names)
    for place, (target, name) in enumerate(matrices):
        pairs = [factors[name] for factors in edits if name in factors or not target.experts]
        if not pairs:
            continue
        weight = target.part(name)
        b, a = (torch.cat(rows).to(weight.device) for rows in zip(*pairs, strict=True))
        how = rounding if weight.dtype.itemsize == 2 else "nearest"
        outer_update_(weight, b, a, float(sign), rounding=how, seed=place)


def factorise(
    targets: Sequence[Target], updates: Sequence[tuple[Tokens, float]], rank: int, energy: float
) -> tuple[Factors, float]:
    """The sum of ``scale * G^T A`` over ``updates`` as factors of at most ``rank`` that hold ``energy`` of it.

    Returns:
        The factors, in the dtype of the weights, and the share of the squared norm that they hold.
    """
    parts: dict[str, list[tuple[Part, float]]] = {}
    for target in targets:
        for tokens, scale in updates:
            for part in target.parts(tokens):
                parts.setdefault(part.name, []).append((part, scale))
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, of in parts.items():
        weight, rows = of[0][0].weight, sum(len(part.gradient) for part, _ in of)
        alike.setdefault((rows, weight.shape, weight.dtype, weight.device), []).append(name)
    found: Factors = {}
    whole = 0.0
    for (rows, shape, dtype, _), same in alike.items():
        few = max(1, ENTRIES // max(rows * sum(shape), 1))
        for some in (same[i : i + few] for i in range(0, len(same), few)):
            g = torch.stack([torch.cat([p.gradient.float() * scale for p, scale in parts[name]]) for name in some])
            a = torch.stack([torch.cat([part.activation.float() for part, _ in parts[name]]) for name in some])
            whole += _norm_sq(zip(g, a, strict=True))
            pairs = zip(some, _truncated(g, a, rank, energy), strict=True)
            found |= {name: (b.to(dtype), kept.to(dtype)) for name, (b, kept) in pairs}
    factors = {name: found[name] for name in parts}
    return factors, min(1.0, _norm_sq(factors.values()) / max(whole, 1e-300))


def _truncated(g: Tensor, a: Tensor, rank: int, energy: float) -> list[tuple[Tensor, Tensor]]:
    """For each of G (N, T, D_out) and A (N, T, D_in), B (r, D_out) and A (r, D_in) of the leading singular vectors of
    G^T A, from products with thin matrices.

    Randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4): G^T A is never formed, as its
    factors have a row for every token of every step. What is small is solved on the host, in one transfer.
    """
    g, a = g.double(), a.double()
    columns = min(rank + 16, *g.shape[1:], *a.shape[1:])
    generator = torch.Generator(a.device).manual_seed(0)
    right = torch.randn(columns, a.shape[2], generator=generator, device=a.device).to(a)
    for _ in range(2):
        left = _orthonormal((right @ a.mT) @ g)
        right = _orthonormal(product := (left @ g.mT) @ a)
    squared, turns = torch.linalg.eigh((product @ product.mT).cpu())
    squared, turns = squared.flip(1).clamp_min(0), turns.flip(2)
    held = squared.cumsum(1)
    enough = (held < energy * held[:, -1:]).sum(1) + 1
    root = squared.pow(0.25)
    inverse = torch.where(root > 0, 1 / root, 0)
    of_left, of_product = (
        (scale[:, None] * turns).mT.to(left) @ rows for scale, rows in ((root, left), (inverse, product))
    )
    most = [min(rank, count, columns) for count in enough.tolist()]
    return [(b[:kept].float(), c[:kept].float()) for b, c, kept in zip(of_left, of_product, most, strict=True)]


def _orthonormal(rows: Tensor) -> Tensor:
    """Rows of the same span in float64, orthonormal but for those that depend on others, which vanish: by Cholesky
    factors twice, as one alone is off by the square of the condition, and many times faster than QR on a GPU.
    """
    for _ in range(2):
        gram = rows @ rows.mT
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(1e-14 * diagonal.sum(-1, keepdim=True) + 1e-300)
        factor, _ = torch.linalg.cholesky_ex(gram)
        rows = torch.linalg.solve_triangular(factor, rows, upper=False)
    return rows


def _norm_sq(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    return float(outer_norm_sq([([b.float()], a.float()) for b, a in pairs]))
