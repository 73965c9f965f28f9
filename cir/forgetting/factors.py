"""Low-rank changes of weights: found, and written as adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cir.forgetting.update import Factors
from cir.model.capture import Tokens
from cir.model.sites import Part, Target, expert_of
from cir.system.writing import check_output, write_folder
from cir_kernels import outer_norm_sq

LORA_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""Of an adapter, as ``peft`` names them."""
ENTRIES = 2**24
"""Of rows that are factorised at once, in float64: of linears of one shape, as each of them takes many launches."""


def write_lora(folder: str | Path, factors: Factors, base_model: str = "") -> None:
    """Write a LoRA adapter that ``peft`` loads as it is, whole or not at all.

    Every linear has the largest rank among them, the others filled with zeros, as engines want one rank; so has every
    expert.
    """
    rank = max((len(b) for b, _ in factors.values()), default=0)
    tensors, stacks, parameters = dict[str, Tensor](), dict[str, Tensor](), set[str]()
    for name, (b, a) in factors.items():
        for part, rows in (("A", a), ("B", b)):
            padded = rows.new_zeros(rank, rows.shape[1])
            padded[: len(rows)] = rows
            if (expert := expert_of(name)) is None:
                key = f"base_model.model.{name}.lora_{part}.weight"
                tensors[key] = (padded if part == "A" else padded.T).contiguous().cpu()
                continue
            own, number, experts = expert
            parameters.add(own)
            key = f"base_model.model.{own.rpartition('.')[0]}.lora_{part}.weight"
            stacks.setdefault(key, rows.new_zeros(experts, *padded.shape, device="cpu"))[number] = padded
    for key, stack in stacks.items():  # the experts of A one after the other, those of B side by side
        of_a = key.endswith("lora_A.weight")
        tensors[key] = stack.flatten(0, 1) if of_a else stack.permute(2, 1, 0).flatten(1).contiguous()
    linears = [name for name in factors if expert_of(name) is None]
    if stacks:  # peft takes linears that are called as experts once were for these, but no parameter
        parameters |= {f"{name}.weight" for name in linears}
        changed: dict[str, Any] = {"target_modules": None, "target_parameters": sorted(parameters)}
    else:
        layers = sorted({int(part) for name in linears for part in name.split(".") if part.isdigit()})
        names = sorted({name.rpartition(".")[2] for name in linears})
        changed = {"target_modules": names, "layers_to_transform": layers}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **changed,
    }

    def fill(partial: Path) -> None:
        save_file(tensors, partial / LORA_FILES[0], metadata={"format": "pt"})
        (partial / LORA_FILES[1]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    write_folder(check_output(str(folder), overwrite=False), fill)


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
            whole += norm_sq(zip(g, a, strict=True))
            pairs = zip(some, truncated(g, a, rank, energy), strict=True)
            found |= {name: (b.to(dtype), kept.to(dtype)) for name, (b, kept) in pairs}
    factors = {name: found[name] for name in parts}
    return factors, min(1.0, norm_sq(factors.values()) / max(whole, 1e-300))


def truncated(g: Tensor | None, a: Tensor, rank: int, energy: float) -> list[tuple[Tensor, Tensor]]:
    """For each of G (N, T, D_out) and A (N, T, D_in), B (r, D_out) and A (r, D_in) of the leading singular vectors of
    G^T A, largest first, from products with thin matrices; of A (N, D_out, D_in) itself where there is no G.

    Randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4): G^T A is never formed, as its
    factors have a row for every token of every step. What is small is solved on the host, in one transfer.
    """
    g, a = g if g is None else g.double(), a.double()
    columns = min(rank + 16, *(a if g is None else g).shape[1:], *a.shape[1:])
    generator = torch.Generator(a.device).manual_seed(0)
    right = torch.randn(columns, a.shape[2], generator=generator, device=a.device).to(a)
    for _ in range(2):
        left = _orthonormal(right @ a.mT if g is None else (right @ a.mT) @ g)
        right = _orthonormal(product := (left if g is None else left @ g.mT) @ a)
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


def norm_sq(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    return float(outer_norm_sq([([b.float()], a.float()) for b, a in pairs]))
