from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cir.data.datasets import SOURCES, load_data
from tests.data.test_datasets import DATA, sample


def test_a_missing_copy_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file or a folder, got .*nowhere, which does not exist"):
        load_data("tofu", tmp_path / "nowhere")
    (tmp_path / "neighbours.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"expected a file facts\.\* out of .*, got neighbours\.jsonl"):
        load_data("tofu", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a file retain\.\* out of"):
        load_data("wikitext", tmp_path)


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
