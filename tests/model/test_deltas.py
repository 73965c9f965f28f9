from __future__ import annotations

import pytest
import torch
from torch import nn

from cir.data.tokens import pad
from cir.model.capture import answering
from cir.model.deltas import with_deltas
from cir.model.finding import find_stack
from cir.model.sites import names_of, sites_of
from cir.model.taps import norm_through
from tests.model.test_sites import build
from tests.quantized import QUANTIZERS, Int8Linear, bits, int8, llm_int8, same
from tests.tiny import tiny_llama

BATCH = pad([[1, 5, 9, 20, 7], [1, 30, 2, 11], [1, 8, 44, 3, 16]])


def beside(model, first_layer=2):
    return with_deltas(model, find_stack(model, quantized=True), first_layer)


def upper(stack):
    written = stack.writers(2)
    return [*written, *(t for mlp in stack.mlps[2:] for t in mlp.targets if t not in written)]


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_rows_are_autograds_through_the_quantized_model(quantize, unchanged):
    model = quantize(tiny_llama())
    stack, at = beside(model), torch.tensor([1, 3, 6, 9])
    targets = upper(stack)
    for number, target in enumerate(targets):  # they count
        nn.init.normal_(target.parameter, std=0.05, generator=torch.Generator().manual_seed(number))
    # Rounded to 8 bits once more where each linear reads it, what differs in the last place may differ in the eighth.
    near = 0.1 if quantize is llm_int8 else 1e-5
    unchanged(model)
    before = bits(model)
    with answering(model, stack, 2) as tape:
        logits, hidden = tape.predict(tape.below(BATCH), at)
        rows = tape.backward(logits.square().sum(), hidden)
    unchanged(model, weights=False)
    assert same(model, before)
    assert rows.keys() == set(names_of(sites_of(targets)))

    # The same with hooks on the whole model, which add what is beside each linear.
    seen = {}
    for target in targets:

        def add(module, args, output, target=target):
            read = args[0].detach() if not args[0].requires_grad else args[0]
            y = (output + nn.functional.linear(read, target.parameter)).requires_grad_()
            y.retain_grad()
            seen[target] = args[0], y
            return y

        target.linear.register_forward_hook(add)
    whole = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask.long()).logits
    whole = whole[BATCH.attention_mask][at]
    assert (logits - whole).norm() <= near * whole.norm()
    whole.square().sum().backward()
    for target, (a, y) in seen.items():
        for site, full in ((target.activation, a), (target.gradient, y.grad)):
            got, expected = rows[site.name], full[BATCH.attention_mask][at]
            assert (got - expected).norm() <= near * expected.norm()


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_a_delta_knows_the_norm_of_the_weight(quantize):
    ordinary, model = tiny_llama(), quantize(tiny_llama())
    for target, plain in zip(upper(beside(model)), upper(beside(ordinary)), strict=True):
        linear = target.linear
        with torch.no_grad():
            dense = linear(torch.eye(linear.in_features)).T
        assert float(target.norm(torch.float64)) == pytest.approx(float(dense.double().norm()), rel=1e-4)
        weight = float(plain.linear.weight.detach().norm())
        assert float(target.norm(torch.float64)) == pytest.approx(weight, rel=0.1)
        assert float(plain.norm(torch.float32)) == pytest.approx(weight, rel=1e-6)
        assert not target.parameter.any()


def test_deltas_are_as_large_as_the_linears_are_unquantized():
    model = int8(tiny_llama(torch.bfloat16))
    stack = find_stack(model, quantized=True)
    empty, real = (with_deltas(model, stack, 2, empty=flag) for flag in (True, False))
    for counted, target in zip(upper(empty), upper(real), strict=True):
        assert target.parameter.shape == target.linear.weight.shape
        assert target.parameter.dtype == torch.bfloat16
        assert (counted.parameter.device.type, counted.weight.nbytes) == ("meta", target.weight.nbytes)
    assert all(target.delta is None for mlp in real.mlps[:2] for target in mlp.targets)


class Deaf(Int8Linear):
    """Nothing comes back to what it reads."""

    def forward(self, input):
        return super().forward(input.detach())


class Halved(Int8Linear):
    def forward(self, input):
        return super().forward((input + input.detach()) / 2)


class Wider(Int8Linear):
    def forward(self, input):
        return super().forward(input).double()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Deaf,
            "self_attn.o_proj: expected a linear through which the gradient comes back to what it reads, got Deaf",
        ),
        (Halved, "expected a linear through which the gradient comes back to what it reads, got Halved"),
    ],
)
def test_linears_that_do_not_pass_gradients_on_are_refused(kind, message, unchanged):
    model = int8(tiny_llama(), kind)
    unchanged(model)
    with pytest.raises(ValueError, match=message):
        beside(model)
    unchanged(model)


def test_linears_that_put_out_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"out: expected a linear that puts out torch.float32, got torch.float64"):
        norm_through(Wider(nn.Linear(8, 4)), "out", 8, torch.float32, torch.device("cpu"))


class Packing(Int8Linear):
    """Lets no gradient through any more once it was given what requires none, as bitsandbytes does on some CPUs."""

    packed, support_avx512bf16_for_cpu = False, True

    def forward(self, input):
        self.packed |= self.support_avx512bf16_for_cpu and not input.requires_grad
        return super().forward(input.detach() if self.packed else input)


def test_weights_are_not_packed_anew_before_gradients_have_come_back():
    model, at = int8(tiny_llama(), Packing), torch.tensor([1, 3])
    stack = beside(model)
    with answering(model, stack, 2) as tape, torch.no_grad():
        tape.forward(BATCH, at)
        tape.predict(tape.below(BATCH), at)
    linears = [module for module in model.modules() if isinstance(module, Packing)]
    assert len(linears) == 28
    assert not any(linear.packed for linear in linears)
    assert all(linear.support_avx512bf16_for_cpu for linear in linears)


def test_experts_are_refused():
    model = build("mixtral")
    with pytest.raises(ValueError, match="adapter: expected a model of linears, got the experts"):
        beside(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2", "gpt_neox", "olmo2"])
def test_what_is_beside_a_weight_does_what_it_would_within(family):
    model = build(family).eval()
    batch, at = pad([[1, 5, 9, 20, 7], [1, 30, 2, 11]]), torch.tensor([1, 3, 6])
    read = []
    for stack in (with_deltas(model, find_stack(model), 1), find_stack(model)):
        written = stack.writers(1)
        targets = [*written, *(t for mlp in stack.mlps[1:] for t in mlp.targets if t not in written)]
        with torch.no_grad():
            for number, target in enumerate(targets):
                change = torch.randn(target.weight.shape, generator=torch.Generator().manual_seed(number))
                target.weight.add_(0.05 * change)
        with answering(model, stack, 1) as tape:
            logits, hidden = tape.predict(tape.below(batch), at)
            read.append({"logits": logits.detach(), **tape.backward(logits.square().sum(), hidden)})
    assert read[0].keys() == read[1].keys()
    for name, rows in read[0].items():
        assert (rows - read[1][name]).norm() <= 1e-5 * rows.norm(), name
