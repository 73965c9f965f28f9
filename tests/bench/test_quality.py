from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from bench.baselines import BASELINES
from bench.quality import measuring, runs
from bench.quality.measuring import Bench, Outcome, Task, hardest, permuted, put
from bench.quality.report import report
from bench.quality.rows import Rows
from bench.quality.runs import ABLATIONS, ablate, compare, untouched
from cir import CIRConfig
from cir.data.facts import load_facts
from cir.forgetting import counterfactuals
from cir.forgetting.forgetter import Forgetter
from cir.forgetting.report import Measure
from cir.measures import mean_recall
from tests.tiny import TEXT, facts, knowing_llama, word_tokenizer

TASK = Task(
    relearn=load_facts(facts(12))[:6],
    probe=load_facts(facts(12))[6:9],
    neighbours=load_facts(facts(12))[9:],
    retain=TEXT,
    disruption=TEXT,
    tokens=100_000,
    attacks=("adam, fast",),
    thorough=False,
)


SMALL = CIRConfig(layers=0.5, max_steps=20, check_every=5, worst_window=5.0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    knowing_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return Bench(str(folder), TASK)


def test_every_method_ends_inside_the_budget_and_no_row_is_measured_twice(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "MAX_EPOCHS", 2)
    monkeypatch.setitem(BASELINES, "graddiff", type("Quick", (BASELINES["graddiff"],), {"rates": (1e-4, 1e-2)}))
    monkeypatch.setitem(runs.METHODS, "cir", SMALL)
    monkeypatch.setitem(runs.METHODS, "repselect", replace(CIRConfig.repselect(), rank_activation=4, rank_gradient=4))
    rows = Rows(tmp_path / "quality.jsonl", {"model": "tiny"}, TASK.attacks)
    before = [parameter.detach().clone() for parameter in bench.model.parameters()]
    for _ in range(2):
        compare(bench, rows, ["cir", "repselect", "graddiff"], [0.5], [0])
        untouched(bench, rows)
    assert all(torch.equal(now, was) for now, was in zip(bench.model.parameters(), before, strict=True))
    written = [json.loads(line) for line in (tmp_path / "quality.jsonl").read_text().splitlines()]
    kinds = [(row["kind"], row["method"]) for row in written]
    # With two rates, of which every other is tried: one search.
    ours = [("run", "cir"), ("run", "repselect")]
    assert kinds == [*ours, ("search", "graddiff"), ("run", "graddiff"), ("run", "untouched")]
    assert [row["contrast"] for row in written[:2]] == [None, None]
    assert len(capsys.readouterr().out.splitlines()) == 5
    for row in written[:2] + written[3:4]:
        assert row["rise"] + row["rise_stderr"] <= 0.5
    assert written[0]["recall"] < 0.5 * written[-1]["recall"]
    assert written[-1]["change"] == 0
    again = Rows(tmp_path / "quality.jsonl", {"model": "tiny"}, TASK.attacks)
    assert again.found == written
    assert Rows(tmp_path / "quality.jsonl", {"model": "other"}, TASK.attacks).found == []
    assert Rows(tmp_path / "quality.jsonl", {"model": "tiny"}, ("adam",)).found == []

    report(written, tmp_path / "quality.html")
    page = (tmp_path / "quality.html").read_text()
    assert "graddiff" in page
    assert f"{written[0]['recall']:.3f}" in page
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_answers_are_permuted_where_there_is_another():
    first, second = TASK.probe[:2]
    (one, other) = permuted([first, second])
    assert [one.probes[0].target, other.probes[0].target] == [second.probes[0].target, first.probes[0].target]
    assert permuted([first, replace(first, id="the same")]) == []
    assert permuted([replace(first, probes=())]) == []


def test_a_signal_ends_the_bench_and_not_only_the_run(bench, monkeypatch):
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = [parameter.detach().clone() for parameter in bench.model.parameters()]
    monkeypatch.setattr(Forgetter, "apply", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.forget_with(SMALL)
    assert all(map(torch.equal, bench.model.parameters(), before))


def test_what_is_told_to_stay_stays(bench, monkeypatch):
    monkeypatch.setattr(counterfactuals, "SENTENCES", 0)  # which spare what is not told
    config = replace(SMALL, budget=10.0)
    told, untold = (bench.forget_with(config, contrast) for contrast in (TASK.neighbours, []))
    kept = []
    for outcome in (told, untold):
        assert outcome.measure.mean_recall < 0.2 * bench.before.mean_recall
        with bench.restored():
            put(bench.model.parameters(), outcome.weights)
            kept.append(mean_recall(bench.recall(TASK.neighbours)))
    assert kept[0] > kept[1] + 0.2


class Recorder:
    """In the place of a bench: what was asked of it, and nothing measured."""

    task = replace(TASK, contrast=TASK.neighbours[:1])

    def __init__(self):
        self.asked = []

    def forget_with(self, config, contrast):
        self.asked.append((config, contrast))

    def examine(self, outcome):
        names = ("rise", "rise_stderr", "kl", "recall", "worst", "quantized_4bit", "neighbours", "change", "seconds")
        return dict.fromkeys(names, 0.0)


def test_each_variant_is_a_run_of_its_own_and_again_where_the_configuration_is_another(tmp_path, monkeypatch):
    rows, bench = Rows(tmp_path / "quality.jsonl", {}, TASK.attacks), Recorder()
    for _ in range(2):
        ablate(bench, rows, 0.01, [0])
    own = replace(measuring.CIR, budget=0.01, disruption_tokens=TASK.tokens)
    assert bench.asked[0] == (own, TASK.neighbours[:1])
    assert bench.asked[list(ABLATIONS).index("without contrast facts")] == (own, [])
    assert len({(config, bool(contrast)) for config, contrast in bench.asked}) == len(ABLATIONS) == len(bench.asked)
    monkeypatch.setattr(runs, "CIR", replace(measuring.CIR, max_steps=5))
    ablate(bench, Rows(tmp_path / "quality.jsonl", {}, TASK.attacks), 0.01, [0])
    assert len(bench.asked) == 2 * len(ABLATIONS)


def test_rows_under_more_attacks_count_under_fewer(tmp_path):
    attacked = {"attacked": {"sgd": 0.3, "adam": 0.2}, "relearning": {"sgd": [0.1, 0.3], "adam": [0.1, 0.2]}}
    kept = {"attacked": {"adam": 0.2}, "relearning": {"adam": [0.1, 0.2]}, "worst": 0.2}
    row = {"kind": "run", "model": "tiny", "attacks": ["sgd", "adam"], "worst": 0.3, **attacked}
    (tmp_path / "quality.jsonl").write_text(json.dumps(row))
    assert Rows(tmp_path / "quality.jsonl", {"model": "tiny"}, ("adam",)).found == [{**row, **kept}]
    assert Rows(tmp_path / "quality.jsonl", {"model": "tiny"}, ("adam", "lora")).found == []


@pytest.mark.parametrize("power", [1.2, 2.0])
def test_an_overstep_goes_back_along_its_line_to_the_budget(bench, monkeypatch, power):
    inside = [parameter.detach().clone() for parameter in bench.model.parameters()]
    generator = torch.Generator().manual_seed(0)
    step = [torch.randn(w.shape, generator=generator) for w in inside]

    def measure() -> Measure:  # harm that grows as a power of the way gone
        return Measure({}, 1.0, 0.01 * gone() ** power, 0.0002)

    def gone() -> float:
        now = bench.model.parameters()
        shares = [float(((w.detach() - was) / s).mean()) for w, was, s in zip(now, inside, step, strict=True)]
        assert max(shares) - min(shares) < 1e-3
        return shares[0]

    monkeypatch.setattr(bench, "harm", measure)
    with bench.restored():
        put(bench.model.parameters(), [w + s for w, s in zip(inside, step, strict=True)])
        found = bench.back_to_budget(inside, Measure({}, 1.0), measure(), budget=0.004)
        assert 0.003 < found.rise_bound <= 0.004
        assert found.rise == pytest.approx(measure().rise)
        assert bench.back_to_budget(inside, Measure({}, 1.0), measure(), budget=-1).rise == 0
        assert bench.change() == 0


def test_harm_that_the_loss_hides_counts_in_kl(bench, monkeypatch):
    monkeypatch.setattr(bench.meter, "measure", lambda: Measure({}, 0.5, -0.03, 0.0002))
    assert bench.harm().rise == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    with bench.restored():
        noisy = [w + 0.3 * w.std() * torch.randn(w.shape, generator=generator) for w in bench.weights]
        put(bench.model.parameters(), noisy)
        assert bench.harm().rise == bench.kl() / bench.before.loss > 0.003
    lowered = replace(bench.before, loss=0.97 * bench.before.loss)
    assert bench.rise(Outcome(lowered, [], 0.0, []))["rise"] == pytest.approx(-0.03)


def test_rows_beside_gold_serve_only_the_attacks_they_are_of(tmp_path):
    attacked = {"attacked": {"a": 0.1, "b": 0.2}, "relearning": {"a": [0.1], "b": [0.2]}, "attacks": ["a", "b"]}
    rows = [{"method": "plain", **attacked}, {"method": "beside", **attacked, "gold": {}}]
    path = tmp_path / "quality.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["method"] for row in Rows(path, {}, ["a", "b"]).found] == ["plain", "beside"]
    (found,) = Rows(path, {}, ["a"]).found
    assert (found["method"], found["worst"]) == ("plain", 0.1)
    assert hardest({"control, plain text": 0.9, "b": 0.2, "a": 0.3}) == "a"
    assert Rows(path, {"method": "other"}, []).others == 2
