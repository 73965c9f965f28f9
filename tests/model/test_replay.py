"""Replays, on a CPU that plays a GPU: what is captured, when, and what becomes of one that cannot be."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

from cir.model import replay
from cir.model.replay import CAPTURED_AT, Replays


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
    """A function of ``weight`` and of inputs, and how often it ran."""
    calls = []

    def function(given):
        calls.append(1)
        return {"sum": given["x"] + weight}

    return function, calls


def on(device, *weights):
    """Replays of weights that say that they are on ``device``."""
    replays = Replays().follow(weights)
    replays._on = device
    return replays


GPU = torch.device("cuda")
X = {"x": torch.arange(12.0).view(3, 4)}


def test_elsewhere_and_over_several_devices_functions_are_called():
    weight = torch.ones(4)
    several = Replays().follow([weight, weight.to("meta")])
    for replays in (on(torch.device("cpu"), weight), several):
        function, calls = counted(weight)
        for _ in range(4):
            assert torch.equal(replays("f", function, X, 2)["sum"], X["x"][:2] + 1)
        assert len(calls) == 4
        assert not replays.active


def test_the_third_call_is_a_replay_of_its_inputs_and_what_it_gave_is_kept(played):
    weight = torch.ones(4)
    replays = on(GPU, weight)
    function, calls = counted(weight)
    for _ in range(CAPTURED_AT):
        assert torch.equal(replays("f", function, X, 3)["sum"], X["x"] + 1)
    assert len(calls) == CAPTURED_AT + 1  # once more, as it was captured
    ((_, inputs, values),) = replays._graphs.values()
    values["sum"].fill_(4)  # as the device would
    first = replays("f", function, {"x": 2 * X["x"]}, 3)["sum"]
    assert torch.equal(inputs["x"], 2 * X["x"])
    values["sum"].zero_()
    assert torch.equal(first, torch.full((3, 4), 4.0))  # a copy: another replay may write there
    assert len(calls) == CAPTURED_AT + 1


def test_a_graph_serves_inputs_that_are_somewhat_shorter_and_zeros_fill_the_rest(played):
    weight = torch.ones(4)
    replays = on(GPU, weight)
    function, calls = counted(weight)
    for rows in (18, 18, 17):
        found = replays("f", function, {"x": torch.ones(rows, 4), "at": torch.ones(rows)}, rows)["sum"]
        assert found.shape == (rows, 4)
    assert len(calls) == CAPTURED_AT + 1
    ((_, inputs, _),) = replays._graphs.values()
    assert [float(inputs["x"].sum()), float(inputs["at"].sum()), len(inputs["at"])] == [17 * 4, 17, 32]
    for name, rows in (("f", 16), ("f", 19), ("g", 18)):  # other shapes, and another function
        replays(name, function, {"x": torch.ones(rows, 4), "at": torch.ones(rows)}, rows)
    assert len(calls) == CAPTURED_AT + 4


def test_graphs_of_weights_that_have_moved_are_let_go(played):
    weight, other = torch.ones(4), torch.ones(4)
    replays = on(GPU, weight)
    function, _ = counted(weight)
    for _ in range(CAPTURED_AT):
        replays("f", function, X, 3)
    assert replays.follow([weight])._graphs
    assert not replays.follow([other])._graphs


def test_graphs_share_the_place_of_what_they_give_and_the_oldest_go(played, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    replays = on(GPU, torch.ones(2))
    for rows in (3, 2, 5, 4):
        for _ in range(CAPTURED_AT):
            replays("f", lambda given: {"x": given["x"] + 1}, {"x": torch.zeros(rows, 2)}, rows)
    second, third, fourth = (values["x"] for _, _, values in replays._graphs.values())
    assert [len(x) for x in (second, third, fourth)] == [2, 5, 4]
    assert third.data_ptr() == fourth.data_ptr() != second.data_ptr()


def test_what_cannot_be_captured_is_called_and_a_warning_says_so(played, monkeypatch, caplog):
    @contextlib.contextmanager
    def refused(graph, pool, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(replay, "_capturing", refused)
    weight = torch.ones(4)
    replays = on(GPU, weight)
    function, calls = counted(weight)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert torch.equal(replays("f", function, X, 3)["sum"], X["x"] + 1)
    assert len(calls) == 5
    assert not replays.active
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph could be made, and steps take longer: operation not permitted when stream is capturing"
    ]


def test_a_replay_that_gives_something_else_is_not_used(played, caplog):
    replays = on(GPU, torch.ones(3))
    outputs = iter([torch.ones(3), torch.ones(3), torch.full((3,), 7.0), torch.ones(3)])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(replays("f", lambda _: {"x": next(outputs)}, X, 3)["x"], torch.ones(3))
    assert not replays.active
    assert "its x differ" in caplog.text
