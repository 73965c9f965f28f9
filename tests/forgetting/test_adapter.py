"""Models that are unlearned by an adapter: their own weights stay as they are."""

from __future__ import annotations

import contextlib
import copy
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import cir
from cir.config import CIRConfig
from cir.forgetting.adapter import Delivery
from cir.forgetting.fitting import Subspaces
from cir.forgetting.forgetter import Forgetter
from cir.forgetting.memory import needed_to_forget
from cir.forgetting.report import Measure, Report
from cir.model.deltas import with_deltas
from cir.model.finding import find_stack
from tests.forgetting.test_unlearn import CONFIG, FACTS, GO, STAY, run
from tests.model.test_sites import build
from tests.quantized import QUANTIZERS, bits, int8, llm_int8, same
from tests.tiny import TEXT, knowing_llama, word_tokenizer

IDS = torch.arange(2, 40)[None]
REFUSED = "load the model without quantization, or give adapter=FOLDER"


@pytest.fixture(scope="module")
def knowing():
    return knowing_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def adapted(model, folder):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_a_quantized_model_forgets_by_an_adapter_and_stays_as_it_is(
    quantize, knowing, tokenizer, tmp_path, unchanged
):
    model = quantize(copy.deepcopy(knowing))
    unchanged(model)
    before, said = bits(model), logits(model)
    report = run(model, tokenizer, disruption=TEXT, adapter=tmp_path / "adapter", config=replace(CONFIG, seed=1))
    unchanged(model, weights=False)
    assert same(model, before)
    assert torch.equal(logits(model), said)
    assert report.stopped == "forgotten"
    assert report.before.mean_recall > 0.9
    assert report.after.mean_recall < 0.1 * report.before.mean_recall
    forgot = adapted(model, tmp_path / "adapter")
    found, kept = cir.evaluate(forgot, tokenizer, GO, text=TEXT), cir.evaluate(forgot, tokenizer, STAY)
    assert kept.mean_recall > 0.9 * cir.evaluate(model, tokenizer, STAY).mean_recall
    # Rounded to 8 bits once more where each linear reads it, what differs in the last place may differ in the eighth.
    near = 0.2 if quantize is llm_int8 else 1e-3
    assert report.after.mean_recall == pytest.approx(found.mean_recall, rel=near)
    assert report.after.loss == pytest.approx(found.loss, rel=near)
    assert report.before.loss == pytest.approx(cir.evaluate(model, tokenizer, GO, text=TEXT).loss, rel=near)
    assert 0.99 <= report.adapter.energy <= 1
    assert report.to_dict()["adapter"]["whole"]["mean_recall"] == report.adapter.whole.mean_recall < 0.1


def test_the_adapter_is_what_was_measured_to_the_last_places(knowing, tokenizer, tmp_path, monkeypatch):
    """And the deltas that were measured are no longer there."""
    model, measured = int8(copy.deepcopy(knowing)), []
    truncate = Delivery.truncate

    def watched(self, *given):
        truncate(self, *given)
        measured.append(logits(model))

    monkeypatch.setattr(Delivery, "truncate", watched)
    config = replace(CONFIG, disruption_tokens=64, full_check=True)
    report = run(model, tokenizer, config=config, adapter=tmp_path / "adapter")
    assert report.after.rise_stderr == 0
    (expected,) = measured
    torch.testing.assert_close(logits(adapted(model, tmp_path / "adapter")), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model), expected, atol=1e-2)


@pytest.mark.parametrize("relearning_steps", [0, 2])
def test_an_ordinary_model_stays_and_the_adapter_does_what_the_plain_run_did(
    relearning_steps, knowing, tokenizer, tmp_path, unchanged
):
    config = replace(CONFIG, relearning_steps=relearning_steps, adapter_rank=24, adapter_energy=1.0)
    plain, model = copy.deepcopy(knowing), copy.deepcopy(knowing)
    unchanged(model)
    in_place = run(plain, tokenizer, config=config)
    report = run(model, tokenizer, config=config, adapter=tmp_path / "adapter")
    unchanged(model)
    assert len(report.epochs) == len(in_place.epochs)
    assert report.after.mean_recall == pytest.approx(in_place.after.mean_recall, rel=0.01)
    assert report.adapter.energy == pytest.approx(1, abs=1e-5)
    merged = adapted(model, tmp_path / "adapter").merge_and_unload()
    for now, then, before in zip(merged.parameters(), plain.parameters(), model.parameters(), strict=True):
        assert (now - then).norm() <= 0.01 * (then - before).norm()
    assert not torch.allclose(logits(merged), logits(model), atol=1e-2)


