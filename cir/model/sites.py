"""Where a model is tapped and edited: its layers' MLPs and what their attentions put out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from cir.model.shards import Split, check_plan, is_sharded, local, replace_forward
from cir.model.taps import hit, matrices_of, run_experts

EDITABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Site:
    """A tap on activations or output gradients: rows of ``width`` numbers, one a token; or, where there are
    ``experts``, (T, k, width), one for each of the experts to which the rows (T, k) called ``routes`` lead.
    """

    name: str
    width: int
    kind: str
    """``"activation"`` or ``"gradient"``."""
    experts: int = 0
    routes: str = ""

    def of_expert(self, number: int) -> Site:
        """The rows (n, width) of one expert alone."""
        return replace(self, name=f"{self.name}.{number}", experts=0, routes="")

    def spread(self, tokens: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Its rows among ``tokens``, with the name of the site; of experts those of each that some lead to."""
        rows = tokens[self.name]
        if not self.experts:
            yield self.name, rows
            return
        for number, _, places in hit(tokens[self.routes], self.experts):
            yield self.of_expert(number).name, rows.flatten(0, 1)[places]


class Part(NamedTuple):
    """One matrix of a target, and its rows: the gradient of ``weight`` (D_out, D_in) is ``gradient``^T
    ``activation``. ``number``: of its expert, else 0. Of a target that is divided over processes the part that is
    here, from the row or column ``start`` on, and the columns of the rows that change it.
    """

    number: int
    name: str
    weight: Tensor
    gradient: Tensor
    activation: Tensor
    start: int = 0


@dataclass(frozen=True)
class Target:
    """A linear to be edited, with the sites of its input A (T, D_in) and output gradient G (T, D_out); or all
    experts of a layer, E matrices (D_out, D_in) in one parameter. ``owner``: the module of FSDP, if any, that gathers
    what it is divided in.
    """

    linear: nn.Module
    activation: Site
    gradient: Site
    parameter_name: str
    """Within the model."""
    owner: nn.Module | None = None

    @property
    def sites(self) -> tuple[Site, Site]:
        return self.activation, self.gradient

    @property
    def experts(self) -> int:
        """How many there are; 0 of a linear."""
        return self.activation.experts or self.gradient.experts

    @property
    def names(self) -> list[str]:
        """Of its matrices: its own, or one for each expert."""
        return [f"{self.name}.{number}" for number in range(self.experts)] or [self.name]

    @property
    def parameter(self) -> nn.Parameter:
        """Its weight as the model keeps it: between forwards, where FSDP gathers it for these."""
        if self.owner is not None:
            self.owner.reshard()  # type: ignore[operator]
        return cast(nn.Parameter, getattr(self.linear, self.parameter_name.rpartition(".")[2]))

    @property
    def weight(self) -> Tensor:
        """Its weight (D_out, D_in), of experts (E, D_out, D_in), or the part of it that is here: the parameter, or a
        view of it; what is written there changes the model.
        """
        if self.experts:
            return matrices_of(self.linear, self.parameter_name.rpartition(".")[2])
        kept = local(self.parameter)
        return kept if isinstance(self.linear, nn.Linear) else kept.T

    @property
    def split(self) -> Split | None:
        """Which part of its matrix (D_out, D_in) is here; None if it is whole."""
        return Split.of(self.parameter)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.linear.bias)

    @property
    def name(self) -> str:
        """The linear's name within the model."""
        return self.gradient.name.removesuffix(".out")

    def part(self, name: str) -> Tensor:
        """The matrix (D_out, D_in) of that name, one of its :attr:`names`."""
        return self.weight[int(name.rpartition(".")[2])] if self.experts else self.weight

    def parts(self, tokens: Mapping[str, Tensor]) -> Iterator[Part]:
        """Its matrices that ``tokens`` change, each with its rows."""
        g, a = tokens[self.gradient.name], tokens[self.activation.name]
        if not self.experts:
            split = self.split
            if split is None:
                yield Part(0, self.name, self.weight, g, a)
            elif split.start < split.stop:  # of few rows there may be none here
                own = slice(split.start, split.stop)
                g, a = (g[:, own], a) if split.dim == 0 else (g, a[:, own])
                yield Part(0, self.name, self.weight, g, a, split.start)
            return
        weight = self.weight
        for number, of_tokens, places in hit(tokens[self.gradient.routes or self.activation.routes], self.experts):
            own_g, own_a = (
                x.flatten(0, 1)[places] if site.experts else x[of_tokens]
                for site, x in ((self.gradient, g), (self.activation, a))
            )
            yield Part(number, f"{self.name}.{number}", weight[number], own_g, own_a)


@dataclass(frozen=True)
class MLP:
    """The MLP of one decoder layer: gate, up (in the order the module declares them) and down; the two in one, and
    down; or plain up and down. What reads one input has one activation site. Of a mixture of experts first those of
    what all tokens share, if anything, and then those of the experts.

    Attributes:
        targets: all of them. writers: those that write to the residual stream.
        module: whose output is all that it says; None where two modules write apart.
        inside: all modules that are part of it.
    """

    targets: tuple[Target, ...]
    writers: tuple[Target, ...]
    module: nn.Module | None
    inside: frozenset[nn.Module]

    @property
    def down(self) -> Target:
        """What it says: the linear from its width to the hidden size; the experts', where there are."""
        return self.writers[-1]


