"""Linears and experts whose weights get no gradient, but who tell what they read and what gradient came back.

Experts are those of one module with a stack of matrices, as transformers has them: y_t = sum_e w_te W_e h_te over the
experts e that token t is routed to, with h_te the gated W'_e x_t. W_e has the gradient sum_t g_t (w_te h_te)^T with
g_t that of y_t, and W'_e one of its own for each t and e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Record = Callable[[Tensor], object]
GROUPED_ON = ("cuda",)
"""Kinds of devices on which the products of all experts are one launch, without the host having to know how many rows
each has.
"""
PACKS_ANEW = "support_avx512bf16_for_cpu"
"""Of linears of bitsandbytes, whether they do."""
TRAITS = ("is_transposed", "has_bias", "has_gate", "_apply_gate")
"""What a module of experts says of itself in transformers."""
ROWS = 1024
"""Of the identity that a linear is given at once, to see its weight."""
CLOSE = 0.05
"""How far, relatively, a gradient may be from what outputs say it is: some linears round what they read to 8 bits."""


class TappedLinear(torch.autograd.Function):
    """y = x W^T + b whose backward gives x its gradient, ``record`` dL/dy, and W nothing. ``tap``: a scalar that
    requires gradient, so that y does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tensor, weight: Tensor, bias: Tensor | None, record: Record) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.record = record
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        (grad,) = grads
        ctx.record(grad)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


class _Shared(torch.autograd.Function):
    """x, which all processes of ``group`` have, and whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum of what the processes of ``group`` have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def parallel_linear(
    x: Tensor, tap: Tensor, part: Tensor, bias: Tensor | None, record: Record, group: dist.ProcessGroup, by_row: bool
) -> Tensor:
    """:class:`TappedLinear` of a weight of which each process of ``group`` has a ``part``: some of its rows, which
    read all of x, and give the same columns of y; else some of its columns, which read the same of x, and all of y.
    """
    if by_row:
        return TappedLinear.apply(_Shared.apply(x, group), tap, part, bias, record)
    y = _Summed.apply(TappedLinear.apply(x, tap, part, None, record), group)
    return y if bias is None else y + bias


class _Tapped(torch.autograd.Function):
    """x, whose gradient ``record`` is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tensor, record: Record) -> Tensor:
        ctx.record = record
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.record(grads[0])
        return grads[0], None, None


class _ByExpert(torch.autograd.Function):
    """Rows x (S, D_in), sorted by expert, times the matrix of each (E, D_out, D_in), which gets no gradient; those
    beyond the last of ``ends`` (E,), int32, are of none, and become 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(weight, ends)
        return _multiplied(x, weight.mT, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        weight, ends = ctx.saved_tensors
        return _multiplied(grads[0], weight, ends), None, None, None


def _multiplied(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """(S, N): rows (S, K), sorted, times the one of ``matrices`` (E, K, N) that ``ends`` says."""
    if x.device.type in GROUPED_ON and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        found = F.grouped_mm(x, matrices, offs=ends)
        return found.masked_fill(torch.arange(len(x), device=x.device)[:, None] >= ends[-1], 0)
    found, start = x.new_zeros(len(x), matrices.shape[2]), 0
    for number, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], matrices[number], out=found[start:end])
        start = end
    return found


def norm_through(linear: nn.Module, name: str, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """The Frobenius norm of the weight of a ``linear`` where it cannot be read, as it is quantized: that of what the
    linear makes of the identity. The gradient that comes back through it is checked against the same.

    Args:
        name: of it, for errors. width: of its input. dtype: that it reads and puts out.

    Raises:
        ValueError: if it puts out another dtype, or no gradient, or another, comes back to what it reads.
    """
    squared = 0.0
    for start in range(0, width, ROWS):
        x = torch.zeros(min(ROWS, width - start), width, dtype=dtype, device=device)
        x.diagonal(start).fill_(1)
        y = linear(x.requires_grad_())
        if not isinstance(y, Tensor) or y.dtype != dtype:
            raise ValueError(f"{name}: expected a linear that puts out {dtype}, got {getattr(y, 'dtype', type(y))}")
        rows = (y - linear(torch.zeros_like(x[:1]).requires_grad_())).detach()
        here = float(rows.double().square().sum())
        squared += here
        if start == 0:
            # Of y = x W^T, the gradient of x for rows y is y W, whose inner product with x is that of y with y.
            (grad,) = torch.autograd.grad(y, x, rows) if y.requires_grad else (torch.zeros_like(x),)
            if not abs(float((grad * x.detach()).double().sum()) - here) <= CLOSE * here:
                raise ValueError(
                    f"{name}: expected a linear through which the gradient comes back to what it reads, got "
                    f"{type(linear).__name__}, where it does not; load the model without quantization"
                )
    return squared**0.5


def is_experts(module: nn.Module) -> bool:
    """Whether it is a stack of experts that :func:`run_experts` or :func:`run_all_experts` can run."""
    weights = [module._parameters.get(name) for name in (readers_of(module), "down_proj")]
    if not all(weight is not None and weight.ndim == 3 for weight in weights):
        return False
    if runs_all(module):
        return hasattr(module, "act_fn") and len(signature(module.forward).parameters) == 1
    return (
        all(hasattr(module, trait) for trait in TRAITS)
        and not getattr(module, "has_post_expert_norm", False)
        and not getattr(module, "_is_expert_parallel", False)
    )


def runs_all(experts: nn.Module) -> bool:
    """Whether each of the experts is given all tokens, as those of Llama 4, and not only some."""
    return not hasattr(experts, "_apply_gate")


def is_transposed(experts: nn.Module) -> bool:
    """Whether its matrices are kept as (D_in, D_out)."""
    return bool(getattr(experts, "is_transposed", True))


def readers_of(experts: nn.Module) -> str:
    """The name of the parameter that reads what experts are given."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def matrices_of(experts: nn.Module, name: str) -> Tensor:
    """Its weights of that name as (E, D_out, D_in), a view where they are kept otherwise."""
    weight: Tensor = getattr(experts, name)
    return weight.mT if is_transposed(experts) else weight