def test_in_bfloat16_small_steps_are_not_lost(knowing, tokenizer, tmp_path):
    model = int8(copy.deepcopy(knowing).bfloat16())
    report = run(model, tokenizer, adapter=tmp_path / "adapter")
    assert report.after.mean_recall < 0.1 * report.before.mean_recall
    # peft computes what it adds in float32.
    found = cir.evaluate(adapted(model, tmp_path / "adapter"), tokenizer, GO).mean_recall
    assert found == pytest.approx(report.after.mean_recall, rel=0.3)


def test_rank_is_raised_before_anything_comes_back_and_what_is_lost_is_said(knowing, tokenizer, tmp_path, caplog):
    def ranked(name, **changes):
        report = run(copy.deepcopy(knowing), tokenizer, config=replace(CONFIG, **changes), adapter=tmp_path / name)
        return report, [r.getMessage() for r in caplog.records if "the adapter" in r.getMessage()]

    enough, said = ranked("enough", adapter_energy=0.99)
    raised, said = ranked("raised", adapter_energy=0.1)
    assert 1 < raised.adapter.rank <= enough.adapter.rank
    assert raised.adapter.energy > 0.5
    assert raised.after.mean_recall < raised.adapter.whole.mean_recall + 0.01
    assert not said
    little, (said,) = ranked("little", adapter_rank=1)
    assert little.adapter.rank == 1
    assert little.after.mean_recall > little.adapter.whole.mean_recall + 0.01
    assert f"the adapter holds {little.adapter.energy:.1%}".replace("%", " %") in said
    assert said.endswith(
        f"recall is {little.after.mean_recall:.3f} in place of {little.adapter.whole.mean_recall:.3f}: "
        "raise adapter_rank"
    )


def test_a_budget_that_what_is_left_out_breaks_is_told(knowing, tmp_path, caplog):
    stack = with_deltas(knowing, find_stack(knowing), 3)
    targets, ranks = stack.writers(3), []
    for target in targets:
        torch.nn.init.normal_(target.parameter)

    def measure():
        ranks.append(int(torch.linalg.matrix_rank(targets[0].parameter, rtol=1e-4)))
        return Measure({}, 3.0, rise=0.01 if ranks[-1] < 20 else 0.0)

    def delivered(rank):
        ranks.clear()
        whole = Measure({}, 3.0)
        config = replace(CONFIG, budget=0.001, adapter_rank=rank, adapter_energy=0.3)
        report = Report(config, "", whole, whole)
        before = [target.parameter.clone() for target in targets]
        Delivery(tmp_path / "adapter", "", config).truncate(targets, SimpleNamespace(measure=measure), report)
        for target, delta in zip(targets, before, strict=True):
            target.parameter.copy_(delta)
        return report

    report = delivered(24)
    assert ranks == [min(ranks[0] * 2**i, 24) for i in range(len(ranks))]
    assert (report.adapter.rank, report.after.rise) == (ranks[-1], 0.0)
    assert not caplog.records
    assert delivered(10).adapter.rank == 10
    assert "and the text loss rises by +1.000%, which is above the budget: raise adapter_rank" in caplog.text
    assert not (tmp_path / "adapter").exists()


def test_where_nothing_is_forgotten_the_adapter_changes_nothing(knowing, tokenizer, tmp_path, caplog):
    config = replace(CONFIG, budget=1e-9, worst_window=1e-9, max_steps=1)
    report = run(copy.deepcopy(knowing), tokenizer, adapter=tmp_path / "adapter", config=config)
    assert report.after.recall == report.before.recall
    assert "nothing was forgotten within the budget: the adapter changes nothing" in caplog.text
    torch.testing.assert_close(logits(adapted(knowing, tmp_path / "adapter")), logits(knowing))


def test_an_interrupted_run_writes_nothing_and_leaves_the_model(knowing, tokenizer, tmp_path, unchanged):
    model = int8(copy.deepcopy(knowing))
    unchanged(model)

    def interrupt(event):
        raise KeyboardInterrupt

    for hook in ("on_step", "on_round"):
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, adapter=tmp_path / "adapter", **{hook: interrupt})
        unchanged(model)
        assert list(tmp_path.iterdir()) == []


