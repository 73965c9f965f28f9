"""The whole loop on a GPU, where the Triton kernels run without being asked."""

from __future__ import annotations

import pytest
import torch

import cir
from cir.config import BreakingConfig, CIRConfig, EditConfig
from cir.measures import recall
from cir.model import replay
from cir.model.finding import find_stack
from cir.model.offload import offloaded, upper_modules
from cir.model.replay import Replays
from tests.tiny import TEXT, facts, knowing_llama, knowing_mixture, tiny_llama, word_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONFIG = BreakingConfig(
    loss_layers=(1, 3),
    update_loss_layers=False,
    rank_activation=3,
    rank_gradient=3,
    rate=0.05,
    retain_rate=1e-3,
    retain_length=32,
    max_epochs=2,
    budget=10.0,
)


PAIRS = CIRConfig(layers=0.5, budget=10.0, worst_window=10.0, max_steps=4)


def unlearned(tokenizer, device, dtype, monkeypatch=None, backend=None, config=CONFIG):
    if backend:
        monkeypatch.setenv("CIR_KERNELS_BACKEND", backend)
    model = tiny_llama(dtype).to(device)
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    report = cir.unlearn(model, tokenizer, facts(), retain=TEXT, config=config, progress=False)
    return report, {name: p.detach().cpu() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [CONFIG, PAIRS])
def test_the_step_on_a_gpu_is_the_step_on_a_cpu(tokenizer, config):
    report, moved = unlearned(tokenizer, "cuda", torch.float32, config=config)
    assert report.epochs
    want = unlearned(tokenizer, "cpu", torch.float32, config=config)[1]
    total = torch.stack([change.norm() for change in want.values()]).norm()
    apart = torch.stack([(change - moved[name]).norm() for name, change in want.items()]).norm()
    assert float(total) > 0
    assert float(apart / total) < 1e-2


def test_graphs_give_what_calls_give(tokenizer, monkeypatch):
    captured = []
    capture = Replays._capture
    monkeypatch.setattr(
        Replays, "_capture", lambda self, key, *rest: captured.append(key) or capture(self, key, *rest)
    )
    moved = unlearned(tokenizer, "cuda", torch.float32, config=PAIRS)[1]
    assert captured
    monkeypatch.setattr(replay, "CAPTURED_AT", 10**9)
    count = len(captured)
    want = unlearned(tokenizer, "cuda", torch.float32, config=PAIRS)[1]
    assert len(captured) == count
    total = torch.stack([change.norm() for change in want.values()]).norm()
    apart = torch.stack([(change - moved[name]).norm() for name, change in want.items()]).norm()
    assert float(apart / total) < 1e-2


def test_a_mixture_of_experts_is_unlearned_in_graphs(monkeypatch):
    captured = []
    capture = Replays._capture
    monkeypatch.setattr(
        Replays, "_capture", lambda self, key, *rest: captured.append(key) or capture(self, key, *rest)
    )
    model, tokenizer, told = knowing_mixture(torch.bfloat16).cuda(), word_tokenizer(), cir.load_facts(facts(12))
    fit = CIRConfig(layers=0.5, max_change=0.1, retain_tokens=1024, budget=9.0, worst_window=9.0)
    report = cir.unlearn(model, tokenizer, told[:4], contrast=told[4:], retain=TEXT, config=fit, progress=False)
    assert captured
    assert report.after.mean_recall < 0.1 < 0.9 < report.before.mean_recall
    assert min(recall(model, tokenizer, told[4:]).values()) > 0.8


def test_graphs_outlive_an_edit_and_edits_take_no_more_memory(monkeypatch):
    captured = []
    capture = Replays._capture
    monkeypatch.setattr(
        Replays, "_capture", lambda self, key, *rest: captured.append(key) or capture(self, key, *rest)
    )
    model, tokenizer, told = knowing_llama().cuda(), word_tokenizer(), cir.load_facts(facts(12))
    fit = CIRConfig(layers=0.5, retain_tokens=1024)
    subspaces = cir.Subspaces.fit(model, tokenizer, TEXT, told[:6], config=fit, progress=False)
    config = EditConfig(target_recall=0.3, keep=0.9, budget=1.0, worst_window=1.0)
    with cir.Editor(model, tokenizer, subspaces, text=TEXT, config=config) as editor:
        held = []
        for fact in told[6:10]:
            editor.undo(editor.forget(fact))
            held.append((len(captured), torch.cuda.memory_allocated()))
        assert held[0][0] > 0
        assert held[-1][0] == held[-2][0]
        assert held[-1][1] - held[-2][1] < 2**23  # factors of the edits; a stream's workspace has 2^26


def test_the_upper_weights_wait_on_the_host_and_the_outcome_is_the_same(tokenizer):
    states = {}
    for offload in ("never", "always"):
        model = tiny_llama(hidden_size=64, intermediate_size=4096).cuda()
        cir.unlearn(model, tokenizer, facts(), retain=TEXT, config=CONFIG, offload=offload, progress=False)
        assert all(p.is_cuda for p in model.parameters())
        states[offload] = [p.detach().cpu() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*states.values(), strict=True))


def test_a_model_larger_than_the_gpu_keeps_its_upper_weights_on_the_host(tokenizer):
    model = tiny_llama()
    stack = find_stack(model)
    with offloaded(model, stack, 2, torch.device("cuda")):
        upper = {p for module in upper_modules(model, stack, 2) for p in module.parameters()}
        assert all(p.is_cuda != (p in upper) for p in model.parameters())
        report = cir.unlearn(model, tokenizer, facts(), retain=TEXT, config=CONFIG, progress=False)
        assert report.epochs
        assert all(p.is_cuda != (p in upper) for p in model.parameters())
        with pytest.raises(ValueError, match="wait on the host"):
            cir.relearn(model, tokenizer, facts(), facts(), progress=False)
    assert not any(p.is_cuda for p in model.parameters())


def test_kernels_and_their_pytorch_forms_agree_in_bfloat16(tokenizer, monkeypatch):
    by_backend = {
        name: unlearned(tokenizer, "cuda", torch.bfloat16, monkeypatch, name)[1] for name in ("triton", "torch")
    }
    total = torch.stack([change.float().norm() for change in by_backend["torch"].values()]).norm()
    apart = [
        (change.float() - by_backend["triton"][name].float()).norm() for name, change in by_backend["torch"].items()
    ]
    assert float(total) > 0
    assert float(torch.stack(apart).norm() / total) < 0.2


def test_a_profile_counts_the_kernels_of_each_phase(tokenizer):
    found = cir.profile(tiny_llama(torch.bfloat16).cuda(), tokenizer, facts(), retain=TEXT, config=PAIRS)
    seconds = {phase.name: phase.seconds for phase in found.phases}
    assert all(seconds[name] > 0 for name in ("forward, backward", "relearn", "update"))
    assert sum(seconds.values()) < found.seconds
