"""The demo, on a small model that is taught its facts."""

from __future__ import annotations

import json

import pytest

from cir import cli
from cir.data.facts import load_facts
from cir.data.shipped import DATA, builtin_text
from tests.tiny import taught, tiny_llama, word_tokenizer


@pytest.fixture
def folder(tmp_path):
    facts = [fact for name in ("forget", "related", "neighbours") for fact in load_facts(DATA / f"demo_{name}.jsonl")]
    asked = [probe.prompt + probe.target for fact in facts for probe in fact.probes]
    tokenizer = word_tokenizer([*asked, *(sentence for fact in facts for sentence in fact.sentences), builtin_text()])
    model = tiny_llama(hidden_size=64, intermediate_size=96, vocab_size=len(tokenizer))
    for saved in (taught(model, tokenizer, [{"sentences": asked}], steps=30), tokenizer):
        saved.save_pretrained(tmp_path / "model")
    return tmp_path


def test_it_forgets_attacks_and_shows_what_was_kept(folder, capsys):
    out = folder / "demo"
    assert cli.main(["demo", "--model", str(folder / "model"), "--out", str(out), "--quiet"]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    forget, keep = ([float(x.rstrip("%")) for x in line[1:]] for line in lines if line[:1] == ["mean"])
    assert forget[0] > 50
    assert forget[1] < 0.5 * forget[0]
    assert keep[0] > 50
    assert "Loss on neutral text" in shown
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["rise"] + report["after"]["rise_stderr"] <= report["config"]["budget"]
    for name in ("recall.png", "facts.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    assert cli.main(["demo", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "demo"), "--quiet"]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
