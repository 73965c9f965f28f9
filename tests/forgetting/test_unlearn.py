"""The whole of :func:`cir.unlearn`, on a model that knows a few facts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import cir
from cir.config import CIRConfig
from cir.data.facts import load_facts
from cir.data.shipped import builtin_contrast
from cir.forgetting import counterfactuals
from cir.forgetting.forgetter import RELEARNING_RATES, Forgetter
from cir.forgetting.update import NonFiniteError
from cir.model.finding import find_stack
from tests.forgetting.test_breaking import CONFIG as PAPER
from tests.model.test_sites import build
from tests.tiny import TEXT, deepened, facts, knowing_llama, tiny_llama, word_tokenizer

FACTS = load_facts(facts(12))
GO, STAY = FACTS[:4], FACTS[6:]
CONFIG = CIRConfig(layers=0.5, budget=9.0, worst_window=9.0, floor=-6.0, relearning_steps=0, max_steps=20)


@pytest.fixture
def model():
    return knowing_llama()


def run(model, tokenizer, **options):
    options = {"contrast": STAY, "retain": TEXT, "config": CONFIG, **options}
    return cir.unlearn(model, tokenizer, options.pop("facts", GO), progress=False, **options)


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_forgets_the_facts_keeps_the_contrast_and_reports_what_is_so(model, tokenizer, unchanged):
    unchanged(model)
    report = run(model, tokenizer)
    unchanged(model, weights=False)
    assert report.stopped == "forgotten"
    assert not report.unforgotten
    assert report.chosen["counterfactuals"] > 0
    assert RELEARNING_RATES[0] <= report.chosen["relearning_rate"] <= RELEARNING_RATES[1]
    assert report.chosen["directions_left"].keys() == {"activation", "gradient"}
    assert report.before.mean_recall > 0.9
    assert report.after.mean_recall < 0.03
    assert report.after.mean_recall == pytest.approx(cir.evaluate(model, tokenizer, GO).mean_recall, rel=1e-4)
    assert cir.evaluate(model, tokenizer, STAY).mean_recall > 0.95
    names = {
        n for n, p in knowing_llama().named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])
    }
    assert names == {f"model.layers.{n}.{m}.weight" for n in (2, 3) for m in ("self_attn.o_proj", "mlp.down_proj")}
    plain = json.loads(report.to_json())
    assert plain["config"]["dose"] == 2.0
    assert any(epoch["kept"] for epoch in plain["epochs"])
    assert plain["epochs"][-1]["forget_loss"] < 0
    assert {"fit", "epochs", "measure", "total"} <= plain["seconds"].keys()
    assert plain["predicted_memory"] > 0


@pytest.fixture(scope="module")
def report():
    few = replace(CONFIG, check_every=1, max_steps=2)
    return run(knowing_llama(), word_tokenizer(), config=few)


def test_a_report_is_plain_data(report):
    assert report.to_dict() == json.loads(report.to_json())
    assert report.to_dict()["layers"] == list(report.layers)
    assert replace(report, peak_memory=float("nan")).to_dict()["peak_memory"] is None


def test_a_report_is_a_table_of_its_epochs(report, monkeypatch):
    class DataFrame(NamedTuple):
        rows: list
        columns: list

    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=DataFrame))
    rows, columns = report.to_frame()
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [
        {
            "epoch": epoch.number,
            "recall": epoch.measure.mean_recall,
            **{name: getattr(epoch, name) for name in ("rate", "forget_loss", "retain_loss", "kept")},
            **{name: getattr(epoch.measure, name) for name in ("loss", "rise", "rise_stderr", "worst")},
        }
        for epoch in report.epochs
    ]
    assert replace(report, epochs=[]).to_frame().columns == columns
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_frame: expected the package pandas, which is not installed"):
        report.to_frame()


def test_a_report_is_drawn(report, tmp_path):
    report.plot(tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    unprobed = replace(report, before=replace(report.before, recall={}))
    with pytest.raises(ValueError, match="plot: expected facts with probes"):
        unprobed.plot(tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_every_dtype(tokenizer, dtype):
    report = run(knowing_llama(dtype), tokenizer)
    assert report.after.mean_recall < 0.1 * report.before.mean_recall


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_other_families_step_too(family, tokenizer, unchanged):
    model = build(family, vocab_size=len(tokenizer)).eval()
    unchanged(model)
    report = run(model, tokenizer, config=replace(CONFIG, max_steps=2))
    unchanged(model, weights=False)
    assert report.after.mean_recall < report.before.mean_recall


def test_facts_that_are_not_all_forgotten_are_named(model, tokenizer, caplog):
    report = run(model, tokenizer, config=replace(CONFIG, max_steps=1))
    assert report.stopped == "all epochs done"
    assert report.unforgotten == [fact.id for fact in GO]
    assert "4 facts are not all forgotten: f0, f1, f2, f3" in caplog.text


def test_what_was_fitted_once_serves_in_place_of_contrast(model, tokenizer, monkeypatch):
    other = knowing_llama()
    monkeypatch.setattr(counterfactuals, "SENTENCES", 0)  # which are of the facts
    subspaces = cir.Subspaces.fit(model, tokenizer, TEXT, STAY, config=CONFIG, progress=False)
    disruption = {"retain": TEXT, "disruption": TEXT}
    run(model, tokenizer, contrast=None, subspaces=subspaces, **disruption)
    run(other, tokenizer, **disruption)
    assert same_weights(model, other)
    with pytest.raises(ValueError, match="subspaces: expected those of this model"):
        run(tiny_llama(), tokenizer, contrast=None, subspaces=subspaces)
    with pytest.raises(ValueError, match="either contrast or subspaces"):
        run(knowing_llama(), tokenizer, subspaces=subspaces)
    with pytest.raises(ValueError, match="contrast: expected facts that must stay, got 'f7' with the id of 'f7'"):
        run(knowing_llama(), tokenizer, facts=FACTS[7:8], contrast=None, subspaces=subspaces)


def test_facts_without_contrast_of_their_relation_are_warned_of(model, tokenizer, caplog):
    few = replace(CONFIG, max_steps=1, layers=0.8)
    run(deepened(model, 1), tokenizer, facts=GO[:2], config=few)
    assert "no contrast fact" not in caplog.text
    run(deepened(knowing_llama(), 1), tokenizer, facts=GO[:2], contrast=(), config=few)
    assert "2 facts have no contrast fact of the same relation (similarity 0.00 at most" in caplog.text


def test_built_in_facts_are_the_contrast_where_none_is_given(tokenizer):
    models = [knowing_llama() for _ in range(3)]
    for model, contrast in zip(models, (None, builtin_contrast(GO), ()), strict=True):
        run(model, tokenizer, contrast=contrast)
    assert same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2])


def test_sentences_alone_are_forgotten(model, tokenizer):
    sentences = [fact.sentences[1] for fact in GO]
    report = run(model, tokenizer, facts=sentences)
    assert report.after.mean_recall is None
    assert cir.evaluate(model, tokenizer, GO).mean_recall < 0.1
    assert cir.evaluate(model, tokenizer, STAY).mean_recall > 0.9


def test_stops_at_the_target_recall_and_at_the_budget(model, tokenizer):
    config = replace(CONFIG, check_every=1, target_recall=0.6)
    report = run(model, tokenizer, config=config)
    assert report.stopped == "target recall reached"
    assert 0.05 < report.after.mean_recall <= 0.6
    other = knowing_llama()
    report = run(other, tokenizer, contrast=None, config=replace(CONFIG, worst_window=1e-4), disruption=TEXT)
    assert report.after.worst <= 1e-4


def test_the_seed_decides_everything(tokenizer):
    first, second, other = (knowing_llama(torch.bfloat16) for _ in range(3))
    config = replace(CONFIG, relearning_steps=2)
    run(first, tokenizer, config=config)
    torch.rand(3)
    run(second, tokenizer, config=config)
    run(other, tokenizer, config=replace(config, seed=1))
    assert same_weights(first, second)
    assert not same_weights(first, other)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_the_last_good_state(model, tokenizer, monkeypatch, unchanged, number):
    unchanged(model)
    calls, step = [], Forgetter.step

    def counted(self, batch=0):
        calls.append(1)
        if len(calls) == 5:  # in the middle of the second epoch
            os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(Forgetter, "step", counted)
    config = replace(CONFIG, check_every=3)
    report = run(model, tokenizer, config=config)
    assert report.stopped == "interrupted"
    assert len(report.epochs) == 1
    unchanged(model, weights=False)
    monkeypatch.undo()
    three = knowing_llama()
    run(three, tokenizer, config=replace(config, max_steps=3))
    assert same_weights(model, three)


def test_works_outside_the_main_thread(model, tokenizer):
    reports = []
    thread = threading.Thread(target=lambda: reports.append(run(model, tokenizer)))
    thread.start()
    thread.join()
    assert reports[0].stopped == "forgotten"


def test_an_exception_or_a_nan_midway_restores_the_model(model, tokenizer, monkeypatch, unchanged):
    unchanged(model)
    calls, step = [], Forgetter.step

    def fail(self, batch=0):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Forgetter, "step", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            run(model, tokenizer)
    unchanged(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    value = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="expected a finite loss"):
        run(model, tokenizer)
    with torch.no_grad():
        weight[0, 0] = value
    unchanged(model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"contrast": FACTS[2:8]}, "contrast: expected facts that must stay, got 'f2' with the id of 'f2'"),
        (
            {"config": replace(CONFIG, rank=60)},
            "rank: expected at most 24, the width of .*self_attn.o_proj.in, got 60",
        ),
        ({"retain": "gamma of"}, "expected a text of at least 127 tokens"),
        ({"retain": "gamma " * 200}, "retain: expected at least two windows"),
        ({"disruption": "gamma"}, "expected a text of at least 255 tokens"),
        ({"config": replace(CONFIG, max_length=5)}, "fact 'f6': expected sentences of 2 to 5 tokens"),
        ({"config": replace(CONFIG, rounding="compensated")}, "rounding: expected bfloat16 weights"),
        ({"offload": "always"}, "offload: expected auto or never"),
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
        ({"layers": 0.0}, "layers: expected a share of the depth, above 0 and at most 1, got 0.0"),
        ({"dose": float("nan")}, "dose: expected a finite number, got nan"),
        ({"floor": 1.0}, "floor: expected log-odds below 0, got 1.0"),
        ({"rank": 1.5}, "rank: expected 1 or more directions, or a share above 0"),
        ({"text_weight": -1.0}, "text_weight: expected zero or more"),
        ({"check_every": 0}, "check_every: expected at least 1, got 0"),
        ({"worst_window": 0.0}, "worst_window: expected a positive number"),
    ],
)
def test_the_configuration_checks_itself(values, expected):
    with pytest.raises(ValueError, match=expected):
        CIRConfig(**values)


def test_the_layers_are_the_upper_share():
    assert CIRConfig().first_layer(30) == 21
    assert CIRConfig(layers=1.0).first_layer(4) == 0
    assert CIRConfig(layers=0.01).first_layer(4) == 3
    assert len(find_stack(tiny_llama()).writers(3)) == 2


@pytest.mark.parametrize(
    "around",
    [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("config", [cir.CIRConfig(layers=0.5, max_steps=2), PAPER], ids=["default", "paper"])
def test_what_the_caller_runs_under_changes_nothing(tokenizer, around, config):
    states = []
    for context in (contextlib.nullcontext(), around):
        model = tiny_llama()
        config = replace(config, budget=10.0, worst_window=10.0, retain_tokens=1024)
        with context:
            cir.unlearn(model, tokenizer, facts(), retain=TEXT, config=config, progress=False)
        states.append(list(model.parameters()))
    assert all(map(torch.equal, *states))
    assert not all(map(torch.equal, states[0], tiny_llama().parameters()))