@dataclass(frozen=True)
class Stack:
    """The decoder of a model: the module that runs its layers, and each layer's MLP."""

    decoder: nn.Module
    attribute: str
    """Name under which ``decoder`` holds its list of layers."""
    mlps: tuple[MLP, ...]
    path: str
    """The model's own name of that list."""
    root: nn.Module | None = None
    """The model, where it is sharded: what FSDP gathers for its forward, others of its modules read too."""
    owners: Mapping[nn.Module, nn.Module] = field(default_factory=dict)
    """See :func:`cir.model.shards.owners_of`."""

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.decoder, self.attribute)

    def run(self, **inputs: Any) -> Any:
        """What the decoder says."""
        if self.root is None:
            return self.decoder(**inputs, use_cache=False)
        with ExitStack() as undo:
            replace_forward(undo, self.root, lambda: self.decoder(**inputs, use_cache=False))
            return self.root()

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
            found += [self._attention_output(number), *self.mlps[number].writers]
        check_editable(found, self.root)
        return found

    def _attention_output(self, number: int) -> Target:
        """The last linear into the residual stream in a module that the layer declares beside its MLP."""
        mlp = self.mlps[number]
        width = mlp.down.gradient.width
        linears = [
            (name, module)
            for name, module in self.layers[number].named_modules()
            if is_linear(module) and "." in name and module not in mlp.inside and len(matrix_of(module)) == width
        ]
        if not linears:
            raise ValueError(
                f"{self.path}.{number}: expected an attention whose output projection is a linear into {width}, the "
                f"hidden size, got none in {type(self.layers[number]).__name__}"
            )
        name, linear = linears[-1]
        name = f"{self.path}.{number}.{name}"
        read = Site(f"{name}.in", matrix_of(linear).shape[1], "activation")
        written = Site(f"{name}.out", width, "gradient")
        return Target(linear, read, written, f"{name}.weight", self.owners.get(linear))


def sites_of(targets: Sequence[Target]) -> list[Site]:
    """The distinct sites of ``targets``, in order: two of activations and three of gradients a gated MLP."""
    return list(dict.fromkeys(site for target in targets for site in target.sites))


def names_of(sites: Sequence[Site]) -> list[str]:
    """Under which their rows are among the tokens, and which experts these are of."""
    return list(dict.fromkeys(name for site in sites for name in (site.name, site.routes) if name))


def apart(sites: Sequence[Site]) -> list[Site]:
    """Those of each expert in place of those of all experts of a layer."""
    return [
        one
        for site in sites
        for one in ([site.of_expert(number) for number in range(site.experts)] if site.experts else [site])
    ]


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


def check_editable(targets: Sequence[Target], root: nn.Module | None = None) -> None:
    """``root``: the model, where it is sharded."""
    seen: dict[int, str] = {}
    for target in targets:
        weight, name = target.parameter, target.name
        if root is not None and (split := target.split) is not None:
            if type(target.linear).forward is not nn.Linear.forward:
                raise ValueError(
                    f"{name}: expected an nn.Linear in a model sharded over processes, got "
                    f"{type(target.linear).__name__}"
                )
            if target.owner is None:
                check_plan(root, name, split)
        if weight.dtype not in EDITABLE_DTYPES or not _is_plain(target):
            raise ValueError(
                f"{name}: expected an nn.Linear with a weight of float32, bfloat16 or float16, got "
                f"{type(target.linear).__name__} with {weight.dtype}; load the model without quantization"
            )
        if not _is_ordinary(weight) or not any(own is weight for own in target.linear._parameters.values()):
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
    """Whether it does what nn.Linear does, or :func:`run_experts`, up to rounding: a subclass may."""
    linear, weight = target.linear, target.weight
    if type(linear).forward is nn.Linear.forward or isinstance(weight, FakeTensor) or weight.device.type == "meta":
        return True
    width = target.activation.width
    x = torch.linspace(-1, 1, 4 * width, dtype=weight.dtype, device=weight.device).view(4, width)
    if target.experts:
        if target.activation.experts:
            return True  # tried with what reads
        routes = torch.arange(8, device=weight.device).view(4, 2) % target.experts
        shares = torch.linspace(0.2, 0.8, 8, dtype=weight.dtype, device=weight.device).view(4, 2)
        expected, got = run_experts(linear, x, routes, shares), linear(x, routes, shares)
    else:
        expected, got = nn.functional.linear(x, weight, target.bias), linear(x)
    return isinstance(got, Tensor) and bool((got - expected).norm() <= 2e-2 * expected.norm())


def _is_ordinary(weight: Tensor) -> bool:
    return isinstance(weight, nn.Parameter) and (is_sharded(weight) or type(weight.data) in (Tensor, FakeTensor))
