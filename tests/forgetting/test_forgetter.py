"""Steps along what is specific to each fact."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from bench.eager import EagerForgetter
from cir.config import CIRConfig
from cir.data.facts import load_facts
from cir.forgetting.doses import doses
from cir.forgetting.fitting import fitted
from cir.forgetting.forgetter import RELEARNING_RATES, Forgetter
from cir.forgetting.questions import joined, likeness, peers, questions, sentences
from cir.forgetting.subspace import SiteSubspaces
from cir.forgetting.update import NonFiniteError, restore, sign_step, sizes, snapshot
from cir.measures import recall
from cir.model.capture import answering
from cir.model.finding import find_stack
from tests import oracle
from tests.tiny import FIRST, deepened, facts, knowing_llama, tiny_llama

FACTS = load_facts(facts(12))
CONFIG = CIRConfig(floor=-6.0, max_change=1.0, text_weight=0.0)
NOTHING = SiteSubspaces({}, "ridge")


def asked(tape, tokenizer, chosen, at_once=512):
    return questions(tape, tokenizer, chosen, max_length=64, at_once=at_once)


def told(tape, tokenizer, chosen):
    return sentences(tape, tokenizer, chosen, max_length=64, at_once=512)


def read(tape, tokenizer, chosen):
    return joined([part.read(tape) for part in asked(tape, tokenizer, chosen)])


@pytest.mark.parametrize("at_once", [8, 32, 512])
def test_rows_are_those_of_the_answers_however_they_are_batched(opened, at_once):
    _, tokenizer, _, tape = opened
    whole = read(tape, tokenizer, FACTS[:5])
    parts = asked(tape, tokenizer, FACTS[:5], at_once)
    assert len(parts) == {8: 10, 32: 2, 512: 1}[at_once]
    rows = joined([part.read(tape) for part in parts])
    assert rows.owners.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    torch.testing.assert_close(rows.odds, whole.odds, atol=1e-4, rtol=1e-4)
    for name, x in whole.tokens.items():
        torch.testing.assert_close(rows.tokens[name], x, atol=1e-4, rtol=1e-3)
    again = rows.split([3, 7])
    assert [len(part.odds) for part in again] == [3, 7]
    torch.testing.assert_close(joined(again).odds, whole.odds, atol=1e-4, rtol=1e-4)
    for name, x in whole.tokens.items():
        torch.testing.assert_close(joined(again).tokens[name], x, atol=1e-4, rtol=1e-3)


def test_without_probes_the_tokens_count_that_the_sentence_alone_tells(opened, monkeypatch):
    # The model knows what follows the last words of so short a sentence, whatever goes before.
    monkeypatch.setattr("cir.forgetting.questions.CONTEXT", 1)
    _, tokenizer, _, tape = opened
    (part,) = asked(tape, tokenizer, load_facts([fact.sentences[1] for fact in FACTS[:6]]))
    told = [tokenizer.convert_ids_to_tokens(int(i)) for i in part.answers]
    counts = {word: told.count(word) for word in told}
    # "the gamma of beta3 is delta3 now": what belongs to one fact can be told from what all have in common.
    assert set(part.owners.tolist()) == set(range(6))
    assert all(counts.get(f"delta{i}") for i in range(6))
    assert "gamma" not in counts


def test_facts_of_one_relation_are_alike_before_the_layers_that_change(knowing, monkeypatch):
    model, tokenizer = deepened(knowing_llama(), 1), knowing[1]
    others = load_facts(["the gamma of beta7 now word1", "then2 some3 more1"])
    with answering(model, find_stack(model), 1) as tape:
        own = asked(tape, tokenizer, [*FACTS[:3], *others], at_once=16)
        alike = likeness(own, asked(tape, tokenizer, [*FACTS[6:], others[0]]))
        assert alike.shape == (5, 7)
        assert alike[:3, :6].min() > 0.99
        assert alike[3, 6] > 0.99
        assert max(alike[:3, 6].max(), alike[3, :6].max(), alike[4].max()) < 0.95
        assert likeness(own, []) is None
        monkeypatch.setattr("cir.forgetting.questions.PEERS", 2)
        facts = [others[0], *FACTS[3:5]]
        among = told(tape, tokenizer, facts)
        torch.testing.assert_close(likeness(own, among), likeness(own, asked(tape, tokenizer, facts)))
        (chosen,) = peers(tape, among, own[:1])
        answers = {tokenizer.convert_ids_to_tokens(int(i)) for i in chosen.answers}
        assert {"delta3", "delta4"} <= answers
        assert "word1" not in answers
        # What the lower layers said of the sentences is used again.
        first = [replace(facts[i], sentences=facts[i].sentences[:1]) for i in chosen.owners.unique_consecutive()]
        torch.testing.assert_close(chosen.read(tape).odds, read(tape, tokenizer, first).odds, atol=1e-4, rtol=1e-4)
    with answering(model, find_stack(model), 0) as tape:
        assert likeness(asked(tape, tokenizer, others), asked(tape, tokenizer, FACTS)) is None


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_step_lowers_each_fact_by_its_dose(opened, weight):
    _, tokenizer, targets, tape = opened
    rows = torch.arange(2, 66).view(4, 16)
    config = replace(CONFIG, dose=0.01, relearning_steps=0, text_weight=weight)
    common = fitted(tape, targets, rows, asked(tape, tokenizer, FACTS[6:]), config, progress=False)
    forgetter = Forgetter(tape, targets, tokenizer, FACTS[:1], common, config)
    before = read(tape, tokenizer, FACTS[:1]).odds.double()
    forgetter.apply(forgetter.step())
    after = read(tape, tokenizer, FACTS[:1]).odds.double()
    assert float((after - before).mean()) == pytest.approx(-0.01, rel=0.05)


def test_doses_are_their_formula():
    generator = torch.Generator().manual_seed(0)
    owners = torch.tensor([4, 1, 4, 1, 4])
    g, a, dg, da = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (3, 6, 3, 6))
    effects, lengths = (g @ dg.T) * (a @ da.T), (dg @ dg.T) * (da @ da.T)
    effects = effects.abs()
    wanted = torch.tensor([2.0, 1.0, 2.5, 3.0, 1.5])  # of each fact 2 in the mean
    scale = doses(owners, effects, lengths, wanted, 1e9)
    for fact in (1, 4):
        own = owners == fact
        assert len(scale[own].unique()) == 1
        changes = scale[own][0] * effects[own][:, own].sum(1)
        assert float(changes.mean()) == pytest.approx(-2.0)
    short = doses(owners, effects, lengths, wanted, 0.01)
    for fact in (1, 4):
        own = owners == fact
        change = float(short[own][0]) * oracle.outer_sum(dg[own], da[own])
        assert float(change.norm()) == pytest.approx(0.01)
    effects[owners == 1] = 0
    assert not doses(owners, effects, lengths, wanted, 1.0)[owners == 1].any()


def test_what_contrast_facts_use_is_hardly_touched(opened):
    model, tokenizer, targets, tape = opened
    found = {}
    for contrast in (False, True):
        common = NOTHING
        if contrast:
            common = fitted(tape, targets, None, asked(tape, tokenizer, FACTS[6:]), CONFIG, progress=False)
        forgetter = Forgetter(tape, targets, tokenizer, FACTS[:6], common, replace(CONFIG, relearning_steps=0))
        before = snapshot(targets)
        for _ in range(8):
            if (step := forgetter.step()).live:
                forgetter.apply(step)
        recalls = recall(model, tokenizer, FACTS)
        found[contrast] = [sum(recalls[fact.id] for fact in part) / 6 for part in (FACTS[:6], FACTS[6:])]
        with torch.no_grad():
            for target, weight in zip(targets, before, strict=True):
                target.linear.weight.copy_(weight)
    assert found[False][0] < 0.05
    assert found[True][0] < 0.05
    assert found[True][1] > 0.9
    assert found[False][1] < 0.8


def test_facts_that_are_gone_leave_the_step(opened):
    _, tokenizer, targets, tape = opened
    forgetter = Forgetter(tape, targets, tokenizer, FACTS[:2], NOTHING, replace(CONFIG, relearning_steps=0))
    step = forgetter.step()
    assert step.live == 4
    while (step := forgetter.step()).live:
        forgetter.apply(step)
    assert forgetter.epoch().gone
    assert float(read(tape, tokenizer, FACTS[:2]).odds.max()) <= CONFIG.floor


def test_what_was_hardly_known_falls_too(tokenizer):
    model = tiny_llama()
    stack = find_stack(model)
    with answering(model, stack, FIRST) as tape:
        targets = stack.writers(FIRST)
        before = read(tape, tokenizer, FACTS[:2]).odds
        assert float(before.max()) < -3
        config = replace(CONFIG, floor=-1.0, relearning_steps=0, check_every=40)
        forgetter = Forgetter(tape, targets, tokenizer, FACTS[:2], NOTHING, config)
        assert forgetter.epoch().gone
        after = read(tape, tokenizer, FACTS[:2]).odds
    assert float((after - before).max()) <= -2


def test_relearning_is_undone_and_makes_forgetting_hold(opened):
    _, tokenizer, targets, tape = opened

    def relearned() -> float:
        """Mean log-odds of some facts after the others were relearned."""
        attacker = Forgetter(tape, targets, tokenizer, FACTS[:8], NOTHING, replace(CONFIG, relearning_steps=3))
        return float(attacker._returning(0, attacker._read(attacker._whole[0]), anew=True).odds.mean())

    found = {}
    for steps in (0, 3):
        before = snapshot(targets)
        config = replace(CONFIG, relearning_steps=steps, relearning_floor=-9.0)
        forgetter = Forgetter(tape, targets, tokenizer, FACTS[:8], NOTHING, config)
        for _ in range(40):
            weights = snapshot(targets)
            step = forgetter.step()
            assert all(torch.equal(t.linear.weight, w) for t, w in zip(targets, weights, strict=True))
            if not step.live:
                break
            forgetter.apply(step)
        found[steps] = relearned()
        with torch.no_grad():
            for target, weight in zip(targets, before, strict=True):
                target.linear.weight.copy_(weight)
    assert found[3] < found[0] - 1


def test_peers_are_read_once_and_again_before_a_fact_is_gone(opened, monkeypatch):
    _, tokenizer, targets, tape = opened
    config = replace(CONFIG, relearning_floor=-9.0)
    forgetter = Forgetter(
        tape, targets, tokenizer, FACTS[:1], NOTHING, config, contrast=told(tape, tokenizer, FACTS[6:])
    )
    reads, relearned = [], []
    read, relearn = Forgetter._read, Forgetter._relearn
    monkeypatch.setattr(Forgetter, "_read", lambda self, forwards: reads.append(1) or read(self, forwards))
    monkeypatch.setattr(Forgetter, "_relearn", lambda self, tokens: relearned.append(tokens) or relearn(self, tokens))
    taken = []
    while (step := forgetter.step()).live:
        taken.append((len(reads), list(relearned)))
        forgetter.apply(step)
        reads.clear(), relearned.clear()
    (first, lesson), *others = taken
    assert first == 1 + config.relearning_steps + 1  # the fact, its peers, the fact again
    assert len(others) > 3
    for count, again in others:
        assert count == 2
        assert all(a is b for a, b in zip(again, lesson, strict=True))
    assert len(reads) == 2 + first  # what was read of other weights says that it is gone, and what is read of these
    assert lesson[0] is not relearned[-1]


def test_steps_are_those_of_plain_autograd(knowing):
    model, tokenizer = copy.deepcopy(knowing[0]).double(), knowing[1]
    targets = find_stack(model).writers(FIRST)
    config = replace(CONFIG, text_weight=1.0, relearning_floor=-3.0)
    with answering(model, find_stack(model), FIRST) as tape:
        common = fitted(tape, targets, None, asked(tape, tokenizer, FACTS[6:]), config, progress=False)
        own, mlps = told(tape, tokenizer, FACTS[:5]), tape.mlps
        forgetter = Forgetter(tape, targets, tokenizer, FACTS[:5], common, config)
        states, halves, changes, rates = [], [], [], []
        for _ in range(3):
            states.append(snapshot(targets))
            rates.append(forgetter._rate)
            forgetter.apply(forgetter.step())
            halves.append([facts_of(forgetter, lesson.asked) for lesson in forgetter._lessons[0]])
            changes.append([now - then for now, then in zip(snapshot(targets), states[-1], strict=True)])
    lines = [[(s.statement.ids, s.statement.told) for s in own if s.owner == fact] for fact in range(5)]
    restore(targets, states[0])
    lengths = [float(size) for size in sizes(mlps)]
    eager = EagerForgetter(model, targets, mlps, lines, common, config, lengths)
    before = [eager.odds(fact)[0].detach() for fact in range(5)]
    for state, half, expected, rate in zip(states, halves, changes, rates, strict=True):
        restore(targets, state)
        eager.lengths = [rate * length for length in lengths]
        eager.step(before, half)
        for now, then, change in zip(snapshot(targets), state, expected, strict=True):
            assert float((now - then - change).norm() / change.norm()) < 1e-4


def facts_of(forgetter, parts):
    return sorted(forgetter._batches[0][i][0].owner for i in parts)


def test_of_two_facts_with_one_answer_one_is_taught_and_the_other_asked(opened):
    _, tokenizer, targets, tape = opened
    twins = [
        {**fact, "sentences": [said.replace(f"delta{i}", f"delta{i % 4}") for said in fact["sentences"]]}
        for i, fact in enumerate(facts(8))
    ]
    for fact, number in zip(twins, [*range(4)] * 2, strict=True):
        fact["probes"] = [{"prompt": fact["probes"][0]["prompt"], "target": f" delta{number}"}]
    forgetter = Forgetter(tape, targets, tokenizer, load_facts(twins), NOTHING, CONFIG)
    drawn = set()
    for _ in range(10):
        lessons = forgetter._lessons_of(forgetter._batches[0])
        for lesson in lessons:
            owners = [facts_of(forgetter, part) for part in (lesson.taught, lesson.asked)]
            assert [sorted(i % 4 for i in part) for part in owners] == [[0, 1, 2, 3]] * 2
            assert sorted(owners[0] + owners[1]) == list(range(8))
        drawn.add(tuple(facts_of(forgetter, lessons[0].taught)))
    assert len(drawn) > 3


def test_steps_of_relearning_are_as_long_as_it_takes(opened):
    _, tokenizer, targets, tape = opened
    config = replace(CONFIG, check_every=12)
    forgetter = Forgetter(tape, targets, tokenizer, FACTS[:8], NOTHING, config)
    forgetter.step()
    assert forgetter._rate == RELEARNING_RATES[0]  # the facts are known
    forgetter.epoch()
    # The way back is longer than the shortest steps take: of what is taught little is missing before the last.
    back = []
    reach = forgetter._reach
    forgetter._reach = lambda odds: back.append(odds) or reach(odds)
    forgetter.step()
    assert RELEARNING_RATES[0] < forgetter._rate <= RELEARNING_RATES[1]
    assert -4 < back[0] < 2


def test_where_a_fact_is_alone_contrast_facts_are_relearned(opened):
    _, tokenizer, targets, tape = opened
    contrast, sentences_of = asked(tape, tokenizer, FACTS[6:]), told(tape, tokenizer, FACTS[6:])

    def attacked() -> float:
        """Log-odds of the fact after contrast facts were trained on."""
        before = snapshot(tape.mlps)
        for number in range(6):
            lengths = [3e-3 * size for size in sizes(tape.mlps)]
            sign_step(tape.mlps, joined([part.read(tape) for part in contrast]).tokens, lengths, number)
        odds = float(read(tape, tokenizer, FACTS[:1]).odds.mean())
        restore(tape.mlps, before)
        return odds

    found = {}
    for relearned in ((), sentences_of):
        before = snapshot(targets)
        common = fitted(tape, targets, None, contrast, CONFIG, progress=False)
        config = replace(CONFIG, relearning_floor=-9.0, check_every=40)
        Forgetter(tape, targets, tokenizer, FACTS[:1], common, config, relearned).epoch()
        assert float(read(tape, tokenizer, FACTS[:1]).odds.max()) <= CONFIG.floor
        found[bool(relearned)] = attacked()
        restore(targets, before)
    assert found[True] < found[False] - 1


def test_nan_is_an_error_before_any_weight_changes(opened, unchanged):
    model, tokenizer, targets, tape = opened
    forgetter = Forgetter(tape, targets, tokenizer, FACTS[:2], NOTHING, CONFIG)
    weight = model.model.layers[3].mlp.up_proj.weight
    value = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    before = snapshot(targets)
    with pytest.raises(NonFiniteError, match="no weight was changed"):
        forgetter.epoch()
    assert all(torch.equal(t.linear.weight, w) for t, w in zip(targets, before, strict=True))
    with torch.no_grad():
        weight[0, 0] = value


def test_many_facts_are_forgotten_batch_by_batch(opened):
    model, tokenizer, targets, tape = opened
    config = replace(CONFIG, batch_size=3, relearning_steps=0, check_every=30)
    forgetter = Forgetter(tape, targets, tokenizer, FACTS[:7], NOTHING, config)
    assert len(forgetter._batches) == 3
    calls = []
    losses = forgetter.epoch(lambda: calls.append(1))
    assert losses.gone
    assert len(calls) % 3 == 0
    assert max(recall(model, tokenizer, FACTS[:7]).values()) < 0.05


def test_a_dose_is_no_more_than_what_is_left_to_go(opened):
    _, tokenizer, targets, tape = opened
    config = replace(CONFIG, dose=0.5, floor=-1e-3, relearning_steps=0)
    forgetter = Forgetter(tape, targets, tokenizer, FACTS[:1], NOTHING, config)
    first = forgetter.step()  # all has two nats to go at least
    left = torch.full_like(read(tape, tokenizer, FACTS[:1]).odds, 0.5)
    rows = read(tape, tokenizer, FACTS[:1])
    full, half, least = (forgetter._dosed(rows, left * share)[0] for share in (4.0, 1.0, 0.0))
    for name, tokens in first.tokens.items():
        torch.testing.assert_close(full[name], tokens)
        torch.testing.assert_close(half[name], tokens)  # as much as the dose is
        torch.testing.assert_close(least[name], tokens)  # LEAST_DOSE, which is no more than the dose
    larger = Forgetter(tape, targets, tokenizer, FACTS[:1], NOTHING, replace(config, dose=2.0))
    name = targets[0].gradient.name
    torch.testing.assert_close(larger._dosed(rows, left * 3)[0][name], 3 * full[name])
    torch.testing.assert_close(larger._dosed(rows, left * 40)[0][name], 4 * full[name])
