"""Forward and backward passes that hand over each linear's input and output gradient, and no weight gradient.

This file and taps.py alone touch autograd. All that is done to the model is undone when the context ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cir.data.tokens import Batch
from cir.model.linears import matrix_of
from cir.model.norms import fused_norms
from cir.model.packing import packed_inputs
from cir.model.shards import Split, gathered, group_of, is_sharded, local, reshard, ungathered
from cir.model.sites import Site, Stack, Target
from cir.model.taps import (
    TappedLinear,
    keep_packed,
    parallel_linear,
    replace_forward,
    run_all_experts,
    run_experts,
    runs_all,
)

Tokens = dict[str, Tensor]
"""Rows (T, width) at each site, by site name; of experts (T, k, width), and by the name of their routes which (T, k).
"""


@dataclass
class Hidden:
    """What a trimmed forward leaves.

    Attributes:
        places: (N,) of the batch's real tokens in the flattened forward, of ``size`` tokens. counted: of those that
            are counted.
        outputs: flattened output of each layer's MLP, by layer. last: of the last layer run.
        tokens: rows of the counted tokens at every activation site; :meth:`Capture.backward` adds the gradient sites.
        observe: given those of each site as they come; none of them are kept then.
    """

    places: Tensor
    size: int
    counted: Tensor
    outputs: dict[int, Tensor]
    last: Tensor
    tokens: Tokens
    observe: Callable[[Tokens], object] | None = None

    def real(self, rows: Tensor) -> Tensor:
        """(N, D) of the real tokens, from a flattened output."""
        return rows.index_select(0, self.places.to(rows.device))

    def mlp_outputs(self, layers: Iterable[int]) -> dict[int, Tensor]:
        """MLP outputs (N, D) at the real tokens of the batch."""
        return {layer: self.real(self.outputs[layer]) for layer in layers}


class Capture:
    """Trimmed forwards and backwards over the layers 0..last_layer. Made by :func:`capture`."""

    def __init__(self, stack: Stack, last_layer: int) -> None:
        self._stack, self._last_layer = stack, last_layer
        # Makes the outputs of the lowest linears require gradient, as no parameter does; gets none itself.
        self._tap = torch.zeros((), requires_grad=True)
        # The pass under way; None in full forwards, such as a budget check's, of which nothing is kept.
        self._current: Hidden | None = None

    def forward(self, batch: Batch, mask: Tensor, observe: Callable[[Tokens], object] | None = None) -> Hidden:
        """Run ``batch`` through the embedding and the layers 0..last_layer, and nothing above.

        ``mask`` (N,): which of its real tokens are counted, as bools or places. No rows of theirs are kept if
        ``observe`` is given those of each site as they come. Gradient flows unless the caller is in ``no_grad``.
        """
        stack, layers = self._stack, self._stack.layers
        inputs, places = packed_inputs(stack, batch)
        hidden = Hidden(places, inputs["input_ids"].numel(), places[mask], {}, places, {}, observe)

        def keep_mlp(layer: int) -> Callable[..., None]:
            return lambda module, args, output: hidden.outputs.update({layer: _first(output).flatten(0, -2)})

        def keep_last(module: nn.Module, args: Any, output: Any) -> None:
            hidden.last = _one_stream(_first(output)).flatten(0, -2)

        with ExitStack() as undo:
            undo.callback(setattr, stack.decoder, stack.attribute, layers)
            setattr(stack.decoder, stack.attribute, layers[: self._last_layer + 1])
            for layer, mlp in enumerate(stack.mlps[: self._last_layer + 1]):
                if mlp.module is not None:
                    undo.callback(mlp.module.register_forward_hook(keep_mlp(layer)).remove)
            undo.callback(layers[self._last_layer].register_forward_hook(keep_last).remove)
            undo.enter_context(self._recording(hidden))
            stack.run(**inputs)
        return hidden

    def backward(self, loss: Tensor, hidden: Hidden) -> Tokens:
        """Backpropagate ``loss`` of the forward that left ``hidden``; its tokens (T, width) at every site.

        No weight gradient is computed, and no parameter's ``.grad`` is touched.
        """
        with self._recording(hidden):
            torch.autograd.grad(loss, self._tap, allow_unused=True)
        return hidden.tokens

    @contextmanager
    def _recording(self, hidden: Hidden) -> Iterator[None]:
        self._current = hidden
        try:
            yield
        finally:
            self._current = None

    def _record(self, site: Site, rows: Tensor, of: Tensor | None = None) -> None:
        """``of``: a parameter, whose part it is of the columns of ``rows``."""
        hidden = self._current
        if hidden is None or site.name in hidden.tokens:
            return
        rows = rows.detach() if site.experts else rows.detach().flatten(0, -2)
        rows = rows.index_select(0, hidden.counted.to(rows.device))
        if of is not None:
            rows = gathered(rows, of, site.width)
        if hidden.observe is not None:
            routes = {site.routes: hidden.tokens[site.routes]} if site.experts else {}
            hidden.observe({site.name: rows, **routes})
            rows = rows[:0].clone()  # seen; linears that read one site share it
        hidden.tokens[site.name] = rows

    def _tapped(self, target: Target) -> Callable[[Tensor], Tensor]:
        """What takes the place of the target's forward."""

        parameter = target.parameter
        if is_sharded(parameter) and target.owner is None:
            return self._tapped_parallel(target, parameter)

        def record(grad: Tensor) -> None:
            self._record(target.gradient, grad)

        base: Callable[[Tensor], Tensor] = target.linear.forward

        def forward(x: Tensor) -> Tensor:
            self._record(target.activation, x)
            if target.delta is not None:
                return base(x) + TappedLinear.apply(x, self._tap, target.weight, None, record)
            # The weight as it is now: in a forward, FSDP has it gathered.
            return TappedLinear.apply(x, self._tap, matrix_of(target.linear), target.bias, record)

        return forward

    def _tapped_parallel(self, target: Target, parameter: Tensor) -> Callable[[Tensor], Tensor]:
        """The same of a linear that is tensor parallel."""
        by_row = cast(Split, target.split).dim == 0
        group = group_of(parameter)

        def record(grad: Tensor) -> None:
            self._record(target.gradient, grad, parameter if by_row else None)

        def forward(x: Tensor) -> Tensor:
            self._record(target.activation, x, None if by_row else parameter)
            bias = None if target.bias is None else local(target.bias)
            return parallel_linear(x, self._tap, local(parameter), bias, record, group, by_row)

        return forward

    def _tapped_experts(self, experts: nn.Module, targets: Sequence[Target]) -> Callable[..., Tensor]:
        """The same of a module of experts, of which some or all are ``targets``."""
        sites = {tap: site for target in targets for tap, site in zip(target.taps, target.sites, strict=True)}
        routes = next(site.routes for site in sites.values() if site.experts)

        def record(tap: str, rows: Tensor) -> None:
            hidden = self._current
            if hidden is None:
                return
            if len(rows) != hidden.size:
                raise ValueError(
                    f"{routes}: expected experts that are given all {hidden.size} tokens, got {len(rows)}"
                )
            if tap == "routes":
                hidden.tokens.setdefault(routes, rows.index_select(0, hidden.counted.to(rows.device)))
            elif tap in sites:
                self._record(sites[tap], rows)

        def routed(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return run_experts(experts, x, top_k_index, top_k_weights, self._tap, record)

        def unrouted(x: Tensor) -> Tensor:
            return run_all_experts(experts, x, self._tap, record)

        return unrouted if runs_all(experts) else routed


@dataclass
class Below:
    """What the layers below the lowest target say of a batch; they are run once, as they do not change.

    Attributes:
        inputs: of the model. places: (N,) of the batch's real tokens in the flattened forward.
        hidden: what the last of those layers put out; None where there are none. beside: what it put out with it,
            where it does put out a tuple.
    """

    inputs: dict[str, Tensor]
    places: Tensor
    hidden: Tensor | None = None
    beside: tuple[Any, ...] | None = None

    @property
    def alone(self) -> bool:
        """Whether hidden states are all that the layers above take from those below."""
        return all(value is None for value in self.beside or ())


class AnswerCapture(Capture):
    """Forwards that end in the logits of the tokens asked for, and backwards no deeper than the lowest target.

    Made by :func:`answering`.
    """

    def __init__(self, model: nn.Module, stack: Stack, first_layer: int) -> None:
        super().__init__(stack, len(stack.mlps) - 1)
        self._model, self._first, self._written = model, first_layer, stack.writers(first_layer)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            raise ValueError(f"expected a model with an LM head, got {type(model).__name__} without")
        self._head: nn.Module = head

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self._model.device)

    @property
    def mlps(self) -> list[Target]:
        """The linears of the MLPs of all layers that are not below."""
        return [target for mlp in self._stack.mlps[self._first :] for target in mlp.targets]

    @property
    def weights(self) -> list[Tensor]:
        """All parameters and buffers of the model; none where it is sharded, as they lie now here, now there."""
        return [] if self._stack.root is not None else [*self._model.parameters(), *self._model.buffers()]

    @torch.no_grad()
    def below(self, batch: Batch, known: Tensor | None = None) -> Below:
        """Run ``batch`` through the layers below the lowest target, unless what the last of these says of its real
        tokens is ``known`` (N, width), and is all that it says.
        """
        inputs, places = packed_inputs(self._stack, batch)
        below = Below(inputs, places)
        if self._first == 0:
            return below
        if known is not None:
            hidden = known.new_zeros(inputs["input_ids"].numel(), known.shape[1])
            hidden[places.to(known.device)] = known
            below.hidden = hidden.view(*inputs["input_ids"].shape, -1)
            return below
        stack, layers = self._stack, self._stack.layers

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            below.hidden, *beside = output if isinstance(output, tuple | list) else (output,)
            _one_stream(below.hidden)
            below.beside = tuple(beside) if isinstance(output, tuple | list) else None

        with ExitStack() as undo:
            undo.callback(setattr, stack.decoder, stack.attribute, layers)
            setattr(stack.decoder, stack.attribute, layers[: self._first])
            undo.callback(layers[self._first - 1].register_forward_hook(keep).remove)
            stack.run(**inputs)
        return below

    def predict(self, below: Below, at: Tensor, keep: bool = True) -> tuple[Tensor, Hidden]:
        """Logits (T, vocabulary) of what follows the real tokens ``at`` (T,), whose rows of the targets' inputs are
        kept unless ``keep`` is False. The LM head is run on these alone.
        """
        counted = below.places[at]
        hidden = Hidden(below.places, below.inputs["input_ids"].numel(), counted, {}, counted, {})
        lower = below.hidden if below.beside is None else (below.hidden, *below.beside)

        def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            rows = args[0].flatten(0, -2).index_select(0, counted.to(args[0].device))
            return (rows[None], *args[1:])

        with ExitStack() as undo:
            undo.callback(self._head.register_forward_pre_hook(select).remove)
            if self._first:  # the layers stay in their places, whose numbers and kinds the decoder may look up
                for layer in self._stack.layers[: self._first]:
                    undo.enter_context(ungathered(layer))
                    replace_forward(undo, layer, lambda *args, **given: lower)
            if keep:
                undo.enter_context(self._recording(hidden))
            logits = self._model(**below.inputs, use_cache=False).logits[0]
        if logits.ndim != 2 or len(logits) != len(counted):
            raise ValueError(f"expected logits ({len(counted)}, vocabulary), got {tuple(logits.shape)}")
        return logits, hidden

    def backward(self, loss: Tensor, hidden: Hidden) -> Tokens:
        """As :meth:`Capture.backward`.

        Raises:
            ValueError: if a linear that is to change is not run, such as that of attention to an encoder.
        """
        tokens = super().backward(loss, hidden)
        for target in self._written:
            if any(site.name not in tokens for site in target.sites):
                raise ValueError(f"{target.name}: expected a linear that is run for every token, got one that is not")
        return tokens


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _one_stream(hidden: Tensor) -> Tensor:
    if hidden.ndim != 3:
        raise ValueError(
            f"expected layers that put out (batch, tokens, width), got {tuple(hidden.shape)}: models whose residual "
            "stream has further axes are not supported"
        )
    return hidden


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode, no parameter requiring gradient, and neither ``no_grad``, ``inference_mode`` nor
    autocast of the caller in force; on exit modes, ``requires_grad`` and ``.grad`` are as they were, whatever was
    trained meanwhile.
    """
    with ExitStack() as undo:
        keep_packed(undo, model)
        reshard(model)
        undo.callback(reshard, model)  # what FSDP has gathered requires no gradient
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        for device in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
            undo.enter_context(torch.autocast(device, enabled=False))
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        for parameter in model.parameters():
            undo.callback(setattr, parameter, "grad", parameter.grad)
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        yield


@contextmanager
def capture(
    model: nn.Module, stack: Stack, last_layer: int, targets: Sequence[Target] | None = None
) -> Iterator[Capture]:
    """Tap ``targets``, by default all MLP linears of the layers 0..last_layer, for the duration of the context.

    Within it the model is in eval mode and no parameter requires gradient; full forwards still work. On exit,
    by exception too, forwards, hooks, ``requires_grad`` and train modes are as they were.

    Raises:
        RuntimeError: if another capture of the same linears is active.
    """
    tape = Capture(stack, last_layer)
    with _tapping(model, tape, stack.targets(last_layer) if targets is None else targets):
        yield tape


@contextmanager
def answering(model: nn.Module, stack: Stack, first_layer: int) -> Iterator[AnswerCapture]:
    """Tap the :meth:`Stack.writers` of the layers ``first_layer`` and above, and their MLPs; else as :func:`capture`.

    Raises:
        RuntimeError: as :func:`capture`. ValueError: if the model has no LM head.
    """
    tape = AnswerCapture(model, stack, first_layer)
    written = tape._written
    with _tapping(model, tape, [*written, *(target for target in tape.mlps if target not in written)]):
        yield tape


@contextmanager
def _tapping(model: nn.Module, tape: Capture, targets: Sequence[Target]) -> Iterator[None]:
    with ExitStack() as undo:
        undo.enter_context(frozen(model))
        of_module: dict[nn.Module, list[Target]] = {}
        for target in targets:
            of_module.setdefault(target.linear, []).append(target)
        for module, own in of_module.items():
            if getattr(module.__dict__.get("forward"), "__module__", None) == __name__:
                raise RuntimeError(f"{own[0].gradient.name}: already captured by another engine")
            experts = own[0].experts
            replace_forward(undo, module, tape._tapped_experts(module, own) if experts else tape._tapped(own[0]))
        for norm, forward in fused_norms(model):
            replace_forward(undo, norm, forward)
        yield
