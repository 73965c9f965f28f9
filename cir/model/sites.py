"""Where a model is tapped and edited: its layers' MLPs and what their attentions put out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from cir.model.linears import is_linear, linears_run, shape_of
from cir.model.shards import Split, check_plan, is_sharded, local
from cir.model.taps import hit, matrices_of, replace_forward, run_all_experts, run_experts, runs_all
from cir.system.processes import summed

EDITABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


_EXPERT = re.compile(r"(.+)\[(\d+)/(\d+)\]")


def name_of_expert(name: str, number: int, experts: int) -> str:
    """Of what is called ``name``, that of one of so many experts."""
    return f"{name}[{number}/{experts}]"


def expert_of(name: str) -> tuple[str, int, int] | None:
    """What :func:`name_of_expert` was given; None of any other name."""
    found = _EXPERT.fullmatch(name)
    return None if found is None else (found[1], int(found[2]), int(found[3]))


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
        return replace(self, name=name_of_expert(self.name, number, self.experts), experts=0, routes="")

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
class Delta:
    """What is added to a linear that stays as it is, quantized say: y = linear(x) + x ``value``^T.

    Attributes:
        value: (D_out, D_in), which is what changes. norm: the Frobenius norm of the linear's own weight.
    """

    value: nn.Parameter
    norm: float


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
    delta: Delta | None = field(default=None, compare=False)
    """What changes in place of its weight, if anything does: then that is its ``parameter`` and ``weight``."""
    owner: nn.Module | None = None
    """The module of FSDP that gathers its weight, if any does."""

    @property
    def sites(self) -> tuple[Site, Site]:
        return self.activation, self.gradient

    @property
    def taps(self) -> tuple[str, str]:
        """What :func:`cir.model.taps.run_experts` calls these, where there are experts."""
        return ("in", "up.out") if self.gradient.experts else ("down.in", "down.out")

    @property
    def experts(self) -> int:
        """How many there are; 0 of a linear."""
        return self.activation.experts or self.gradient.experts

    @property
    def names(self) -> list[str]:
        """Of its matrices: its own, or one for each expert."""
        experts = [name_of_expert(self.name, number, self.experts) for number in range(self.experts)]
        return experts or [self.name]

    @property
    def parameter(self) -> nn.Parameter:
        """Its weight as the model keeps it: between forwards, where FSDP gathers it for these."""
        if self.delta is not None:
            return self.delta.value
        if self.owner is not None:
            self.owner.reshard()  # type: ignore[operator]
        return cast(nn.Parameter, getattr(self.linear, self.parameter_name.rpartition(".")[2]))

    @property
    def weight(self) -> Tensor:
        """Its weight (D_out, D_in), of experts (E, D_out, D_in), or the part of it that is here: the parameter, or a
        view of it; what is written there changes the model.
        """
        if self.delta is not None:
            return self.delta.value
        if self.experts:
            return matrices_of(self.linear, self.parameter_name.rpartition(".")[2])
        kept = local(self.parameter)
        return kept if isinstance(self.linear, nn.Linear) else kept.T

    @property
    def split(self) -> Split | None:
        """Which part of its matrix (D_out, D_in) is here; None if it is whole."""
        return Split.of(self.parameter)

    def norm(self, dtype: torch.dtype) -> Tensor:
        """The Frobenius norm of the weight that the model came with, a scalar of ``dtype`` on its device."""
        if self.delta is not None:
            return self.parameter.new_tensor(self.delta.norm, dtype=dtype)
        norm = torch.linalg.vector_norm(local(self.parameter), dtype=dtype)
        return norm if self.split is None else summed(norm.square()).sqrt()

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", self.linear.bias)

    @property
    def name(self) -> str:
        """The linear's name within the model."""
        return self.gradient.name.removesuffix(".out")

    def part(self, name: str) -> Tensor:
        """The matrix (D_out, D_in) of that name, one of its :attr:`names`."""
        expert = expert_of(name)
        return self.weight if expert is None else self.weight[expert[1]]

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
            yield Part(number, name_of_expert(self.name, number, self.experts), weight[number], own_g, own_a)


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
    quantized: bool = False
    """Whether its linears may be quantized: then only deltas beside them can change."""
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    """Of the linears that have one, by name."""
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
        check_editable(found, self.root, self.quantized)
        return found

    def _attention_output(self, number: int) -> Target:
        """The last linear into the residual stream that is run in a module of the layer beside its MLP."""
        mlp = self.mlps[number]
        width = mlp.down.gradient.width
        linears = [
            (name, module)
            for name, module in self.layers[number].named_modules()
            if is_linear(module) and "." in name and module not in mlp.inside and shape_of(module)[0] == width
        ]
        if not linears:
            raise ValueError(
                f"{self.path}.{number}: expected an attention whose output projection is a linear into {width}, the "
                f"hidden size, got none in {type(self.layers[number]).__name__}"
            )
        turns = linears_run(self.decoder, self.run)
        name, linear = max(linears, key=lambda found: turns.get(found[1], -1))  # of equals the first is found
        name = f"{self.path}.{number}.{name}"
        read = Site(f"{name}.in", shape_of(linear)[1], "activation")
        written = Site(f"{name}.out", width, "gradient")
        return Target(
            linear, read, written, f"{name}.weight", delta=self.deltas.get(name), owner=self.owners.get(linear)
        )


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