def run_experts(
    experts: nn.Module,
    x: Tensor,
    routes: Tensor,
    shares: Tensor,
    tap: Tensor | None = None,
    record: Callable[[str, Tensor], object] = lambda name, rows: None,
) -> Tensor:
    """What a module of experts puts out.

    Args:
        x: (N, D). routes: (N, k) the experts of each row; numbers that there are not are of none. shares: (N, k), by
            which what they say is multiplied.
        tap: as of :class:`TappedLinear`.
        record: told, in the forward, ``"routes"`` and what is read, ``"in"`` (N, D) and ``"down.in"`` (N, k, F), the
            latter times ``shares``; in the backward the gradients ``"down.out"`` (N, D) and ``"up.out"`` (N, k, F).
    """
    tap = x.new_zeros(()) if tap is None else tap
    down = matrices_of(experts, "down_proj")
    number, width = down.shape[:2]
    flat, count = routes.flatten(), routes.shape[1]
    order = flat.argsort(stable=True)
    sorted_routes = flat[order]
    ends = torch.searchsorted(sorted_routes, torch.arange(number, device=x.device), right=True).int()
    bias_of = sorted_routes.clamp_max(number - 1)

    def biased(rows: Tensor, name: str) -> Tensor:
        return rows + getattr(experts, f"{name}_bias")[bias_of] if experts.has_bias else rows

    def unsorted(rows: Tensor) -> Tensor:
        """(N, k, ...) in the order of the tokens."""
        return torch.empty_like(rows).index_copy_(0, order, rows).view(*routes.shape, rows.shape[-1])

    record("routes", routes)
    record("in", x)
    reader = readers_of(experts)
    up = _ByExpert.apply(x[order // count], tap, matrices_of(experts, reader), ends)
    up = biased(_Tapped.apply(up, tap, lambda grad: record("up.out", unsorted(grad))), reader)
    gate: Callable[[Tensor], Tensor] = experts._apply_gate if experts.has_gate else experts.act_fn  # type: ignore[assignment]
    inner = gate(up)
    share = torch.where(sorted_routes < number, shares.flatten()[order], 0)[:, None]
    record("down.in", unsorted((inner.detach() * share.detach()).to(x.dtype)))
    told = biased(_ByExpert.apply(inner.to(x.dtype), tap, down, ends), "down_proj") * share
    whole = x.new_zeros(len(x), width).index_add(0, order // count, told.to(x.dtype))
    return _Tapped.apply(whole, tap, lambda grad: record("down.out", grad))


def run_all_experts(
    experts: nn.Module,
    x: Tensor,
    tap: Tensor | None = None,
    record: Callable[[str, Tensor], object] = lambda name, rows: None,
) -> Tensor:
    """The same where x (E N, D) has all tokens times their shares for each of the experts, 0 where a token is not
    led there, and what is put out (E N, D) is then summed over the experts. ``"in"`` is (N, E, D) here.
    """
    tap = x.new_zeros(()) if tap is None else tap
    up, down = (matrices_of(experts, name).mT for name in ("gate_up_proj", "down_proj"))
    number = len(down)
    stacked = x.view(number, -1, x.shape[-1])
    led = stacked.detach().abs().amax(-1).T > 0
    record("routes", torch.where(led, torch.arange(number, device=x.device), number))
    record("in", stacked.transpose(0, 1))
    both = _Tapped.apply(stacked @ up, tap, lambda grad: record("up.out", grad.transpose(0, 1)))
    gate, value = both.chunk(2, dim=-1)
    activation: Callable[[Tensor], Tensor] = experts.act_fn  # type: ignore[assignment]
    inner = value * activation(gate)
    record("down.in", inner.detach().transpose(0, 1))
    # Summed, what all experts say of a token has one gradient.
    return _Tapped.apply(inner @ down, tap, lambda grad: record("down.out", grad[0])).flatten(0, 1)


def hit(routes: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each of so many experts that some of ``routes`` (T, k) lead to: its number, and the places (n,) of its rows
    among T, and among T k. The host waits once.
    """
    order = routes.flatten().argsort(stable=True)
    counts = torch.bincount(routes.flatten(), minlength=experts).tolist()[:experts]
    start = 0
    for number, count in enumerate(counts):
        if count:
            places = order[start : start + count]
            yield number, places // routes.shape[1], places
        start += count


def replace_forward(undo: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Until ``undo`` is closed."""
    attributes = module.__dict__
    before = attributes.get("forward")
    if before is None:
        undo.callback(attributes.pop, "forward")
    else:  # a wrapper that another library hung on the instance comes back afterwards
        undo.callback(attributes.__setitem__, "forward", before)
    attributes["forward"] = forward


def keep_packed(undo: ExitStack, model: nn.Module) -> None:
    """Until ``undo`` is closed, 4-bit weights stay packed as they are: bitsandbytes packs them anew on some CPUs, and
    for good, once they read what requires no gradient, and from then on lets none through.
    """
    for module in model.modules():
        if getattr(module, PACKS_ANEW, False):
            undo.callback(setattr, module, PACKS_ANEW, True)
            setattr(module, PACKS_ANEW, False)
