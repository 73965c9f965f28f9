from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import cir
from cir.forgetting import memory
from cir.forgetting.batches import fact_batches, text_batches
from cir.forgetting.breaking import Breaker
from cir.forgetting.memory import Need, needed, needed_to_forget, settle
from cir.forgetting.subspace import SubspaceStream
from cir.model.capture import capture
from cir.model.finding import find_stack
from cir.model.sites import sites_of
from tests.forgetting.test_breaking import CONFIG
from tests.tiny import TEXT, facts, tiny_llama, word_tokenizer

CPU = torch.device("cpu")
LAST = CONFIG.layers(4)[-1]


def prepared(model, config=CONFIG):
    stack, tokenizer = find_stack(model), word_tokenizer()
    batches = fact_batches(tokenizer, cir.load_facts(facts()), config, CPU)
    retain, _ = text_batches(tokenizer, TEXT, None, config, CPU)
    return stack, batches, retain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_autograd_keeps_is_foreseen(dtype):
    model = tiny_llama(dtype, hidden_size=64, intermediate_size=192)
    stack, batches, retain = prepared(model)
    need = needed(model, stack, batches, retain, CONFIG)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with capture(model, stack, LAST) as tape:
        breaker = Breaker(tape, stack.targets(LAST), CONFIG.layers(4), batches[:1], [], CONFIG)
        for parameter in model.parameters():
            kept[parameter.data_ptr()] = 0
        weights = set(kept)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, rows = breaker.forget_tokens(0)
    tokens = len(batches[0].packed[0].flatten())
    found = sum(size for where, size in kept.items() if where not in weights) / tokens
    assert 0.5 * need.token <= found <= need.token
    updated = {site.name for site in sites_of(stack.targets(CONFIG.last_updated(4)))}
    assert sum(r.nbytes for name, r in rows.items() if name in updated) <= need.rows


def test_bases_and_moments_are_foreseen(model):
    stack, batches, retain = prepared(model)
    config = CONFIG
    need = needed(model, stack, batches, retain, config)
    sites = sites_of(stack.targets(config.last_updated(4)))
    stream = SubspaceStream(sites, rank_activation=config.rank_activation, rank_gradient=config.rank_gradient)
    stream.observe({site.name: torch.randn(50, site.width) for site in sites})
    kept = stream._moments.values()
    shared = {m.omega.data_ptr(): m.omega.nbytes for m in kept if m.omega is not None}
    moments = sum(m.action.nbytes for m in kept) + sum(shared.values())
    bases = sum(subspace.basis.nbytes for subspace in stream.solve().values())
    weights = sum(target.linear.weight.nbytes for target in stack.targets(config.last_updated(4)))
    assert need.held == moments + bases + 2 * weights


def test_the_bases_of_late_layers_and_the_copies_are_foreseen(model, tokenizer):
    stack, config = find_stack(model), cir.CIRConfig(layers=0.5, retain_tokens=256)
    targets = stack.writers(2)
    need = needed_to_forget(model, stack, targets, 0, config)
    fitted = cir.Subspaces.fit(model, tokenizer, TEXT, facts()[:2], config=config, progress=False)
    bases = sum(subspace.basis.nbytes for subspace in fitted.values())
    relearned = sum(target.linear.weight.nbytes for mlp in stack.mlps[2:] for target in mlp.targets)
    copies = 2 * sum(target.linear.weight.nbytes for target in targets) + relearned
    states = 4 * 24 * memory.KEPT  # of what has to stay
    assert bases + copies < need.held - states < 3 * (bases + copies)
    # Of text, one hidden state a token that is measured again and again.
    kept = [needed_to_forget(model, stack, targets, n, config).held - need.held for n in (100, 10**6)]
    assert kept == [4 * 24 * 100, 4 * 24 * config.disruption_tokens]
    whole = replace(config, disruption_tokens=None)
    assert needed_to_forget(model, stack, targets, 10**6, whole).held == need.held


def test_fewer_tokens_at_once_where_memory_is_short_and_an_error_where_none_is_enough():
    need = Need(held=1000, rows=100, token=10, check=500)
    assert need.peak == 1000 + 100 + 5120
    assert need.within(10**6) == need
    assert need.within(2100).tokens == 100
    assert need.within(2100).peak <= 2100
    with pytest.raises(MemoryError, match="GiB of free memory beyond the weights"):
        need.within(1419)  # a sentence takes 1420
    with pytest.raises(MemoryError):
        replace(need, check=2000).within(2999)
    # Text that subspaces are fitted on, of which half as many tokens have gradients.
    fitting = replace(need, moments=1000, solving=2000, predicted=20)
    assert fitting.peak == 1000 + 1000 + 20 * 256
    assert replace(fitting, predicted=1).peak == need.peak
    assert fitting.within(6000).tokens == 400
    assert fitting.within(6000).peak == 6000
    with pytest.raises(MemoryError):
        fitting.within(3999)


def test_more_tokens_at_once_where_a_gpu_has_room_for_twice_what_they_take(monkeypatch):
    need = Need(held=1000, rows=100, token=10, check=500, tokens=50)
    for device, have, tokens in (("cuda", 4201, 100), ("cuda", 4200, 50), ("cuda", 1500, 40), ("cpu", 10**6, 50)):
        monkeypatch.setattr(memory, "free_memory", lambda device, have=have: have)
        assert memory.fits(SimpleNamespace(device=torch.device(device)), need).tokens == tokens


def test_the_upper_weights_move_where_they_have_to(model, monkeypatch):
    stack, need = find_stack(model), Need(held=1000, rows=100, token=10, check=500)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2100)
    assert settle(model, stack, LAST, need, "auto") == (need.within(2100), False)  # the host has nowhere to move them
    assert settle(model, stack, LAST, need, "always")[1]
    assert not settle(model, stack, LAST, need, "never")[1]
    with pytest.raises(ValueError, match="offload: expected one of auto, always, never, got 'sometimes'"):
        settle(model, stack, LAST, need, "sometimes")
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    with pytest.raises(MemoryError):
        cir.unlearn(model, word_tokenizer(), facts(), retain=TEXT, config=CONFIG, progress=False)


def test_unlearning_with_the_upper_weights_on_the_host_is_the_same(model, tokenizer, unchanged):
    other, states = tiny_llama(), []
    unchanged(model, weights=False)
    for each, offload in ((other, "never"), (model, "always")):
        report = cir.unlearn(each, tokenizer, facts(), retain=TEXT, config=CONFIG, offload=offload, progress=False)
        assert report.predicted_memory > 0
        states.append(list(each.parameters()))
    unchanged(model, weights=False)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
