"""Replays, on a CPU that plays a GPU: what is captured, when, and what becomes of one that cannot be."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

from cir.model import replay
from cir.model.replay import CAPTURED_AT, Replays

GPU = {torch.device("cuda")}


class Graph:
    """Replays leave what was captured: what the device would write is written by the test."""

    def pool(self):
        return "pool"

    def replay(self):
        pass


@pytest.fixture
def played(monkeypatch):
    @contextlib.contextmanager
    def capturing(graph, pool, stream):
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(replay, "_capturing", capturing)


def counted(weight):
    """A function of ``weight``, and how often it ran."""
    calls = []

    def function():
        calls.append(1)
        return {"double": 2 * weight}

    return function, calls


def test_elsewhere_and_over_several_devices_functions_are_called():
    for devices in ({torch.device("cpu")}, {torch.device("cuda", 0), torch.device("cuda", 1)}):
        replays = Replays(devices)
        function, calls = counted(torch.ones(2))
        for _ in range(4):
            assert torch.equal(replays("k", function)["double"], torch.full((2,), 2.0))
        assert len(calls) == 4
        assert not replays.active


def test_the_third_call_is_a_replay_and_what_it_gave_is_kept(played):
    weight = torch.ones(3)
    replays = Replays(GPU)
    function, calls = counted(weight)
    for _ in range(CAPTURED_AT):
        assert torch.equal(replays("k", function)["double"], torch.full((3,), 2.0))
    assert len(calls) == CAPTURED_AT + 1  # once more, as it was captured
    _, values = replays._graphs["k"]
    values["double"].fill_(4)  # as the device would
    first = replays("k", function)["double"]
    values["double"].zero_()
    assert torch.equal(first, torch.full((3,), 4.0))  # a copy: another replay may write there
    assert len(calls) == CAPTURED_AT + 1


def test_graphs_share_the_place_of_what_they_give(played):
    replays = Replays(GPU)
    for rows in (3, 2, 5, 4):
        for _ in range(CAPTURED_AT):
            replays(rows, lambda rows=rows: {"x": torch.full((rows, 2), float(rows))})
    first, second, third, fourth = (values["x"] for _, values in replays._graphs.values())
    assert [len(x) for x in (first, second, third, fourth)] == [3, 2, 5, 4]
    assert first.data_ptr() == second.data_ptr()
    assert third.data_ptr() == fourth.data_ptr() != first.data_ptr()


def test_what_cannot_be_captured_is_called_and_a_warning_says_so(played, monkeypatch, caplog):
    @contextlib.contextmanager
    def refused(graph, pool, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(replay, "_capturing", refused)
    replays = Replays(GPU)
    function, calls = counted(torch.ones(3))
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert torch.equal(replays("k", function)["double"], torch.full((3,), 2.0))
    assert len(calls) == 5
    assert not replays.active
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph could be made, and steps take longer: operation not permitted when stream is capturing"
    ]


def test_a_replay_that_gives_something_else_is_not_used(played, caplog):
    replays = Replays(GPU)
    outputs = iter([torch.ones(3), torch.ones(3), torch.full((3,), 7.0), torch.ones(3)])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(replays("k", lambda: {"x": next(outputs)})["x"], torch.ones(3))
    assert not replays.active
    assert "its x differ" in caplog.text
