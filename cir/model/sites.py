"""Where a model is tapped and edited: its decoder layers' gated MLPs and what their attentions put out, found by
structure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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

    linear: nn.Linear
    activation: Site
    gradient: Site

    @property
    def name(self) -> str:
        """The linear's name within the model."""
        return self.gradient.name.removesuffix(".out")


@dataclass(frozen=True)
class MLP:
    """The gated MLP of one decoder layer. Gate and up read one input, hence one activation site."""

    module: nn.Module
    targets: tuple[Target, Target, Target]
    """gate, up (in the order the module declares them) and down."""


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
            found += [self._attention_output(number), self.mlps[number].targets[2]]
        _check_editable(found)
        return found

    def _attention_output(self, number: int) -> Target:
        """The last linear into the residual stream that the layer declares outside its MLP."""
        mlp = self.mlps[number]
        width = mlp.targets[2].linear.out_features
        inside = set(mlp.module.modules())
        linears = [
            (name, module)
            for name, module in self.layers[number].named_modules()
            if isinstance(module, nn.Linear) and module not in inside and module.out_features == width
        ]
        if not linears:
            raise ValueError(
                f"{self.path}.{number}: expected an attention whose output projection is a linear into {width}, the "
                f"hidden size, got none in {type(self.layers[number]).__name__}"
            )
        name, linear = linears[-1]
        name = f"{self.path}.{number}.{name}"
        read = Site(f"{name}.in", linear.in_features, "activation")
        return Target(linear, read, Site(f"{name}.out", linear.out_features, "gradient"))


def sites_of(targets: Sequence[Target]) -> list[Site]:
    """The distinct sites of ``targets``, in order: two of activations and three of gradients an MLP."""
    pairs = ((t.activation, t.gradient) for t in targets)
    return list(dict.fromkeys(site for pair in pairs for site in pair))


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
    """Find the decoder layers of a causal LM and the gated MLP (gate, up, down) in each.

    An MLP is known by its shape and not by its name: a module with exactly three linears, two D -> F and one
    F -> D. So Llama, Mistral, Qwen and Gemma dense models are all found.

    Raises:
        ValueError: if the model has no such MLP in every decoder layer, or experts beside it, if its weights are
            quantized, on the meta device, shared between layers or made of others, or if it has adapters or is
            compiled in part or in place.
    """
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
    find_decoder = getattr(model, "get_decoder", None)
    root: nn.Module = find_decoder() if callable(find_decoder) else model
    found: dict[str, dict[int, tuple[str, nn.Module, list[str]]]] = defaultdict(dict)
    modules = dict(root.named_modules())
    for name, module in modules.items():
        order = _gated_linears(module)
        if order is None:
            continue
        path = name.split(".")
        index = next((i for i, part in enumerate(path) if part.isdigit()), None)
        if index is None:
            continue
        holder, layer = ".".join(path[:index]), int(path[index])
        if layer in found[holder]:
            raise ValueError(
                f"expected one gated MLP in decoder layer {holder}.{layer}, got {found[holder][layer][0]} "
                f"and {name} (mixtures of experts are not supported)"
            )
        found[holder][layer] = (name, module, order)
    if not found:
        raise ValueError(
            f"expected decoder layers with a gated MLP (linears D -> F, D -> F and F -> D), got none in "
            f"{type(model).__name__}"
        )
    holder = max(found, key=lambda h: len(found[h]))
    missing = [i for i in range(len(list(modules[holder].children()))) if i not in found[holder]]
    if missing:
        raise ValueError(f"expected a gated MLP in every layer of {holder}, got none in {missing}")
    experts = [name for name in modules if "experts" in name.split(".")]
    if experts:
        raise ValueError(
            f"expected a dense model, got experts in {experts[0]}: mixtures of experts are not supported, of which "
            "one that all tokens share would change alone"
        )
    prefix = next(name for name, module in model.named_modules() if module is root)
    mlps = tuple(
        _mlp(f"{prefix}.{name}".lstrip("."), module, order)
        for _, (name, module, order) in sorted(found[holder].items())
    )
    _check_editable([target for mlp in mlps for target in mlp.targets])
    parent, _, attribute = holder.rpartition(".")
    return Stack(modules[parent], attribute, mlps, f"{prefix}.{holder}".lstrip("."))


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _gated_linears(module: nn.Module) -> list[str] | None:
    """Names of the (gate, up, down) linears that are direct children of ``module``, or None."""
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    if len(linears) != 3:
        return None
    names = list(linears)
    for down in names:
        first, second = (name for name in names if name != down)
        shape = (linears[first].in_features, linears[first].out_features)
        same = shape == (linears[second].in_features, linears[second].out_features)
        back = shape == (linears[down].out_features, linears[down].in_features)
        if same and back and shape[0] != shape[1]:
            return [first, second, down]
    return None


def _mlp(name: str, module: nn.Module, order: list[str]) -> MLP:
    gate, up, down = (cast(nn.Linear, module.get_submodule(child)) for child in order)
    read = Site(f"{name}.in", gate.in_features, "activation")
    hidden = Site(f"{name}.{order[2]}.in", down.in_features, "activation")

    def target(child: str, linear: nn.Linear, site: Site) -> Target:
        return Target(linear, site, Site(f"{name}.{child}.out", linear.out_features, "gradient"))

    return MLP(module, (target(order[0], gate, read), target(order[1], up, read), target(order[2], down, hidden)))


def _check_editable(targets: Sequence[Target]) -> None:
    seen: dict[int, str] = {}
    for target in targets:
        weight, name = target.linear.weight, target.name
        if weight.dtype not in EDITABLE_DTYPES or type(target.linear).forward is not nn.Linear.forward:
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


def _is_ordinary(weight: torch.Tensor) -> bool:
    return isinstance(weight, nn.Parameter) and type(weight.data) in (torch.Tensor, FakeTensor)
