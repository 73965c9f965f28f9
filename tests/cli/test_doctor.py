from __future__ import annotations

from types import SimpleNamespace

import torch

from cir.cli import main
from cir_kernels import _dispatch


def test_on_a_cpu_it_says_what_runs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in printed
    assert "every operation runs in its PyTorch form" in printed


def test_on_a_gpu_each_kernel_is_tried_and_one_that_is_wrong_is_named(capsys, monkeypatch):
    about = SimpleNamespace(name="a GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    results = {name: (torch.ones(2), torch.ones(2)) for name in _dispatch.TRIALS}
    for name in results:
        monkeypatch.setitem(_dispatch.TRIALS, name, lambda *on, name=name: results[name])
    _dispatch.disagreement.cache_clear()
    assert main(["doctor"]) == 0
    assert "all kernels are right" in capsys.readouterr().out
    results["collapse"] = (torch.ones(2), 2 * torch.ones(2))
    _dispatch.disagreement.cache_clear()
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "collapse, bfloat16              its result is 0.5 of its length from PyTorch's" in printed
    assert "accumulate_moments, bfloat16    right" in printed
    _dispatch.disagreement.cache_clear()
