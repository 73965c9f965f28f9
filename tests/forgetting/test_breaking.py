"""Steps: in parts where memory is short, and without making the host wait."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cir.config import BreakingConfig
from cir.data.facts import load_facts
from cir.forgetting.batches import fact_batches, text_batches
from cir.forgetting.breaking import Breaker
from cir.forgetting.subspace import SubspaceStream
from cir.forgetting.update import selective_step, snapshot
from cir.model.capture import Capture, capture
from cir.model.finding import find_stack
from tests.tiny import TEXT, facts, tiny_llama

CONFIG = BreakingConfig(
    loss_layers=(1, 3),
    update_loss_layers=False,
    mode="orthogonal",
    rank_activation=3,
    rank_gradient=3,
    rate=0.5,
    retain_rate=0.1,
    retain_length=16,
    retain_tokens=128,
    batch_size=8,
)


def epochs(tokenizer, model, number: int = 2, before_epochs=lambda breaker: None, config=CONFIG):
    """The losses of each epoch, and the weights they lead to."""
    stack = find_stack(model)
    targets = stack.targets(2)
    batches = fact_batches(tokenizer, load_facts(facts()), config, model.device)
    retain, _ = text_batches(tokenizer, TEXT, None, config, model.device)
    with capture(model, stack, 2) as tape:
        breaker = Breaker(tape, targets, range(1, 3), batches, retain, config)
        breaker.fit()
        before_epochs(breaker)
        losses = [breaker.epoch(config.rate) for _ in range(number)]
    return losses, snapshot(targets)


@pytest.mark.parametrize("most", [1, 3])
def test_where_memory_is_short_the_step_is_taken_in_parts_and_is_the_same(tokenizer, monkeypatch, most):
    losses, weights = epochs(tokenizer, tiny_llama(torch.float64))
    forward, refused = Capture.forward, []

    def short(self, batch, mask, observe=None):
        if torch.is_grad_enabled() and len(batch.input_ids) > most:
            refused.append(len(batch.input_ids))
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, batch, mask, observe)

    monkeypatch.setattr(Capture, "forward", short)
    in_parts, same = epochs(tokenizer, tiny_llama(torch.float64))
    assert refused
    assert len(refused) <= 4  # halved until it fits, once for all steps
    for one, other in zip(losses, in_parts, strict=True):
        assert one.forget == pytest.approx(other.forget, rel=1e-9)
        assert one.retain == pytest.approx(other.retain, rel=1e-9)
    start = snapshot(find_stack(tiny_llama(torch.float64)).targets(2))
    for weight, other, before in zip(weights, same, start, strict=True):
        assert float((weight - other).norm()) < 1e-6 * float((weight - before).norm())


def test_one_sentence_that_does_not_fit_is_an_error_that_changes_nothing(tokenizer, monkeypatch, unchanged):
    model = tiny_llama()
    unchanged(model)

    def short(self, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    def from_now_on(breaker):
        monkeypatch.setattr(Capture, "forward", short)

    with pytest.raises(torch.OutOfMemoryError):
        epochs(tokenizer, model, before_epochs=from_now_on)
    unchanged(model)


def test_the_rows_of_a_step_are_gone_before_the_next_forward(tokenizer, monkeypatch):
    held, forward, backward = [], Capture.forward, Capture.backward

    def kept(self, loss, hidden):
        tokens = backward(self, loss, hidden)
        held.extend(weakref.ref(rows) for rows in tokens.values())
        return tokens

    def checked(self, *args, **kwargs):
        assert not any(rows() is not None for rows in held)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Capture, "forward", checked)
    monkeypatch.setattr(Capture, "backward", kept)
    epochs(tokenizer, tiny_llama())
    assert held


def test_the_last_epoch_steps_like_any_other_and_fits_nothing(tokenizer, monkeypatch):
    seen = []

    def note(name):
        method = getattr(SubspaceStream, name)
        monkeypatch.setattr(SubspaceStream, name, lambda *args: seen.append(name) or method(*args))

    for name in ("observe", "solve"):
        note(name)

    def after(last):
        def epoch(breaker):
            seen.clear()
            breaker.epoch(1.0, last=last)

        return epochs(tokenizer, tiny_llama(), number=0, before_epochs=epoch)[1], set(seen)

    (weights, fitted), (same, nothing) = after(False), after(True)
    assert fitted == {"observe", "solve"}
    assert not nothing
    assert all(map(torch.equal, weights, same))


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_makes_the_host_wait_once(tokenizer, monkeypatch):
    waits, forward, read = Waits(), Capture.forward, []
    tolist = torch.Tensor.tolist

    def unseen(self, *args, **kwargs):  # what transformers does in a forward is its own
        with _disable_current_modes():
            return forward(self, *args, **kwargs)

    def step(breaker):
        read.clear()  # what was found once, for all steps
        with waits:
            loss, tokens = breaker.forget_tokens(0)
            rows = breaker._observed_and_collapsed(tokens)
            selective_step(breaker._targets, rows, CONFIG.rate, loss=loss)

    monkeypatch.setattr(Capture, "forward", unseen)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self.shape) or tolist(self))
    epochs(tokenizer, tiny_llama(), number=0, before_epochs=step)
    assert not waits.seen
    assert read == [(2,)]  # the loss and the norm together
