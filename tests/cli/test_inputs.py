from __future__ import annotations

import json

import pytest

from cir.cli.inputs import Inputs, read_text
from cir.data.datasets import DataSet
from tests.tiny import facts


@pytest.fixture
def given(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts(2)))
    return {"facts": str(path), "limit": None}


def test_a_text_is_a_file_or_the_part_of_a_data_set(given, tmp_path, monkeypatch):
    monkeypatch.setattr("cir.cli.inputs.load_data", lambda name: DataSet(name, (), retain="kept", disruption="held"))
    inputs = Inputs.read({**given, "retain": "fineweb-edu", "disruption": "wikitext"})
    assert (inputs.retain, inputs.disruption) == ("kept", "held")
    assert inputs.sources == {"facts": given["facts"], "retain": "fineweb-edu", "disruption": "wikitext"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext").write_text("a file of that name")
    assert Inputs.read({**given, "retain": "wikitext"}).retain == "a file of that name"


def test_a_data_set_without_such_text_is_refused(given, monkeypatch):
    monkeypatch.setattr("cir.cli.inputs.load_data", lambda name: DataSet(name, ()))
    with pytest.raises(ValueError, match="--retain: expected a data set with such text, got mmlu"):
        Inputs.read({**given, "retain": "mmlu"})


def test_facts_come_from_one_place_and_are_facts(given, monkeypatch):
    with pytest.raises(ValueError, match="expected facts from either --facts or --data, got facts and data"):
        Inputs.read({**given, "data": "tofu"})
    with pytest.raises(ValueError, match="got none"):
        Inputs.read({})
    monkeypatch.setattr("cir.cli.inputs.load_data", lambda name, path, limit: DataSet(name, ()))
    with pytest.raises(ValueError, match="--data: expected a data set of facts, got wikitext, which is text"):
        Inputs.read({"data": "wikitext"})


def test_json_is_not_taken_for_text(tmp_path):
    for name, text in (("a.txt", '{"text": "some"}\n'), ("a.jsonl", "plain\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"--retain: expected plain text, got JSON in .*; write out the text"):
            read_text(str(tmp_path / name), "retain")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfplain\n")
    assert read_text(str(tmp_path / "b.txt"), "retain") == "plain\n"
