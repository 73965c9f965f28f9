from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

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
    monkeypatch.setattr("cir.cli.inputs.load_text", lambda name, part, instead: f"{part} of {name}")
    inputs = Inputs.read({**given, "retain": "FineWeb-Edu", "disruption": "wikitext"})
    assert (inputs.retain, inputs.disruption) == ("retain of fineweb-edu", "disruption of wikitext")
    assert inputs.sources == {"facts": given["facts"], "retain": "FineWeb-Edu", "disruption": "wikitext"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext").mkdir()  # a folder is no text
    assert Inputs.read({**given, "retain": "wikitext"}).retain == "retain of wikitext"
    (tmp_path / "wikitext").rmdir()
    (tmp_path / "wikitext").write_text("a file of that name")
    assert Inputs.read({**given, "retain": "wikitext"}).retain == "a file of that name"


def test_a_data_set_without_such_text_is_refused(given):
    with pytest.raises(ValueError, match="--retain: expected a data set with such text, got mmlu"):
        Inputs.read({**given, "retain": "MMLU"})


def test_a_name_that_is_neither_is_told_what_there_is(tmp_path):
    for name in ("wikitxt", "nowhere.jsonl", "a\nb"):
        expected = (
            "--retain: expected a text file or one of muse-news, muse-books, wikitext, fineweb-edu, got "
            f"{name!r}, which is neither"
        )
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(expected)}$"):
            read_text(name, "retain")
    with pytest.raises(ValueError, match="expected a file, got a name that no file has"):
        read_text("a\0b", "retain")
    with pytest.raises(ValueError, match="expected a file, got File name too long"):
        read_text("some words " * 500, "retain")
    with pytest.raises(ValueError, match="expected a file, got a folder"):
        read_text(str(tmp_path), "retain")


def test_without_a_connection_a_file_is_asked_for(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    config = SimpleNamespace(HF_DATASETS_CACHE="/cache/datasets")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable, config=config))
    expected = (
        "data set 'wikitext': expected Salesforce/wikitext (configuration wikitext-2-raw-v1, split test) from the "
        "hub or in /cache/datasets, got ConnectionError: Couldn't reach the Hub; give a text file instead with "
        "--disruption FILE"
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(expected)}$"):
        read_text("WikiText", "disruption")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"pip install 'cir\[data\]', or give a text file instead with --retain FILE$"
    ):
        read_text("wikitext", "retain")


def test_a_limit_is_of_facts_from_either_source(tmp_path, monkeypatch):
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts(9)))
    copy = tmp_path / "tofu.jsonl"
    copy.write_text("".join(json.dumps({"question": f"{i}?", "answer": "a"}) + "\n" for i in range(9)))
    of_file = Inputs.read({"facts": str(path), "limit": 3, "neighbours": str(path)})
    of_data = Inputs.read({"data": "tofu", "data_path": str(copy), "limit": 3})
    numbers = [int(fact.id.removeprefix("f")) for fact in of_file.facts]
    assert [int(fact.id.removeprefix("tofu-")) - 1 for fact in of_data.facts] == numbers
    assert numbers[1] - numbers[0] == numbers[2] - numbers[1] == 3
    assert len(of_file.neighbours) == 9
    assert of_file.sources["limit"] == 3
    for bad in (0, -1, "3", True):
        with pytest.raises(ValueError, match="expected a limit of at least 1, got"):
            Inputs.read({"facts": str(path), "limit": bad})


def test_facts_come_from_one_place_and_are_facts(given, monkeypatch):
    with pytest.raises(ValueError, match="expected facts from either --facts or --data, got facts and data"):
        Inputs.read({**given, "data": "tofu"})
    with pytest.raises(ValueError, match="got none"):
        Inputs.read({})
    monkeypatch.setattr("cir.cli.inputs.load_data", lambda name, path, limit: DataSet(name, ()))
    with pytest.raises(ValueError, match="--data: expected a data set of facts, got wikitext, which is text"):
        Inputs.read({"data": "wikitext"})


def test_names_of_files_are_strings(given):
    with pytest.raises(ValueError, match=r"--same-subject: expected the name of a file, got \[1\]"):
        Inputs.read({**given, "same_subject": [1]})


def test_a_text_is_something(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"--retain: expected plain text, got nothing in .*a.txt"):
        read_text(str(tmp_path / "a.txt"), "retain")
    (tmp_path / "a.txt").write_text("x" * 2**21)
    assert len(read_text(str(tmp_path / "a.txt"), "retain")) == 2**21


def test_json_is_not_taken_for_text(tmp_path):
    for name, text in (
        ("a.txt", '{"text": "some"}\n'),
        ("b.txt", '\n[{"a": 1}]'),
        ("c.txt", "{\n"),
        ("a.jsonl", "plain\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"--retain: expected plain text, got JSON in .*; write its text out"):
            read_text(str(tmp_path / name), "retain")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfplain\n")
    assert read_text(str(tmp_path / "b.txt"), "retain") == "plain\n"
