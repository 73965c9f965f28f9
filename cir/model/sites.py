"""Where a model is tapped and edited: its layers' MLPs and what their attentions put out, found by structure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses import FakeTensor

EDITABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Site:
    """A tap on activations or output gradients: rows of ``width`` numbers, one a token."""

    name: str
    width: int
    kind: str
    """``"activation"`` or ``"gradient"``."""


@dataclass(frozen=True)
class Target:
    """A linear to be edited, with the sites of its input A (T, D_in) and output gradient G (T, D_out)."""

    linear: nn.Module
    activation: Site
    gradient: Site

    @property
    def parameter(self) -> nn.Parameter:
        """Its weight as the model keeps it."""
        return cast(nn.Parameter, self.linear.weight)

    @property
    def weight(self) -> torch.Tensor:
        """Its weight (D_out, D_in): the parameter, or a view of it; what is written there changes the model."""
        return matrix_of(self.linear)

    @property
    def bias(self) -> torch.Tensor | None:
        return cast("torch.Tensor | None", self.linear.bias)

    @property
    def name(self) -> str:
        """The linear's name within the model."""
        return self.gradient.name.removesuffix(".out")


@dataclass(frozen=True)
class MLP:
    """The MLP of one decoder layer: gate, up (in the order the module declares them) and down; the two in one, and
    down; or plain up and down. What reads one input has one activation site.
    """

    targets: tuple[Target, ...]

    @property
    def down(self) -> Target:
        """What it says: the linear from its width to the hidden size."""
        return self.targets[-1]

    @property
    def linears(self) -> set[nn.Module]:
        return {target.linear for target in self.targets}


@dataclass(frozen=True)
class Stack:
    """The decoder of a model: the module that runs its layers, and each layer's MLP."""

    decoder: nn.Module
    attribute: str
    """Name under which ``decoder`` holds its list of layers."""
    mlps: tuple[MLP, ...]
    path: str
    """The model's own name of that list."""

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.decoder, self.attribute)

    def targets(self, last_layer: int) -> list[Target]:
        """The linears of layers 0..last_layer: all that a loss on those layers sends gradient to."""
        return [target for mlp in self.mlps[: last_layer + 1] for target in mlp.targets]

    def writers(self, first_layer: int) -> list[Target]:
        """The linears of layers first_layer and above that write to the residual stream, lowest first: the output
        projections of attention and MLP.

        Raises:
            ValueError: if a layer has no such projection of its attention, or one that cannot be edited.
        """
        found = []
        for number in range(first_layer, len(self.mlps)):
            found += [self._attention_output(number), self.mlps[number].down]
        _check_editable(found)
        return found

    def _attention_output(self, number: int) -> Target:
        """The last linear into the residual stream in a module that the layer declares beside its MLP."""
        mlp = self.mlps[number]
        width = mlp.down.gradient.width
        linears = [
            (name, module)
            for name, module in self.layers[number].named_modules()
            if is_linear(module) and "." in name and module not in mlp.linears and len(matrix_of(module)) == width
        ]
        if not linears:
            raise ValueError(
                f"{self.path}.{number}: expected an attention whose output projection is a linear into {width}, the "
                f"hidden size, got none in {type(self.layers[number]).__name__}"
            )
        name, linear = linears[-1]
        name = f"{self.path}.{number}.{name}"
        read = Site(f"{name}.in", matrix_of(linear).shape[1], "activation")
        return Target(linear, read, Site(f"{name}.out", width, "gradient"))


def sites_of(targets: Sequence[Target]) -> list[Site]:
    """The distinct sites of ``targets``, in order: two of activations and three of gradients a gated MLP."""
    pairs = ((t.activation, t.gradient) for t in targets)
    return list(dict.fromkeys(site for pair in pairs for site in pair))


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies rows with a matrix: nn.Linear, or Conv1D of transformers, as GPT-2 has it."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix_of(linear: nn.Module) -> torch.Tensor:
    """The weight (D_out, D_in) of what :func:`is_linear`; Conv1D keeps the transpose."""
    weight = cast(torch.Tensor, linear.weight)
    return weight if isinstance(linear, nn.Linear) else weight.T


