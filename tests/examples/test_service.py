from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastapi.testclient import TestClient

import cir
from examples import service
from tests.examples.common import FIRST, SECOND, TOKEN, UNKNOWN, arguments


@pytest.fixture
def client(editor):
    with TestClient(service.create_app(editor, token="secret", queue_size=2)) as client:
        yield client


def metric(client, name: str) -> float:
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    return float(lines.get(name, 0))


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer Secret"}, {"Authorization": "Basic secret"}])
def test_a_change_needs_the_token_and_reading_does_not(client, editor, headers):
    for path in ("/forget", "/edits/1/undo", "/edits/1/redo"):
        answer = client.post(path, json=FIRST, headers=headers)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert not editor.edits
    assert [client.get(path).status_code for path in ("/health", "/edits", "/metrics")] == [200, 200, 200]
    assert metric(client, 'cir_refusals_total{reason="unauthorised"}') == 3


def test_forget_undo_and_redo_change_the_model_the_list_and_the_metrics(client, editor):
    weight = editor._model.model.layers[3].mlp.down_proj.weight
    original = weight.detach().clone()
    made = client.post("/forget", json=FIRST, headers=TOKEN)
    assert made.status_code == 201
    (edit,) = editor.edits
    listed = client.get("/edits").json()
    assert listed == [made.json()]
    assert listed[0] == {
        "number": 1,
        "id": "f0",
        "status": "active",
        "stopped": "forgotten",
        "recall_before": edit.before.recall,
        "recall_after": edit.after.recall,
        "neighbours_before": edit.before.neighbours,
        "neighbours_after": edit.after.neighbours,
        "rise": edit.after.rise,
        "rank": edit.rank,
        "nbytes": edit.nbytes,
        "seconds": edit.seconds,
    }
    assert edit.after.recall < 0.05 < 0.9 < edit.before.recall
    edited = weight.detach().clone()
    assert not torch.equal(edited, original)
    assert client.get("/health").json() == {"ok": True, "fingerprint": editor.fingerprint, "active_edits": 1}

    assert client.post("/edits/1/undo", headers=TOKEN).json()["status"] == "undone"
    assert torch.equal(weight, original)
    assert client.get("/edits").json()[0]["status"] == "undone"
    assert metric(client, "cir_active_edits") == 0
    assert client.post("/edits/1/redo", headers=TOKEN).json() == made.json()
    assert torch.equal(weight, edited)
    names = ("cir_edits_total", "cir_undos_total", "cir_redos_total", "cir_edit_seconds_count", "cir_active_edits")
    assert [metric(client, name) for name in names] == [1] * 5
    assert metric(client, "cir_edit_seconds_sum") == pytest.approx(edit.seconds)


def test_what_cannot_be_done_is_refused_with_the_reason(client, editor, monkeypatch):
    client.post("/forget", json=FIRST, headers=TOKEN)
    again = client.post("/forget", json=FIRST, headers=TOKEN)
    assert (again.status_code, again.json()["detail"]) == (422, "fact 'f0': already forgotten by edit 1")
    unknown = client.post("/forget", json=UNKNOWN, headers=TOKEN)
    assert unknown.status_code == 422
    assert "never known" in unknown.json()["detail"]
    assert client.post("/edits/2/undo", headers=TOKEN).status_code == 404
    assert client.post("/edits/1/redo", headers=TOKEN).status_code == 409
    assert client.post("/edits/1/undo", headers=TOKEN).status_code == 200
    assert client.post("/edits/1/undo", headers=TOKEN).status_code == 409

    def refuse(fact):
        raise cir.EditError("neighbours suffer")

    monkeypatch.setattr(editor, "forget", refuse)
    bounds = client.post("/forget", json=SECOND, headers=TOKEN)
    assert (bounds.status_code, bounds.json()["detail"]) == (409, "neighbours suffer")
    counted = {name: metric(client, f'cir_refusals_total{{reason="{name}"}}') for name in service_reasons(client)}
    assert counted == {"invalid": 2, "unknown": 1, "conflict": 2, "out_of_bounds": 1}


def service_reasons(client) -> list[str]:
    lines = client.get("/metrics").text.splitlines()
    return [line.split('"')[1] for line in lines if line.startswith("cir_refusals_total{")]


@pytest.mark.parametrize(
    "wrong",
    [
        {"sentences": []},
        {"sentences": ["a b"] * 33},
        {"sentences": ["a" * 2001]},
        {"probes": [{"prompt": "a"}]},
        {"probes": FIRST["probes"] * 33},
        {"id": ""},
        {"question": "who?"},
    ],
)
def test_a_malformed_fact_does_not_reach_the_editor(client, editor, monkeypatch, wrong):
    monkeypatch.setattr(editor, "forget", lambda fact: pytest.fail("reached the editor"))
    assert client.post("/forget", json={**FIRST, **wrong}, headers=TOKEN).status_code == 422


def test_health_answers_during_an_edit_and_a_full_queue_refuses(client, editor, monkeypatch):
    started, go_on, forget = threading.Event(), threading.Event(), editor.forget
    order = []

    def wait(fact):
        order.append(fact["id"])
        started.set()
        assert go_on.wait(20)
        return forget(fact)

    monkeypatch.setattr(editor, "forget", wait)
    with ThreadPoolExecutor(4) as threads:

        def post(fact):
            return threads.submit(client.post, "/forget", json=fact, headers=TOKEN)

        try:
            running = post(FIRST)
            assert started.wait(10)
            assert threads.submit(client.get, "/health").result(10).json()["active_edits"] == 0
            waiting = post(SECOND)
            until(lambda: metric(client, "cir_queue_length") == 2)
            full = post(UNKNOWN).result(10)
            assert full.status_code == 503
            assert int(full.headers["Retry-After"]) > 0
            assert order == ["f0"]
        finally:
            go_on.set()
        assert [future.result(20).status_code for future in (running, waiting)] == [201, 201]
    assert order == ["f0", "f1"]
    assert metric(client, "cir_queue_length") == 0
    assert client.post("/forget", json=FIRST, headers=TOKEN).status_code == 422  # there is room again


def until(holds, seconds: float = 10.0) -> None:
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if holds():
            return
        pause.wait(0.01)
    pytest.fail("waited in vain")


def test_the_service_starts_from_the_shell_replays_its_journal_and_releases_it(files, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CIR_TOKEN", raising=False)
    with pytest.raises(SystemExit) as stopped:
        service.main(arguments(files, tmp_path))
    assert stopped.value.code == 2
    assert "CIR_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("CIR_TOKEN", "secret")
    seen = []

    def run(app, host, port):
        with TestClient(app) as client:
            seen.append(client.get("/edits").json())
            client.post("/forget", json=FIRST, headers=TOKEN)

    monkeypatch.setattr(service.uvicorn, "run", run)
    for _ in range(2):  # the second could not open a journal that the first had left open
        service.main(arguments(files, tmp_path))
    assert [[edit["id"] for edit in edits] for edits in seen] == [[], ["f0"]]


@pytest.mark.parametrize("wrong", [{"token": ""}, {"token": "a", "queue_size": 0}])
def test_a_service_without_a_token_or_a_queue_is_not_made(editor, wrong):
    with pytest.raises(ValueError, match="expected"):
        service.create_app(editor, **wrong)
