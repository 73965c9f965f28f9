from __future__ import annotations

import copy
import math

import pytest
import torch

from bench import baselines
from bench.baselines import BASELINES, SKIP_FIRST, CircuitBreakers
from cir.data.facts import load_facts
from cir.data.tokens import Batch, pad, sentence_batches, windows
from cir.forgetting.update import NonFiniteError
from tests.tiny import TEXT, facts, knowing_llama

RATE = 1e-3
LIKELIHOOD = ["graddiff", "npo", "simnpo"]
REPRESENTATION = ["rmu", "circuit_breakers"]

each = pytest.mark.parametrize("name", BASELINES)


@pytest.fixture(scope="module")
def knowing():
    return knowing_llama()


@pytest.fixture
def model(knowing):
    return copy.deepcopy(knowing)


@pytest.fixture
def start(model, tokenizer):
    """A function that starts a baseline on three forget and two retain batches."""
    forget = sentence_batches(tokenizer, load_facts(facts(6)), batch_size=4, max_length=64, skip_first=1)
    retain = [
        Batch(rows, torch.ones_like(rows, dtype=torch.bool)) for rows in windows(tokenizer, TEXT, 24)[:6].split(3)
    ]

    def make(name: str, rate: float = RATE, epochs: int = 3, seed: int = 0, **batches):
        batches = {"forget": forget, "retain": retain, **batches}
        return BASELINES[name](model, **batches, rate=rate, epochs=epochs, seed=seed)

    return make


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def row_nll(model, batch: Batch) -> list[float]:
    """Mean NLL of each row by transformers' own loss, one row at a time and without padding."""
    rows = [ids[mask][None] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return [float(model(input_ids=row, labels=row).loss) for row in rows]


@torch.no_grad()
def hidden(model, batch: Batch, layer: int, skip_first: int) -> list[torch.Tensor]:
    """Each real token's hidden state after ``layer``, by transformers' own means."""
    states = model.model(
        batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).hidden_states
    chosen = batch.attention_mask.clone()
    chosen[:, :skip_first] = False
    return list(states[layer + 1][chosen].double())


def mean(numbers) -> float:
    numbers = [float(number) for number in numbers]
    return sum(numbers) / len(numbers)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_sentence_nll_is_the_sum_over_real_tokens():
    rows = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    logits = rand(0, 3, 4, 11)
    p = logits.double().softmax(-1)
    want = [-sum(math.log(p[i, t - 1, row[t]]) for t in range(1, len(row))) for i, row in enumerate(rows)]
    assert baselines.sentence_nll(logits, pad(rows)).tolist() == pytest.approx(want, rel=1e-5)
    assert baselines.predicted(pad(rows)).tolist() == [3, 1, 2]


def test_preference_losses_are_their_formulas():
    nll, reference, lengths = [3.0, 40.0, 7.5], [2.0, 41.0, 7.5], [2, 9, 4]
    npo = mean(-2 / 0.1 * log_sigmoid(-0.1 * (b - a)) for a, b in zip(nll, reference, strict=True))
    assert float(baselines.npo_loss(torch.tensor(nll), torch.tensor(reference), 0.1)) == pytest.approx(npo, rel=1e-6)
    simnpo = mean(-2 / 2.5 * log_sigmoid(2.5 / n * a - 0.5) for a, n in zip(nll, lengths, strict=True))
    got = baselines.simnpo_loss(torch.tensor(nll), torch.tensor(lengths), 2.5, 0.5)
    assert float(got) == pytest.approx(simnpo, rel=1e-6)


def test_npo_starts_as_gradient_ascent():
    nll = torch.tensor([3.0, 40.0, 7.5], requires_grad=True)
    baselines.npo_loss(nll, nll.detach(), 0.1).backward()
    assert nll.grad.tolist() == pytest.approx([-1 / 3] * 3)


def test_representation_losses_are_their_formulas():
    now, before, kept, original, target = (rand(i, 2, 5, 6) for i in range(5))
    a, b, c, d, u = (list(x.flatten(0, 1).double()) for x in (now, before, kept, original, target))
    pull = mean(sum((x - z) ** 2) / 6 for x, z in zip(a, u, strict=True))
    stay = mean(sum((x - z) ** 2) / 6 for x, z in zip(c, d, strict=True))
    got = baselines.rmu_loss(now, target, kept, original, 1200.0)
    assert float(got) == pytest.approx(pull + 1200 * stay, rel=1e-5)
    cosines = [max(0.0, float(x @ y / (x @ x * (y @ y)) ** 0.5)) for x, y in zip(a, b, strict=True)]
    assert 0.0 in cosines
    assert float(baselines.rerouting_loss(now, before)) == pytest.approx(mean(cosines), rel=1e-5)
    distances = [((x - y) @ (x - y)) ** 0.5 for x, y in zip(c, d, strict=True)]
    assert float(baselines.distance(kept, original)) == pytest.approx(mean(distances), rel=1e-5)


def test_the_distance_has_a_gradient_where_nothing_moved():
    same = rand(0, 4, 6).requires_grad_(True)
    baselines.distance(same, same.detach().clone()).backward()
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_first_loss_of_a_likelihood_baseline(model, start, name):
    with start(name) as baseline:
        rows, retain = baseline.forget[0], mean(row_nll(model, baseline.retain[0]))
        nll, lengths = row_nll(model, rows), rows.attention_mask.sum(1) - 1
        want = {
            "graddiff": -float((torch.tensor(nll) * lengths).sum() / lengths.sum()),
            "npo": 2 / 0.1 * math.log(2),
            "simnpo": mean(-2 / 2.5 * log_sigmoid(2.5 * x) for x in nll),
        }
        assert baseline.loss(0, 0).item() == pytest.approx(want[name] + retain, rel=1e-5)


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_likelihood_baselines_make_the_facts_less_likely(model, start, name):
    with start(name) as baseline:
        before = mean(row_nll(model, baseline.forget[0]))
        baseline.epoch()
        baseline.epoch()
        assert mean(row_nll(model, baseline.forget[0])) > before + 0.1


@each
def test_the_loss_falls(start, name):
    with start(name) as baseline:
        losses = [baseline.epoch() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


def test_rmu_pulls_forget_tokens_to_its_target(model, start):
    with start("rmu") as baseline:
        (layer,) = baseline.layers
        assert (layer, len(baseline.trained)) == (1, 2)  # of four layers
        assert {id(w) for w in baseline.trained} == {id(model.model.layers[i].mlp.down_proj.weight) for i in (0, 1)}
        states = [state for batch in baseline.forget for state in hidden(model, batch, layer, SKIP_FIRST)]
        assert float(baseline.target.norm()) == pytest.approx(5 * mean(state.norm() for state in states), rel=1e-5)
        assert baseline.target.min() >= 0
        first = hidden(model, baseline.forget[0], layer, SKIP_FIRST)
        want = mean((state - baseline.target).square().mean() for state in first)
        assert baseline.loss(0, 0).item() == pytest.approx(want, rel=1e-5)
        for _ in range(3):
            baseline.epoch()
        now = hidden(model, baseline.forget[0], layer, SKIP_FIRST)
        u = baseline.target.double() / float(baseline.target.norm())
        assert mean(u @ state for state in now) > mean(u @ state for state in first) + 0.1


def test_circuit_breakers_turn_forget_tokens_away(model, start):
    with start("circuit_breakers", rate=1e-2, epochs=8) as baseline:
        assert (baseline.layers, len(baseline.trained)) == ([1, 2], 3 * 7)

        def states():
            return [h for layer in baseline.layers for h in hidden(model, baseline.forget[0], layer, SKIP_FIRST)]

        before = states()
        for _ in range(8):
            baseline.epoch()
        assert mean(torch.cosine_similarity(a, b, dim=0) for a, b in zip(before, states(), strict=True)) < 0.5


def test_circuit_breakers_schedule_and_fold(start, monkeypatch):
    monkeypatch.setattr(baselines, "rerouting_loss", lambda now, before: now.sum() * 0 + 1)
    monkeypatch.setattr(baselines, "distance", lambda now, before: now.sum() * 0 + 100)
    with start("circuit_breakers", epochs=2) as baseline:
        terms = [10 * (1 - t / 12) + 1000 * t / 12 for t in range(6)]
        assert baseline.epoch() == pytest.approx(mean(terms[:3]))
        assert baseline.epoch() == pytest.approx(mean(terms[3:]))
        for weight, base, (a, b) in zip(baseline.trained, baseline.base, baseline.factors, strict=True):
            assert torch.equal(weight, base + b @ a)


def test_the_folded_weights_say_what_the_adapters_said(start):
    class Recording(CircuitBreakers):
        def loss(self, forget: int, retain: int) -> torch.Tensor:
            self.seen = self.states(self.forget[0]).detach()
            return super().loss(forget, retain)

    with start("circuit_breakers") as started:
        baseline = Recording(started.model, started.forget[:1], started.retain, rate=1e-2, epochs=9, seed=0)
        baseline.epoch()
        with torch.no_grad():
            folded = baseline.states(baseline.forget[0])
        baseline.epoch()
        torch.testing.assert_close(baseline.seen, folded, rtol=1e-4, atol=1e-4)
        baseline.close()


@pytest.mark.parametrize("name", REPRESENTATION)
def test_layers_above_the_last_are_not_run(model, start, name):
    with torch.no_grad():
        for parameter in model.model.layers[3].parameters():
            parameter.fill_(float("nan"))
    with start(name) as baseline:
        baseline.epoch()


@each
def test_only_the_trained_weights_change_and_closing_restores_the_rest(model, start, unchanged, name):
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.norm.weight.requires_grad_(False)
    unchanged(model)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    with start(name) as baseline:
        hooks = [len(module._forward_hooks) for module in model.modules()]
        baseline.epoch()
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        trained = {id(p) for p in baseline.trained}
        after_epoch = [p.detach().clone() for p in baseline.trained]
    unchanged(model, weights=False)
    changed = {id(p) for p in model.parameters() if not torch.equal(p, before[id(p)])}
    assert changed == trained
    assert all(torch.equal(a, b) for a, b in zip(after_epoch, baseline.trained, strict=True))


@each
def test_the_same_seed_gives_the_same_weights(model, start, name):
    original = {key: value.clone() for key, value in model.state_dict().items()}
    results = []
    for seed in (0, 0, 1):
        model.load_state_dict(original)
        torch.rand(3)  # the global generator is not asked
        with start(name, seed=seed) as baseline:
            baseline.epoch()
            results.append(torch.cat([weight.detach().flatten().clone() for weight in baseline.trained]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) == (name in LIKELIHOOD)


@each
def test_each_forget_batch_meets_the_next_retain_batch(start, name, monkeypatch):
    with start(name) as baseline:
        pairs = []
        loss = baseline.loss
        monkeypatch.setattr(baseline, "loss", lambda *pair: pairs.append(pair) or loss(*pair))
        baseline.epoch()
        baseline.epoch()
        assert pairs == [(0, 0), (1, 1), (2, 0), (0, 1), (1, 0), (2, 1)]


@each
def test_a_loss_that_is_not_finite_is_an_error(model, start, unchanged, name):
    unchanged(model)
    with start(name) as baseline:
        norm = model.model.layers[0].input_layernorm.weight
        kept = norm.detach().clone()
        with torch.no_grad():
            norm.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="expected a finite loss, got nan"):
            baseline.epoch()
        with torch.no_grad():
            norm.copy_(kept)
    unchanged(model, weights=name != "circuit_breakers")  # whose B does not start at 0


def test_a_baseline_that_cannot_start_leaves_the_model_alone(model, start, unchanged):
    unchanged(model)
    with pytest.raises(ValueError, match="expected forget and retain batches, got 0 and 2"):
        start("npo", forget=[])
    with pytest.raises(IndexError):
        start("npo", forget=[pad([[1, 9999]])])
    unchanged(model)
