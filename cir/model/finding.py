"""Finding the sites of a model, by the structure of its modules and not by their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import nn

from cir.model.linears import is_linear, shape_of
from cir.model.shards import check_whole, owners_of, processes_of
from cir.model.sites import MLP, Site, Stack, Target, check_editable
from cir.model.taps import is_experts, matrices_of, readers_of, runs_all


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


def find_stack(model: nn.Module, *, quantized: bool = False, sharded: bool = False) -> Stack:
    """Find the decoder layers of a causal LM and the MLP in each. ``sharded``: whether it may be over processes.

    An MLP is known by its shape and not by its name: a module, or the layer itself, whose own linears are a down
    projection F -> D, and two D -> F (Llama, Mistral, Qwen, Gemma), one D -> 2F (Phi-3, GLM-4) or one D -> F
    (GPT-NeoX, OPT, Falcon, Phi, StarCoder2). Experts are known by what their module says of itself, and by saying
    the same as :func:`cir.model.taps.run_experts`. ``quantized``: whether linears may be, of which then only deltas
    change, see :func:`cir.model.deltas.with_deltas`.

    Raises:
        ValueError: if the model has no such MLP in every decoder layer, or experts of another kind, if its weights
            are quantized and must not be, on the meta device, shared between layers or made of others, or if it has
            adapters or is compiled in part or in place; if it is sharded and may not be, or not in this way.
    """
    _check_as_it_is(model)
    if not sharded:
        check_whole(model)
    owners = owners_of(model)
    root = None if processes_of(model) is None else model
    base, found = _found_mlps(model)
    if not found:
        raise ValueError(
            f"expected decoder layers with an MLP of linears, D -> F, 2F or twice F and F -> D, got none in "
            f"{type(model).__name__}"
        )
    modules = dict(base.named_modules())
    holder = max(found, key=lambda h: len(found[h]))
    missing = [i for i in range(len(list(modules[holder].children()))) if i not in found[holder]]
    if missing:
        raise ValueError(f"expected an MLP of linears in every layer of {holder}, got none in {missing}")
    prefix = next(name for name, module in model.named_modules() if module is base)
    mlps = tuple(
        _mlp(prefix, modules, f"{holder}.{layer}", found[holder][layer], owners) for layer in sorted(found[holder])
    )
    check_editable([target for mlp in mlps for target in mlp.targets], root, quantized)
    parent, _, attribute = holder.rpartition(".")
    if "input_ids" not in signature(modules[parent].forward).parameters:
        raise ValueError(f"expected layers that are run on input_ids, got those of {type(modules[parent]).__name__}")
    path = f"{prefix}.{holder}".lstrip(".")
    return Stack(modules[parent], attribute, mlps, path, quantized=quantized, root=root, owners=owners)


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


@dataclass
class _Found:
    """In one layer, by their names: the MLP of linears that all tokens share, with its linears, and experts."""

    dense: str | None = None
    linears: list[str] = field(default_factory=list)
    experts: str | None = None


def _found_mlps(model: nn.Module) -> tuple[nn.Module, dict[str, dict[int, _Found]]]:
    """The decoder, and what is in it, by list of layers and layer."""
    find_decoder = getattr(model, "get_decoder", None)
    decoder: nn.Module = find_decoder() if callable(find_decoder) else model
    found: dict[str, dict[int, _Found]] = defaultdict(lambda: defaultdict(_Found))
    # Some models call their LM head the decoder.
    root = decoder if any(_layer_of(name) for name, _ in decoder.named_modules()) else model
    width, experts = _hidden_size(model), ""
    for name, module in root.named_modules():
        place = _layer_of(name)
        if place is None or (experts and name.startswith(f"{experts}.")):
            continue
        holder, layer = place
        if is_experts(module):
            experts = name
            _check_experts(name, module, width, found[holder][layer].experts)
            found[holder][layer].experts = name
            continue
        _check_dense(name, module, width)
        if (order := _linears_of_mlp(module, width)) is None:
            continue
        # A layer's own linears are its MLP where no module in it is.
        if (other := found[holder][layer].dense) not in (None, f"{holder}.{layer}"):
            raise ValueError(
                f"expected one MLP in decoder layer {holder}.{layer}, got {other} and {name} (several that all "
                "tokens share are not supported)"
            )
        found[holder][layer].dense, found[holder][layer].linears = name, order
    return root, found


def _layer_of(name: str) -> tuple[str, int] | None:
    """The list of layers in which a module of that name is, and the number of its layer."""
    path = name.split(".")
    index = next((i for i, part in enumerate(path) if part.isdigit()), None)
    return None if index is None else (".".join(path[:index]), int(path[index]))


def _check_dense(name: str, module: nn.Module, width: int | None) -> None:
    """That a module of a layer is of no experts that are not known, which are told by their name, or by weights that
    are a stack of matrices from or to the residual stream.
    """
    shapes = (
        [] if isinstance(module, nn.modules.conv._ConvNd) else [p.shape for p in module.parameters(recurse=False)]
    )
    stacked = any(len(shape) == 3 and shape[0] > 1 and width in shape[1:] for shape in shapes)
    if stacked or "experts" in name.split("."):
        raise ValueError(
            f"expected a dense model, or experts as transformers has them, got {type(module).__name__} in {name}: "
            "what all tokens share would change alone"
        )


def _check_experts(name: str, module: nn.Module, width: int | None, other: str | None) -> None:
    if other is not None:
        raise ValueError(f"expected one module of experts a layer, got {other} and {name}")
    hidden = matrices_of(module, "down_proj").shape[1]
    read = matrices_of(module, readers_of(module)).shape[2]
    if {hidden, read} != {width or hidden}:
        raise ValueError(
            f"{name}: expected experts from and to {width}, the hidden size, got from {read} to {hidden}"
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
    linears = {name: shape_of(child) for name, child in module.named_children() if is_linear(child)}
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


def _mlp(
    prefix: str, modules: Mapping[str, nn.Module], layer: str, found: _Found, owners: Mapping[nn.Module, nn.Module]
) -> MLP:
    """``prefix``: of the model's own names of ``modules``, by which ``layer`` and what was ``found`` in it are."""

    def own(name: str) -> str:
        return f"{prefix}.{name}".lstrip(".")

    targets, writers, inside = list[Target](), list[Target](), set[nn.Module]()
    block: nn.Module | None = None
    if found.dense is not None:
        targets += _dense(own(found.dense), modules[found.dense], found.linears, owners)
        writers.append(targets[-1])
        inside |= {target.linear for target in targets}
        block = targets[-1].linear
    if found.experts is not None:
        targets += _experts(own(found.experts), modules[found.experts])
        writers.append(targets[-1])
        around = found.experts.rpartition(".")[0]
        whole = around != layer and (found.dense is None or found.dense.startswith(f"{around}."))
        inside |= set(modules[found.experts if around == layer else around].modules())
        block = modules[around] if whole else None
    return MLP(tuple(targets), tuple(writers), block, frozenset(inside))