def unwrapped(model: Any) -> Any:
    """The model that ``torch.compile``, DataParallel or DistributedDataParallel wraps: its parameters are the same,
    and its own names are those of its checkpoints.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def find_stack(model: nn.Module) -> Stack:
    """Find the decoder layers of a causal LM and the MLP in each.

    An MLP is known by its shape and not by its name: a module, or the layer itself, whose own linears are a down
    projection F -> D, and two D -> F (Llama, Mistral, Qwen, Gemma), one D -> 2F (Phi-3, GLM-4) or one D -> F
    (GPT-NeoX, OPT, Falcon, Phi, StarCoder2).

    Raises:
        ValueError: if the model has no such MLP in every decoder layer, or experts beside it, if its weights are
            quantized, on the meta device, shared between layers or made of others, or if it has adapters or is
            compiled in part or in place.
    """
    _check_as_it_is(model)
    root, found = _found_mlps(model)
    if not found:
        raise ValueError(
            f"expected decoder layers with an MLP of linears, D -> F, 2F or twice F and F -> D, got none in "
            f"{type(model).__name__}"
        )
    modules = dict(root.named_modules())
    holder = max(found, key=lambda h: len(found[h]))
    missing = [i for i in range(len(list(modules[holder].children()))) if i not in found[holder]]
    if missing:
        raise ValueError(f"expected an MLP of linears in every layer of {holder}, got none in {missing}")
    prefix = next(name for name, module in model.named_modules() if module is root)
    mlps = tuple(
        _mlp(f"{prefix}.{name}".lstrip("."), modules[name], order)
        for _, (name, order) in sorted(found[holder].items())
    )
    _check_editable([target for mlp in mlps for target in mlp.targets])
    parent, _, attribute = holder.rpartition(".")
    if "input_ids" not in signature(modules[parent].forward).parameters:
        raise ValueError(f"expected layers that are run on input_ids, got those of {type(modules[parent]).__name__}")
    return Stack(modules[parent], attribute, mlps, f"{prefix}.{holder}".lstrip("."))


def _check_as_it_is(model: nn.Module) -> None:
    """That what is tapped is what runs, and what is saved."""
    compiled = next((name for name, module in model.named_modules() if _is_compiled(module)), None)
    if compiled is not None:
        raise ValueError(
            f"expected a model as it is, or torch.compile(model) of it, got {compiled or 'all of it'!r} compiled in "
            "place, which would not run what is tapped"
        )
    adapter = next((module for module in model.modules() if type(module).__module__.startswith("peft.")), None)
    if adapter is not None:
        raise ValueError(
            f"expected a model without adapters, got a {type(adapter).__name__} of peft: what changes beneath would "
            "be lost, as adapters are saved without it; merge_and_unload() first"
        )


def _found_mlps(model: nn.Module) -> tuple[nn.Module, dict[str, dict[int, tuple[str, list[str]]]]]:
    """The decoder, and in it, by list of layers and layer, the MLP's name and those of its linears."""
    find_decoder = getattr(model, "get_decoder", None)
    decoder: nn.Module = find_decoder() if callable(find_decoder) else model
    found: dict[str, dict[int, tuple[str, list[str]]]] = defaultdict(dict)
    # Some models call their LM head the decoder.
    root = decoder if any(_layer_of(name) for name, _ in decoder.named_modules()) else model
    width = _hidden_size(model)
    for name, module in root.named_modules():
        place = _layer_of(name)
        if place is None:
            continue
        _check_dense(name, module, width)
        holder, layer = place
        if (order := _linears_of_mlp(module, width)) is None:
            continue
        # A layer's own linears are its MLP where no module in it is.
        if layer in found[holder] and found[holder][layer][0] != f"{holder}.{layer}":
            raise ValueError(
                f"expected one MLP in decoder layer {holder}.{layer}, got {found[holder][layer][0]} and {name} "
                "(mixtures of experts are not supported)"
            )
        found[holder][layer] = name, order
    return root, found


def _layer_of(name: str) -> tuple[str, int] | None:
    """The list of layers in which a module of that name is, and the number of its layer."""
    path = name.split(".")
    index = next((i for i, part in enumerate(path) if part.isdigit()), None)
    return None if index is None else (".".join(path[:index]), int(path[index]))