def test_a_run_that_a_callback_ends_delivers_what_it_did(knowing, tokenizer, tmp_path):
    report = run(
        copy.deepcopy(knowing), tokenizer, adapter=tmp_path / "adapter", on_step=lambda event: event.step == 2
    )
    assert report.stopped == "stopped by a callback"
    assert cir.evaluate(adapted(knowing, tmp_path / "adapter"), tokenizer, GO).mean_recall == pytest.approx(
        report.after.mean_recall, rel=1e-3
    )


@pytest.mark.parametrize("on_signal", ["return", "raise"])
def test_after_a_signal_the_best_state_so_far_is_delivered(on_signal, knowing, tokenizer, tmp_path, monkeypatch):
    calls, step = [], Forgetter.step

    def counted(self, batch=0):
        calls.append(1)
        if len(calls) == 5:  # in the middle of the second epoch
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(Forgetter, "step", counted)
    config = replace(CONFIG, check_every=3)
    with pytest.raises(KeyboardInterrupt) if on_signal == "raise" else contextlib.nullcontext():
        run(knowing, tokenizer, config=config, adapter=tmp_path / "stopped", on_signal=on_signal)
    monkeypatch.undo()
    run(knowing, tokenizer, config=replace(config, max_steps=3), adapter=tmp_path / "three")
    assert torch.equal(*(logits(adapted(knowing, tmp_path / name)) for name in ("stopped", "three")))


def test_the_folder_is_checked_before_anything_starts(knowing, tokenizer, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="expected a new folder"):
        run(None, tokenizer, adapter=tmp_path / "there")


def test_what_cannot_be_delivered_is_refused(knowing, tokenizer, tmp_path):
    adapter = tmp_path / "adapter"
    with pytest.raises(ValueError, match="adapter: expected none with the paper's configuration"):
        run(knowing, tokenizer, contrast=None, config=CIRConfig.paper(), adapter=adapter)
    with pytest.raises(ValueError, match="adapter: expected a model of linears, got the experts"):
        run(build("mixtral", vocab_size=128), tokenizer, adapter=adapter)
    subspaces = Subspaces.fit(copy.deepcopy(knowing), tokenizer, TEXT, STAY, config=CONFIG, progress=False)
    with pytest.raises(ValueError, match="subspaces: expected none for a quantized model; give contrast facts"):
        run(int8(copy.deepcopy(knowing)), tokenizer, contrast=None, subspaces=subspaces, adapter=adapter)
    assert not adapter.exists()
    report = run(copy.deepcopy(knowing), tokenizer, contrast=None, subspaces=subspaces, adapter=adapter)
    assert report.after.mean_recall < 0.1


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_all_else_refuses_a_quantized_model_and_leaves_it(quantize, knowing, tokenizer, unchanged):
    model = quantize(copy.deepcopy(knowing))
    before = bits(model)
    unchanged(model)
    subspaces = Subspaces.fit(copy.deepcopy(knowing), tokenizer, TEXT, STAY, config=CONFIG, progress=False)
    calls = (
        lambda: run(model, tokenizer),
        lambda: run(model, tokenizer, contrast=None, config=CIRConfig.paper()),
        lambda: Subspaces.fit(model, tokenizer, TEXT, STAY, config=CONFIG, progress=False),
        lambda: cir.Editor(model, tokenizer, subspaces, text=TEXT),
        lambda: cir.relearn(model, tokenizer, STAY, GO, progress=False),
        lambda: cir.locate(model, tokenizer, FACTS, progress=False),
    )
    for call in calls:
        with pytest.raises(ValueError, match=REFUSED):
            call()
        unchanged(model, weights=False)
        assert same(model, before)
    assert cir.evaluate(model, tokenizer, GO).mean_recall > 0.9


def test_the_layers_are_found_on_a_quantized_model_too(knowing, tokenizer, tmp_path):
    config = replace(CONFIG, layers=None)
    plain = run(copy.deepcopy(knowing), tokenizer, config=config)
    report = run(int8(copy.deepcopy(knowing)), tokenizer, config=config, adapter=tmp_path / "adapter")
    assert report.layers == plain.layers


def test_deltas_count_as_memory(knowing):
    stack = find_stack(knowing)
    beside = with_deltas(knowing, stack, 2)
    without, need = (needed_to_forget(knowing, s, s.writers(2), 100, CONFIG) for s in (stack, beside))
    linears = [m for layer in knowing.model.layers[2:] for m in (layer.self_attn.o_proj, *layer.mlp.children())]
    size = sum(m.weight.nbytes for m in linears if isinstance(m, torch.nn.Linear))
    assert need.held - without.held == size
    assert need == replace(without, held=need.held)
