from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from cir.data.datasets import BENCHMARKS, SOURCES, benchmark_rows
from tests.proof.bigrams import saved

DATA = Path(__file__).parent / "files"


def test_a_folder_as_the_hub_has_it_may_be_in_pieces_and_limited(tmp_path):
    rows = [json.loads(line) for line in (DATA / "wmdp.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        saved(tmp_path / "wmdp-bio" / f"test-0000{i}-of-00003.jsonl", [row])
    saved(tmp_path / "wmdp-bio-robust.jsonl", rows)
    (read,) = benchmark_rows("wmdp-bio", tmp_path).values()
    assert [row.values for row in read] == rows
    (read,) = benchmark_rows("wmdp-bio", tmp_path, limit=2).values()
    assert [row.values for row in read] == [rows[0], rows[1]]
    parts = benchmark_rows("muse-news", DATA / "benchmarks" / "muse", limit=2)
    assert len(parts["forget_qa_icl"]) == 1  # examples are not measured on


def test_the_hub_is_asked_for_every_part(monkeypatch):
    calls = []

    def load_dataset(path, name=None, *, split=None, streaming=False, data_files=None):
        calls.append((path, name, split))
        return [{"text": "a b"}] * 2

    stub = SimpleNamespace(load_dataset=load_dataset, config=SimpleNamespace(HF_DATASETS_CACHE="/cache"))
    monkeypatch.setitem(sys.modules, "datasets", stub)
    for name in BENCHMARKS:
        calls.clear()
        parts = benchmark_rows(name)
        assert tuple(parts) == tuple(SOURCES[name].benchmark)
        source = SOURCES[name]
        places = [place for part in source.benchmark.values() for place in part]
        if source.hub.startswith("https"):
            assert calls == [("json", None, "train")]
        else:
            assert calls == [(source.hub, *place) for place in places]
    assert ("muse-bench/MUSE-News", "privleak", "holdout") in [
        (SOURCES["muse-news"].hub, *place) for place in SOURCES["muse-news"].benchmark["holdout"]
    ]
