from __future__ import annotations

from dataclasses import replace

from bench import growth, step


def test_every_axis_changes_what_it_names():
    base = step.WORKLOADS["small"]
    found = {(axis, value): workload for axis, value, workload in growth.workloads(base)}
    assert len(found) == sum(map(len, growth.AXES.values()))
    assert found["facts", 1000].facts == 1000
    assert found["tokens a sentence", 128].words == (128, 128)
    assert found["layers run", 12].config.layers(30) == range(6, 12)
    assert found["k", 64].config.rank_gradient == 64


def test_a_point_and_the_picture(tmp_path):
    workload = replace(step.WORKLOADS["tiny"], words=(6, 6))
    point = growth.measured(workload)
    assert point["tokens"] == 3 * 3 * 6
    assert point["seconds"] > 0
    rows = [{"axis": axis, "value": value, **point} for axis in growth.AXES for value in (1, 2)]
    growth.plot(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
