from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

import cir
from cir.forgetting.profiling import Phase, Profile, _Flops, _phases
from tests.forgetting.test_breaking import CONFIG
from tests.tiny import TEXT, facts


def test_a_profile_names_every_phase_and_changes_nothing(model, tokenizer, unchanged, tmp_path):
    unchanged(model)
    found = cir.profile(
        model, tokenizer, facts(), retain=TEXT, config=CONFIG, epochs=2, trace=tmp_path / "trace.json.gz"
    )
    unchanged(model)
    flop = {phase.name: phase.flop for phase in found.phases}
    assert {
        "budget check",
        "record originals",
        "read retain text",
        "forward",
        "backward",
        "collapse, moments",
        "norm",
        "update",
        "retain",
        "solve",
    } <= set(flop)
    assert all(phase.seconds > 0 for phase in found.phases if phase.name != "other")
    assert sum(phase.seconds for phase in found.phases) <= found.seconds * 1.1
    # Of two epochs and the fit before; the backward pass here has one product for each of the forward's.
    assert flop["forward"] * 2 / 3 + flop["backward"] * 2 / 3 + flop["update"] > 0.8 * found.floor_flop
    assert found.floor_flop > 0
    assert found.floor_bytes > 0
    with gzip.open(tmp_path / "trace.json.gz") as trace:
        assert any(event.get("name") == "cir::update" for event in json.load(trace)["traceEvents"])


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_attention_of_fewer_keys_than_queries_is_counted_as_it_is_done(name):
    queries, keys = (torch.empty(2, heads, 5, 16, device="meta") for heads in (8, 2))
    args = {"cudnn": (None, True), "flash": (), "efficient": (None, True)}[name]
    with _Flops() as flops:
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")(queries, keys, keys, *args)
    assert flops.by_phase == {"other": 2 * 2 * 8 * 5 * 5 * (16 + 16)}


def test_a_profile_as_table_json_and_picture(tmp_path):
    found = Profile(
        (Phase("forward", 1.5, 3_000_000_000), Phase("update", 0.5, 10**9)), 2.5, 10, 2, 10**9, 10**8, 2**30, "cuda"
    )
    table = found.table().splitlines()
    assert table[0].startswith("0.200 GPU-seconds a fact")
    assert table[2].split() == ["forward", "1.500", "150.00", "75.0%", "3.0", "2"]
    assert table[4].split()[:2] == ["all", "2.000"]
    assert "10 facts, 2 epochs, 2.50 s" in table[-1]
    assert json.loads(found.to_json())["phases"][1]["flop"] == 10**9
    found.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


class Event:
    """As torch records one: of the host, with an id, or of a GPU, with that of the event that launched it."""

    def __init__(self, name, start, end, number=0, launched_by=0):
        self._name, self._start, self._end = name, start, end
        self._number, self._launched_by = number, launched_by

    def __getattr__(self, name):
        found = {
            "name": self._name,
            "start_ns": 1000 * self._start,
            "duration_ns": 1000 * (self._end - self._start),
            "correlation_id": self._number,
            "linked_correlation_id": self._launched_by,
            "device_type": SimpleNamespace(name="CUDA" if self._launched_by else "CPU"),
        }[name]
        return lambda: found


def test_kernels_count_for_the_phase_they_were_launched_in_also_from_other_threads():
    events = [
        Event("cir::retain", 0, 100, number=1),
        Event("cir::forward", 10, 40, number=2),  # within: counts as retain
        Event("cir::update", 200, 250, number=3),
        Event("aten::mm", 20, 21, number=4),
        Event("MmBackward", 60, 61, number=5),
        Event("aten::mm", 210, 211, number=6),
        Event("aten::mm", 260, 261, number=7),
        Event("gemm", 300, 600, launched_by=4),
        Event("gemm", 600, 1000, launched_by=5),
        Event("memset", 1000, 1100, launched_by=5),
        Event("gemm", 1100, 2100, launched_by=6),
        Event("gemm", 2100, 2110, launched_by=7),
        Event("cir::update", 300, 2100, launched_by=3),  # on the GPU, gaps included, its kernels are told once more
    ]
    found = {
        phase.name: (phase.seconds, phase.flop) for phase in _phases(events, {"retain": 12, "update": 1, "other": 2})
    }
    assert found == {
        "retain": (pytest.approx(800e-6), 12),
        "update": (pytest.approx(1e-3), 1),
        "other": (pytest.approx(1e-5), 2),
    }