def _check_dense(name: str, module: nn.Module, width: int | None) -> None:
    """That a module of a layer is of no experts, which are told by their name, or by weights that are a stack of
    matrices from or to the residual stream.
    """
    shapes = (
        [] if isinstance(module, nn.modules.conv._ConvNd) else [p.shape for p in module.parameters(recurse=False)]
    )
    stacked = any(len(shape) == 3 and shape[0] > 1 and width in shape[1:] for shape in shapes)
    if stacked or "experts" in name.split("."):
        raise ValueError(
            f"expected a dense model, got experts in {name}: mixtures of experts are not supported, of which one "
            "that all tokens share would change alone"
        )


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _hidden_size(model: nn.Module) -> int | None:
    """Numbers of the residual stream a token, where the model says so."""
    config: Any = getattr(model, "config", None)
    return getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "hidden_size", None)


def _linears_of_mlp(module: nn.Module, width: int | None) -> list[str] | None:
    """Names of the linears that are direct children of an MLP, down last; None of anything else. By shape alone a
    plain MLP could be read both ways round: ``width`` is that of the residual stream.
    """
    linears = {name: matrix_of(child).shape for name, child in module.named_children() if is_linear(child)}
    if len(linears) not in (2, 3) or "attention" in type(module).__name__.lower():
        return None
    for name, (hidden, inner) in linears.items():
        readers = [other for other in linears if other != name]
        if hidden != (width or hidden):
            continue
        widths = (inner,) if len(readers) == 2 else (inner, 2 * inner)
        if inner != hidden and all(linears[r][1] == hidden and linears[r][0] in widths for r in readers):
            return [*readers, name]
    return None


def _mlp(name: str, module: nn.Module, order: list[str]) -> MLP:
    *readers, down = (module.get_submodule(child) for child in order)
    read = Site(f"{name}.in", matrix_of(readers[0]).shape[1], "activation")
    hidden = Site(f"{name}.{order[-1]}.in", matrix_of(down).shape[1], "activation")

    def target(child: str, linear: nn.Module, site: Site) -> Target:
        return Target(linear, site, Site(f"{name}.{child}.out", len(matrix_of(linear)), "gradient"))

    read_by = [target(child, linear, read) for child, linear in zip(order, readers, strict=False)]
    return MLP((*read_by, target(order[-1], down, hidden)))


def _check_editable(targets: Sequence[Target]) -> None:
    seen: dict[int, str] = {}
    for target in targets:
        weight, name = target.parameter, target.name
        if weight.dtype not in EDITABLE_DTYPES or not _is_plain(target):
            raise ValueError(
                f"{name}: expected an nn.Linear with a weight of float32, bfloat16 or float16, got "
                f"{type(target.linear).__name__} with {weight.dtype}; load the model without quantization"
            )
        if target.linear._parameters.get("weight") is not weight or not _is_ordinary(weight):
            raise ValueError(
                f"{name}: expected a weight that is an ordinary parameter, got {type(weight).__name__}; one that is "
                "made of others (weight_norm, pruning, a tensor subclass) would be made anew, without what changed"
            )
        if weight.device.type == "meta":
            raise ValueError(f"{name}: expected a weight with data, got one on the meta device")
        if id(weight) in seen:
            raise ValueError(f"expected a weight of its own in each linear, got {name} sharing {seen[id(weight)]}'s")
        seen[id(weight)] = name


@torch.no_grad()
def _is_plain(target: Target) -> bool:
    """Whether it does what nn.Linear does, up to rounding: a subclass may."""
    linear, weight = target.linear, target.weight
    if type(linear).forward is nn.Linear.forward or isinstance(weight, FakeTensor):
        return True
    x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    expected, got = nn.functional.linear(x, weight, target.bias), linear(x)
    return isinstance(got, torch.Tensor) and bool((got - expected).norm() <= 2e-2 * expected.norm())


def _is_ordinary(weight: torch.Tensor) -> bool:
    return isinstance(weight, nn.Parameter) and type(weight.data) in (torch.Tensor, FakeTensor)
