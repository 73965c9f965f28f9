from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING

from cir.data.tokens import pad
from cir.model import taps
from cir.model.capture import answering
from cir.model.finding import find_stack
from cir.model.taps import hit, is_experts, run_experts
from tests.model.families import build

NUMBER, WIDTH, INNER, TOKENS = 5, 16, 24, 12


class Experts(nn.Module):
    """As transformers has them, one at a time."""

    def __init__(self, transposed: bool, bias: bool, gate: bool) -> None:
        super().__init__()
        self.is_transposed, self.has_bias, self.has_gate, self.act_fn = transposed, bias, gate, nn.SiLU()
        outer = 2 * INNER if gate else INNER
        self.reader = "gate_up_proj" if gate else "up_proj"
        for name, (out, read) in {self.reader: (outer, WIDTH), "down_proj": (WIDTH, INNER)}.items():
            shape = (read, out) if transposed else (out, read)
            self.register_parameter(name, nn.Parameter(torch.randn(NUMBER, *shape) / 4))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(NUMBER, out)) if bias else None)

    def _apply_gate(self, both):
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def matrix(self, name: str, number: int):
        weight = getattr(self, name)[number]
        return weight.T if self.is_transposed else weight

    def forward(self, x, routes, shares):
        found = torch.zeros_like(x)
        for token, (own, of) in enumerate(zip(routes, shares, strict=True)):
            for number, share in zip(own.tolist(), of, strict=True):
                if number < NUMBER:
                    bias = [getattr(self, f"{name}_bias") for name in (self.reader, "down_proj")]
                    up, down = (None if b is None else b[number] for b in bias)
                    both = F.linear(x[token], self.matrix(self.reader, number), up)
                    inner = self._apply_gate(both) if self.has_gate else self.act_fn(both)
                    found[token] += share * F.linear(inner, self.matrix("down_proj", number), down)
        return found


@pytest.fixture(params=[(False, False, True), (True, True, True), (False, True, False)])
def experts(request):
    torch.manual_seed(0)
    return Experts(*request.param).double()


def given():
    """Rows, two experts for each, of which one here and there is none, and their shares."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    routes = torch.stack([torch.randperm(NUMBER + 1, generator=generator)[:2] for _ in range(TOKENS)])
    return x, routes, torch.rand(TOKENS, 2, dtype=torch.float64, generator=generator)


def test_experts_say_what_each_alone_says_and_their_rows_make_autograds_gradients(experts):
    x, routes, shares = given()
    assert is_experts(experts)
    assert NUMBER in routes
    inputs = [x.requires_grad_(), shares.requires_grad_()]
    expected = experts(x, routes, shares)
    weights = [getattr(experts, name) for name in (experts.reader, "down_proj")]
    slope = torch.randn_like(expected)
    alone = torch.autograd.grad(expected, [*inputs, *weights], slope)
    rows = {}
    got = run_experts(experts, x, routes, shares, torch.zeros((), requires_grad=True), rows.__setitem__)
    torch.testing.assert_close(got, expected)
    through = torch.autograd.grad(got, inputs, slope)
    for a, b in zip(alone[:2], through, strict=True):
        torch.testing.assert_close(b, a)
    assert torch.equal(rows["in"], x)
    for weight, name, exact in zip(weights, ("up", "down"), alone[2:], strict=True):
        whole = torch.zeros_like(weight.mT if experts.is_transposed else weight)
        for number, of, places in hit(rows["routes"], NUMBER):
            of_up = name == "up"
            g = rows["up.out"].flatten(0, 1)[places] if of_up else rows["down.out"][of]
            a = rows["in"][of] if of_up else rows["down.in"].flatten(0, 1)[places]
            whole[number] = g.T @ a
        torch.testing.assert_close(whole.mT if experts.is_transposed else whole, exact)


def test_products_of_all_experts_at_once_say_the_same(experts, monkeypatch):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("expected a torch with grouped_mm")
    x, routes, shares = given()
    experts = experts.bfloat16()
    x, shares = x.bfloat16().requires_grad_(), shares.bfloat16()

    def told():
        out = run_experts(experts, x, routes, shares)
        return out, torch.autograd.grad(out.sum(), x)[0]

    one_by_one = told()
    monkeypatch.setattr(taps, "GROUPED_ON", ("cpu",))
    for a, b in zip(one_by_one, told(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_hit_finds_each_experts_rows_in_order():
    found = [(n, a.tolist(), b.tolist()) for n, a, b in hit(torch.tensor([[2, 0], [3, 2], [0, 2]]), 3)]
    assert found == [(0, [0, 2], [1, 4]), (2, [0, 1, 2], [0, 3, 5])]


@pytest.mark.parametrize("family", ["qwen2_moe", "llama4_text"])
def test_of_some_tokens_the_rows_are_those_of_all(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"no {family} in this transformers")
    model = build(family)
    stack, batch = find_stack(model), pad(([1, 5, 9, 12, 7], [1, 8, 4]))
    found = []
    with answering(model, stack, 1) as tape:
        for at in (torch.arange(8), torch.tensor([1, 6])):
            logits, hidden = tape.predict(tape.below(batch), at)
            loss = logits[[1, 6] if len(at) == 8 else [0, 1], [3, 4]].sum()
            found.append(tape.backward(loss, hidden))
    whole, some = found
    assert whole.keys() == some.keys()
    assert any(name.endswith(".routes") for name in some)
    for name, rows in some.items():
        torch.testing.assert_close(rows, whole[name][[1, 6]])


def test_experts_that_are_given_some_tokens_alone_are_refused():
    model = build("mixtral")
    stack = find_stack(model)
    for layer in model.model.layers:
        routes = torch.zeros(1, 2, dtype=torch.long)
        layer.mlp.forward = lambda x, own=layer.mlp.experts, routes=routes: own(x[0, :1], routes, x[0, :1, :2])
    with answering(model, stack, 1) as tape, pytest.raises(ValueError, match="expected experts that are given all 6"):
        tape.predict(tape.below(pad([[1, 5, 9, 12, 7, 3]])), torch.arange(2))