def check_editable(targets: Sequence[Target], root: nn.Module | None = None, quantized: bool = False) -> None:
    """Raise ValueError unless the weights of ``targets`` can be changed; or, with ``quantized``, be left as they are
    while deltas beside them change. ``root``: the model, where it is sharded.
    """
    seen: dict[int, str] = {}
    for target in targets:
        weight, linear, name = target.parameter, target.linear, target.name
        if target.delta is not None:
            continue  # looked at before it was there
        if root is not None and (split := target.split) is not None:
            if type(linear).forward is not nn.Linear.forward:
                raise ValueError(
                    f"{name}: expected an nn.Linear in a model sharded over processes, got {type(linear).__name__}"
                )
            if target.owner is None:
                check_plan(root, name, split)
        opaque = is_opaque(target)
        if opaque and not (quantized and isinstance(linear, nn.Linear)):
            kind = type(weight.data).__name__ if _is_subclass(weight) else weight.dtype
            raise ValueError(
                f"{name}: expected an nn.Linear, or experts as transformers runs them, with a weight of float32, "
                f"bfloat16 or float16, got {type(linear).__name__} with {kind}; load the model without quantization, "
                "or give adapter=FOLDER to cir.unlearn"
            )
        kept = [*linear._parameters.values(), *(linear._buffers.values() if opaque else ())]
        if not any(own is weight for own in kept):
            raise ValueError(
                f"{name}: expected a weight that is an ordinary parameter, got {type(weight).__name__}; one that is "
                "made of others (weight_norm, pruning) would be made anew, without what changed"
            )
        if weight.device.type == "meta":
            raise ValueError(f"{name}: expected a weight with data, got one on the meta device")
        if id(weight) in seen:
            raise ValueError(f"expected a weight of its own in each linear, got {name} sharing {seen[id(weight)]}'s")
        seen[id(weight)] = name


def is_opaque(target: Target) -> bool:
    """Whether it multiplies with something else than an ordinary weight: one that is quantized, say."""
    weight = target.parameter
    return weight.dtype not in EDITABLE_DTYPES or _is_subclass(weight) or not _is_plain(target)


@torch.no_grad()
def _is_plain(target: Target) -> bool:
    """Whether it does what nn.Linear does, or :func:`run_experts`, up to rounding: a subclass may."""
    linear, weight = target.linear, target.weight
    if type(linear).forward is nn.Linear.forward or isinstance(weight, FakeTensor) or weight.device.type == "meta":
        return True
    if target.experts and not target.gradient.experts:
        return True  # tried with what reads
    width = target.activation.width
    x = torch.linspace(-1, 1, 4 * width, dtype=weight.dtype, device=weight.device).view(4, width)
    if not target.experts:
        expected, got = nn.functional.linear(x, weight, target.bias), linear(x)
    elif runs_all(linear):
        x = x.repeat(target.experts, 1)
        expected, got = run_all_experts(linear, x), linear(x)
    else:
        routes = torch.arange(8, device=weight.device).view(4, 2) % target.experts
        shares = torch.linspace(0.2, 0.8, 8, dtype=weight.dtype, device=weight.device).view(4, 2)
        try:
            expected, got = run_experts(linear, x, routes, shares), linear(x, routes, shares)
        except RuntimeError:  # of float64, which transformers does not multiply for all experts at once
            return False
    return isinstance(got, Tensor) and bool((got - expected).norm() <= 2e-2 * expected.norm())


def _is_subclass(weight: Tensor) -> bool:
    plain = is_sharded(weight) or type(weight.data) in (Tensor, FakeTensor)
    return isinstance(weight, nn.Parameter) and not plain
