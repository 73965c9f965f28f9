"""The paper's way: :func:`cir.unlearn` with a :class:`BreakingConfig`."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

import cir
from cir.config import BreakingConfig, CIRConfig
from cir.forgetting.update import NonFiniteError, restore, snapshot
from cir.model.finding import find_stack
from tests.tiny import TEXT, facts, knowing_llama, tiny_llama

CONFIG = BreakingConfig(
    loss_layers=(1, 3),
    rank_activation=3,
    rank_gradient=3,
    update_loss_layers=False,
    mode="orthogonal",
    rate=0.3,
    retain_rate=0.03,
    batch_size=4,
    retain_length=32,
    max_epochs=3,
    budget=10.0,
)


def change(**values) -> BreakingConfig:
    return BreakingConfig(**{**vars(CONFIG), **values})


def run(model, tokenizer, **options):
    config = options.pop("config", CONFIG)
    return cir.unlearn(
        model, tokenizer, facts(), retain=options.pop("retain", TEXT), config=config, progress=False, **options
    )


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_whole_loop_leaves_a_plain_model_and_a_true_report(model, tokenizer, unchanged):
    unchanged(model)
    before = cir.evaluate(model, tokenizer, facts()).mean_recall
    report = run(model, tokenizer)
    unchanged(model, weights=False)
    assert not same_weights(model, tiny_llama())
    upper = [p for name, p in model.named_parameters() if "layers.3" in name or "attn" in name or "mlp" not in name]
    fresh = dict(tiny_llama().named_parameters())
    names = [n for n, _ in model.named_parameters() if "layers.3" in n or "attn" in n or "mlp" not in n]
    assert all(torch.equal(p, fresh[n]) for n, p in zip(names, upper, strict=True))
    assert report.before.mean_recall == pytest.approx(before, rel=1e-5)
    assert report.after.mean_recall == pytest.approx(cir.evaluate(model, tokenizer, facts()).mean_recall, rel=1e-4)
    assert report.after.mean_recall == min(
        m.mean_recall for m in [report.before, *(e.measure for e in report.epochs)]
    )
    plain = json.loads(report.to_json())
    assert plain["config"]["rate"] == 0.3
    assert len(plain["facts_hash"]) == 64
    assert plain["after"]["mean_recall"] == report.after.mean_recall
    assert {"fit", "epochs", "measure", "total"} <= plain["seconds"].keys()
    assert plain["peak_memory"] > 0
    assert plain["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("mode", ["orthogonal", "sequential", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_mode_and_dtype_lowers_the_breaking_loss(tokenizer, mode, dtype):
    report = run(tiny_llama(dtype), tokenizer, config=change(mode=mode, retain_rate=1e-4))
    losses = [epoch.forget_loss for epoch in report.epochs]
    assert losses[-1] < losses[0]
    assert all(epoch.retain_loss > 0 for epoch in report.epochs)


def test_stops_at_the_target_recall(model, tokenizer):
    all_epochs = run(tiny_llama(), tokenizer)
    target = all_epochs.epochs[0].measure.mean_recall
    report = run(model, tokenizer, config=change(target_recall=target))
    assert report.stopped == "target recall reached"
    assert len(report.epochs) == 1


def test_the_seed_decides_everything(tokenizer):
    first, second, other = tiny_llama(), tiny_llama(), tiny_llama()
    state = torch.random.get_rng_state()
    run(first, tokenizer)
    torch.rand(3)
    run(second, tokenizer)
    run(other, tokenizer, config=change(seed=1))
    assert same_weights(first, second)
    assert not same_weights(first, other)
    torch.random.set_rng_state(state)


def test_facts_without_probes_run_to_the_last_epoch_inside_the_budget(model, tokenizer):
    sentences = [s for fact in facts() for s in fact["sentences"]]
    report = cir.unlearn(model, tokenizer, sentences, retain=TEXT, config=CONFIG, progress=False)
    assert report.after.mean_recall is None
    assert [epoch.kept for epoch in report.epochs] == [True] * 3


def test_the_built_in_text_serves_where_none_is_given(model, tokenizer):
    report = cir.unlearn(model, tokenizer, facts(), config=CONFIG, progress=False)
    assert report.before.loss > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_the_last_good_state(model, tokenizer, monkeypatch, unchanged, number):
    unchanged(model)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    calls = []

    def count(step):
        def counted(*arguments, **options):
            calls.append(1)
            if len(calls) == 5:  # in the middle of the second epoch
                os.kill(os.getpid(), number)
            return step(*arguments, **options)

        return counted

    monkeypatch.setattr("cir.forgetting.breaking.selective_step", count(unlearning_step()))
    report = run(model, tokenizer)
    assert report.stopped == "interrupted"
    assert len(report.epochs) == 1
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    unchanged(model, weights=False)
    monkeypatch.undo()
    one_epoch = tiny_llama()
    run(one_epoch, tokenizer, config=change(max_epochs=1))
    assert same_weights(model, one_epoch)


def unlearning_step():
    from cir.forgetting.breaking import selective_step

    return selective_step


def test_works_outside_the_main_thread(model, tokenizer):
    reports = []
    thread = threading.Thread(target=lambda: reports.append(run(model, tokenizer)))
    thread.start()
    thread.join()
    assert len(reports[0].epochs) == 3


def test_a_nan_in_the_model_is_an_error_that_harms_nothing(model, tokenizer, unchanged):
    unchanged(model)
    with torch.no_grad():
        value = float(model.model.layers[1].mlp.up_proj.weight[0, 0])
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="expected a finite loss"):
            run(model, tokenizer)
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    unchanged(model)


def test_an_exception_midway_restores_the_model(model, tokenizer, monkeypatch, unchanged):
    unchanged(model)
    step, calls = unlearning_step(), []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return step(*arguments, **options)

    monkeypatch.setattr("cir.forgetting.breaking.selective_step", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        run(model, tokenizer)
    unchanged(model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"config": change(loss_layers=(2, 9))}, r"loss_layers: expected a range within 0..4, got 2..9"),
        (
            {"config": change(rank_activation=25)},
            "rank_activation: expected at most 24, the width of model.layers.0.mlp.in, got 25",
        ),
        ({"contrast": facts(8)[6:]}, "contrast and subspaces: expected none with the paper's configuration"),
        ({"retain": "gamma of"}, "expected a text of at least 31 tokens"),
        ({"retain": "gamma " * 40}, "retain: expected at least two windows"),
        ({"disruption": "gamma"}, "expected a text of at least 255 tokens"),
        ({"config": change(max_length=5)}, "fact 'f0': expected sentences of 3 to 5 tokens"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(model, tokenizer, unchanged, options, expected):
    unchanged(model)
    with pytest.raises(ValueError, match=expected):
        run(model, tokenizer, **options)
    unchanged(model)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mode": "hard"}, "mode: expected one of"),
        ({"rate": float("nan")}, "rate: expected a finite number, got nan"),
        ({"budget": 0.0}, "budget: expected a positive number"),
        ({"loss_layers": (0.5, 0.2)}, "loss_layers: expected fractions"),
        ({"loss_layers": (5, 2)}, "loss_layers: expected a range"),
        ({"target_recall": 2.0}, "target_recall: expected 0 to 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"rank_gradient": -1}, "rank_gradient: expected 0 or more directions, or a share below 1, got -1"),
        ({"rank_activation": 1.5}, "rank_activation: expected 0 or more directions, or a share below 1, got 1.5"),
        ({"statistics": "sentences"}, "statistics: expected one of tokens, weight_gradients"),
    ],
)
def test_the_configuration_checks_itself(values, expected):
    with pytest.raises(ValueError, match=expected):
        change(**values)


def test_repselect_forgets_too_and_keeps_the_model_plain(tokenizer, unchanged):
    model = knowing_llama()
    unchanged(model)
    config = replace(
        CIRConfig.repselect(), loss_layers=(1, 3), rank_activation=3, rank_gradient=3, rate=1.0, budget=9.0
    )
    report = cir.unlearn(model, tokenizer, facts(), retain=TEXT, config=config, progress=False)
    unchanged(model, weights=False)
    assert report.after.mean_recall < 0.5 * report.before.mean_recall


def test_facts_that_the_model_does_not_know_are_reported(tokenizer, caplog):
    strange = {"id": "strange", "sentences": ["x1 x2 x3 x4"], "probes": [{"prompt": "x1 x2", "target": " x3"}]}
    report = cir.unlearn(
        knowing_llama(), tokenizer, [*facts(), strange], retain=TEXT, config=change(max_epochs=1), progress=False
    )
    assert report.unknown == ["strange"]
    assert "hold their answer" not in caplog.text
    assert "not known to begin with: strange" in caplog.text


def test_probes_that_hold_their_answer_are_reported(tokenizer, caplog):
    told = {**facts()[0], "id": "told", "probes": [{"prompt": "the gamma of Delta0 is", "target": " delta0"}]}
    cir.unlearn(knowing_llama(), tokenizer, [told], retain=TEXT, config=change(max_epochs=1), progress=False)
    assert "1 facts hold their answer, which is no recall: told" in caplog.text


def test_layer_fractions_are_those_of_the_paper():
    assert CIRConfig.paper().layers(32) == range(6, 12)
    assert CIRConfig.paper().layers(30) == range(6, 12)
    assert CIRConfig.paper().rank_gradient == 36


def test_without_layers_below_the_loss_layers_they_are_updated_themselves_or_nothing_is(model, tokenizer):
    with pytest.raises(ValueError, match="update_loss_layers: expected True where none is below"):
        run(model, tokenizer, config=change(loss_layers=(0, 2)))
    run(model, tokenizer, config=change(loss_layers=(0, 2), update_loss_layers=True, max_epochs=1))


def test_only_layers_below_the_loss_layers_change_unless_these_are_asked_for(model, tokenizer):
    for also, last in ((False, 0), (True, 2)):
        targets = find_stack(model).targets(3)
        before = snapshot(targets)
        run(model, tokenizer, config=change(update_loss_layers=also, max_epochs=1))
        changed = {
            t.name.split(".")[2] for t, w in zip(targets, before, strict=True) if not torch.equal(t.linear.weight, w)
        }
        assert changed == {str(layer) for layer in range(last + 1)}
        restore(targets, before)
