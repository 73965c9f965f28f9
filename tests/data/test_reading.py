from __future__ import annotations

import codecs
import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cir.data.datasets import SOURCES, has_text, load_data, load_text
from tests.data.test_datasets import DATA, sample


def test_a_missing_copy_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file or a folder, got .*nowhere, which does not exist"):
        load_data("tofu", tmp_path / "nowhere")
    (tmp_path / "neighbours.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"expected a file facts\.\* out of .*, got neighbours\.jsonl"):
        load_data("tofu", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a file retain\.\* out of"):
        load_data("wikitext", tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.jsonlines", "a.json", "A.JSON.GZ", "a.jsonl.gz"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_copy_is_known_by_any_of_its_names_and_read_without_a_mark(tmp_path, name, mark):
    content = mark + (DATA / "tofu" / "facts.jsonl").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert load_data("tofu", tmp_path / name).facts == sample("tofu").facts


def test_a_list_and_a_text_are_known_by_their_names_too(tmp_path):
    content = codecs.BOM_UTF8 + (DATA / "zsre.json").read_bytes()
    (tmp_path / "a.JSON.gz").write_bytes(gzip.compress(content))
    assert load_data("zsre", tmp_path / "a.JSON.gz") == sample("zsre")
    folder = tmp_path / "muse"
    folder.mkdir()
    for file, name in (
        ("facts.json", "FACTS-1.JSON"),
        ("retain.txt", "retain.TXT.gz"),
        ("neighbours.jsonl", "Neighbours.ndjson"),
    ):
        content = (DATA / "muse" / file).read_bytes()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    data = sample("muse-news")
    assert load_data("muse-news", folder) == replace(data, disruption=None)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package ``datasets``: ``rows`` by part, ``calls`` as they were made."""
    stub = SimpleNamespace(calls=[], rows={}, config=SimpleNamespace(HF_DATASETS_CACHE="/cache/datasets"))

    def load_dataset(path, name=None, *, split=None, streaming=False, data_files=None):
        stub.calls.append((path, name, split, streaming, data_files))
        return iter(stub.rows[name, split])

    stub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return stub


def rows_of(file: Path) -> list[dict]:
    text = file.read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def test_the_hub_gives_what_a_local_copy_gives(hub):
    hub.rows = {
        ("forget_level1", "test"): rows_of(DATA / "rwku" / "facts-level1.jsonl"),
        ("forget_level2", "test"): rows_of(DATA / "rwku" / "facts-level2.jsonl"),
        ("neighbor_level1", "test"): rows_of(DATA / "rwku" / "neighbours.json")[:1],
        ("neighbor_level2", "test"): rows_of(DATA / "rwku" / "neighbours.json")[1:],
    }
    assert load_data("rwku") == sample("rwku")
    assert hub.calls == [("jinzhuoran/RWKU", config, "test", False, None) for config, _ in hub.rows]


def test_a_set_of_one_file_is_read_from_its_address(hub):
    hub.rows[None, "train"] = rows_of(DATA / "zsre.json")
    assert load_data("zsre") == sample("zsre")
    assert hub.calls == [("json", None, "train", False, SOURCES["zsre"].hub)]


def test_a_streamed_set_is_read_no_further_than_asked(hub):
    stream = iter(rows_of(DATA / "fineweb-edu.jsonl"))
    hub.rows["sample-10BT", "train"] = stream
    assert load_data("fineweb-edu", limit=3) == sample("fineweb-edu", limit=3)
    assert len(list(stream)) == 3
    assert hub.calls == [("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True, None)]


def test_tables_are_read_by_the_package(hub, tmp_path):
    hub.rows[None, "train"] = rows_of(DATA / "mmlu.jsonl")
    (tmp_path / "mmlu.parquet").touch()
    assert load_data("mmlu", tmp_path / "mmlu.parquet") == sample("mmlu")
    assert hub.calls == [("parquet", None, "train", False, str(tmp_path / "mmlu.parquet"))]


def test_a_table_that_is_none_is_named(hub, tmp_path):
    (tmp_path / "mmlu.PARQUET").write_text("nothing")
    with pytest.raises(ValueError, match=r"mmlu.PARQUET: expected parquet, got KeyError: \(None, 'train'\)"):
        load_data("mmlu", tmp_path / "mmlu.PARQUET")
    (tmp_path / "a.parquet.gz").touch()
    with pytest.raises(ValueError, match=r"expected a file that ends in .jsonl, .*, got .*a.parquet.gz"):
        load_data("mmlu", tmp_path / "a.parquet.gz")


def test_a_text_alone_is_read_without_the_rest(hub):
    hub.rows["raw", "retain1"] = [{"text": "One."}, {"text": "Two."}]
    assert load_text("MUSE-news", "retain", "give") == "One.\n\nTwo."
    assert len(hub.calls) == 1
    hub.rows["sample-10BT", "train"] = rows_of(DATA / "fineweb-edu.jsonl")
    for part in ("retain", "disruption"):
        assert load_text("fineweb-edu", part, "give") == getattr(sample("fineweb-edu"), part)
    assert load_text("mmlu", "retain", "give") is None
    assert not has_text("mmlu")


def test_a_bad_row_of_the_hub_is_named(hub):
    hub.rows["wmdp-bio", "test"] = [*rows_of(DATA / "wmdp.jsonl"), {"question": "Q?"}]
    with pytest.raises(
        ValueError, match=r"cais/wmdp \(configuration wmdp-bio, split test\), row 4: expected 'choices'"
    ):
        load_data("wmdp-bio")


def test_without_a_connection_it_says_what_was_looked_for(hub):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    hub.load_dataset = unreachable
    expected = (
        "data set 'tofu': expected locuslab/TOFU (configuration forget10_perturbed, split train) from the hub or in "
        "/cache/datasets, got ConnectionError: Couldn't reach the Hub; give a local copy with --data-path PATH "
        "(path=)"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(expected)):
        load_data("tofu")


def test_what_went_wrong_at_the_hub_is_told_in_short(hub):
    def unreachable(*_, **__):
        raise ConnectionError("line\nafter \x1b[0m line" * 1000)

    hub.load_dataset = unreachable
    with pytest.raises(
        FileNotFoundError, match=r"got ConnectionError: line after \?\[0m lineline .*; give a local"
    ) as error:
        load_data("tofu")
    assert len(str(error.value)) < 500


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"data set 'mmlu': .* pip install 'cir\[data\]', or give a local .*--data-path"
    ):
        load_data("mmlu")
    assert sample("mmlu").facts  # a local copy does not need it


def test_the_package_is_imported_only_when_needed():
    code = "import sys, cir.data.datasets; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
