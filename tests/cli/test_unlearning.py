from __future__ import annotations

import json

import pytest

import cir
from cir import CIRConfig, Report
from cir.cli.unlearning import advice
from cir.config import BreakingConfig
from cir.forgetting.report import Measure
from tests.cli.conftest import run

GIVEN = ["--model", "IN/model", "--facts", "IN/facts.jsonl", "--retain", "IN/text.txt"]
QUICK = ["--device", "cpu", "--budget", "5", "--worst-window", "5", "--max-steps", "1"]


def test_a_run_is_repeated_from_what_it_wrote(files, tmp_path, capsys):
    status = run(files, "unlearn", *GIVEN, *QUICK, "--require-recall", "0", "--out", str(tmp_path / "a"))
    assert status == 3
    assert "\nrequired   a recall of 0 at most: not reached\n" in capsys.readouterr().out
    again = ["--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b"), "--require-recall", "1"]
    assert run(files, "unlearn", *again, "--json") == 0
    out, error = capsys.readouterr()
    found, first = json.loads(out), json.loads((tmp_path / "a" / "report.json").read_text())
    assert found["config"] == first["config"]
    assert found["after"] == first["after"]
    assert found["out"] == str(tmp_path / "b")
    assert "text loss  " in error
    told = [line for line in (tmp_path / "a" / "config.yaml").read_text().splitlines() if "require" not in line]
    assert told == [
        line for line in (tmp_path / "b" / "config.yaml").read_text().splitlines() if "require" not in line
    ]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_an_adapter_is_written_in_place_of_a_model(files, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    words = ["--adapter", "--adapter-rank", "6", "--out", str(tmp_path / "a")]
    assert run(files, "unlearn", *GIVEN, *QUICK, *words, "--json") == 0
    out, error = capsys.readouterr()
    report = json.loads(out)
    assert report["adapter"]["rank"] == report["config"]["adapter_rank"] == 6
    assert f"adapter    rank 6, {report['adapter']['energy']:.1%} of the change" in error
    names = {"adapter_model.safetensors", "adapter_config.json", "report.json", "config.yaml"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {*names, ".cir"}
    model, tokenizer = cir.load_model(files / "model", device="cpu")
    before = cir.evaluate(model, tokenizer, str(files / "facts.jsonl")).mean_recall
    assert report["after"]["mean_recall"] < 0.8 * before
    forgot = peft.PeftModel.from_pretrained(model, tmp_path / "a")
    found = cir.evaluate(forgot, tokenizer, str(files / "facts.jsonl"))
    assert found.mean_recall == pytest.approx(report["after"]["mean_recall"], rel=1e-3)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        files / "model"
    )
    assert run(files, "unlearn", "--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")) == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    for other in (["--certify"], ["--preset", "paper"]):
        assert run(files, "unlearn", *GIVEN, "--adapter", *other, "--out", str(tmp_path / "c")) == 1
        assert "--adapter: expected neither --certify, which is for models, nor another" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_recall_is_required_where_it_can_be_measured(files, capsys):
    words = ["--require-recall", "0.1", "--facts", "IN/text.txt", "--out", "IN/out"]
    assert run(files, "unlearn", *GIVEN, *words) == 1
    error = capsys.readouterr().err
    assert "--require-recall: expected facts with probes, whose recall is measured, got sentences alone" in error
    assert not (files / "out").exists()


def a_report(stopped, recall=0.8, rise=0.0001, config=None):
    measures = Measure({"a": 0.9}, 3.0), Measure({"a": recall}, 3.0, rise=rise)
    return Report(config or CIRConfig(), "", *measures, layers=(2, 7), stopped=stopped)


def test_what_to_raise_is_told_where_little_was_done():
    assert advice(a_report("all epochs done")) == (
        "recall is still high, and 90% of the budget is left: raise --max-steps (now 40), lower --floor (now -4), or "
        "raise --layers (now 0.75 of the depth)"
    )
    assert advice(a_report("forgotten")) == (
        "recall is still high, and 90% of the budget is left: lower --floor (now -4)"
    )
    assert "--rate (now 0.2) or --max-epochs (now 16)" in advice(a_report("all epochs done", config=BreakingConfig()))


@pytest.mark.parametrize(
    "report",
    [
        a_report("budget spent"),
        a_report("interrupted"),
        a_report("all epochs done", recall=0.05),
        a_report("all epochs done", rise=0.0009),
        a_report("forgotten", config=BreakingConfig()),
        Report(CIRConfig(), "", Measure({}, 3.0), Measure({}, 3.0), stopped="all epochs done"),
    ],
)
def test_nothing_is_advised_where_that_would_not_help(report):
    assert advice(report) is None