def _dense(name: str, module: nn.Module, order: list[str], owners: Mapping[nn.Module, nn.Module]) -> list[Target]:
    *readers, down = (module.get_submodule(child) for child in order)
    read = Site(f"{name}.in", shape_of(readers[0])[1], "activation")
    hidden = Site(f"{name}.{order[-1]}.in", shape_of(down)[1], "activation")

    def target(child: str, linear: nn.Module, site: Site) -> Target:
        gradient = Site(f"{name}.{child}.out", shape_of(linear)[0], "gradient")
        return Target(linear, site, gradient, f"{name}.{child}.weight", owner=owners.get(linear))

    read_by = [target(child, linear, read) for child, linear in zip(order, readers, strict=False)]
    return [*read_by, target(order[-1], down, hidden)]


def _experts(name: str, module: nn.Module) -> list[Target]:
    reader, routes = readers_of(module), f"{name}.routes"
    (count, inner, width), hidden = matrices_of(module, reader).shape, matrices_of(module, "down_proj").shape[2]
    up = Target(
        module,
        Site(f"{name}.in", width, "activation", *((count, routes) if runs_all(module) else ())),
        Site(f"{name}.{reader}.out", inner, "gradient", count, routes),
        f"{name}.{reader}",
    )
    down = Target(
        module,
        Site(f"{name}.down_proj.in", hidden, "activation", count, routes),
        Site(f"{name}.down_proj.out", width, "gradient"),
        f"{name}.down_proj",
    )
    return [up, down]
