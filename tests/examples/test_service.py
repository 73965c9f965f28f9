from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient

import cir
from cir.editing.journal import JournalError
from cir.forgetting.update import NonFiniteError
from examples import service
from tests.examples.common import FIRST, SECOND, TOKEN, UNKNOWN, arguments
from tests.faults.requests import Stub, create, sweep


@pytest.fixture
def client(editor):
    say = partial(service.continued, editor._model, editor._tokenizer)
    app = service.create_app(editor, token="secret", say=say, queue_size=2)
    with TestClient(app, headers=TOKEN, raise_server_exceptions=False) as client:
        yield client


def metric(client, name: str) -> float:
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    return float(lines.get(name, 0))


@pytest.mark.parametrize("given", ["", "Bearer Secret", "Basic secret", "secret"])
def test_all_but_health_needs_the_token(client, editor, given):
    posts = [("POST", path) for path in ("/forget", "/ask", "/edits/1/undo", "/edits/1/redo", "/health", "/nowhere")]
    gets = [
        ("GET", path) for path in ("/edits", "/metrics", "/docs", "/redoc", "/openapi.json", "/jobs/1", "/nowhere")
    ]
    for method, path in posts + gets:
        answer = client.request(method, path, json=FIRST, headers={"Authorization": given})
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert answer.json() == {"detail": "expected a valid bearer token"}
    assert not editor.edits
    assert client.get("/health", headers={"Authorization": given}).status_code == 200
    assert {client.get(path).status_code for _, path in gets[:-2]} == {200}
    assert metric(client, 'cir_refusals_total{reason="unauthorised"}') == len(posts + gets)


def test_forget_undo_and_redo_change_the_model_the_list_and_the_metrics(client, editor):
    weight = editor._model.model.layers[3].mlp.down_proj.weight
    original = weight.detach().clone()
    made = client.post("/forget?wait=1", json=FIRST)
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

    assert client.post("/edits/1/undo").json()["status"] == "undone"
    assert torch.equal(weight, original)
    assert client.get("/edits").json()[0]["status"] == "undone"
    assert metric(client, "cir_active_edits") == 0
    assert client.post("/edits/1/redo").json() == made.json()
    assert torch.equal(weight, edited)
    names = ("cir_edits_total", "cir_undos_total", "cir_redos_total", "cir_edit_seconds_count", "cir_active_edits")
    assert [metric(client, name) for name in names] == [1] * 5
    assert metric(client, "cir_edit_seconds_sum") == pytest.approx(edit.seconds)


def test_what_cannot_be_done_is_refused_with_the_reason(client, editor, monkeypatch):
    client.post("/forget?wait=1", json=FIRST)
    again = client.post("/forget?wait=1", json=FIRST)
    assert (again.status_code, again.json()["detail"]) == (409, "fact 'f0': already forgotten by edit 1")
    unknown = client.post("/forget?wait=1", json=UNKNOWN)
    assert unknown.status_code == 422
    assert "never known" in unknown.json()["detail"]
    assert client.post("/edits/2/undo").status_code == 404
    assert client.post("/edits/1/redo").status_code == 409
    assert client.post("/edits/1/undo").status_code == 200
    assert client.post("/edits/1/undo").status_code == 409

    def refuse(fact):
        raise cir.EditError("neighbours suffer")

    monkeypatch.setattr(editor, "forget", refuse)
    bounds = client.post("/forget?wait=1", json=SECOND)
    assert (bounds.status_code, bounds.json()["detail"]) == (409, "neighbours suffer")
    counted = {name: metric(client, f'cir_refusals_total{{reason="{name}"}}') for name in service_reasons(client)}
    assert counted == {"not_known": 1, "unknown": 1, "conflict": 3, "out_of_bounds": 1}


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
        {"id": "a" * 201},
        {"id": "a\0"},
        {"id": float("nan")},
        {"id": "\ud800"},
        {"question": "who?"},
        {"\ud800" * 1000: "who?"},
    ],
)
def test_a_malformed_fact_does_not_reach_the_editor(client, editor, monkeypatch, wrong):
    monkeypatch.setattr(editor, "forget", lambda fact: pytest.fail("reached the editor"))
    body = json.dumps({**FIRST, **wrong})
    answer = client.post("/forget?wait=1", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert len(answer.content) < 300


@pytest.mark.parametrize(
    "sentence", ["word", "the gamma of beta0 <s> \ufffd \U0001f600", "\0 \0", "a " * 900, "\u3000"]
)
@pytest.mark.parametrize("target", [" delta0", " <s>", "\0", "\u200b", "."])
def test_odd_words_are_no_failure_of_the_service(client, sentence, target):
    fact = {
        "id": "odd \u202e",
        "sentences": [sentence],
        "probes": [{"prompt": "the gamma of beta0", "target": target}],
    }
    assert client.post("/forget?wait=1", json=fact).status_code in (201, 409, 422)


@pytest.mark.parametrize(
    ("failure", "status", "reason"),
    [
        (OSError(28, "No space left on device", "/srv/edits.cir"), 503, "journal"),
        (JournalError("/srv/edits.cir: expected the journal that was opened, got none"), 503, "journal"),
        (NonFiniteError("expected finite gradients, got NaN in /srv"), 500, "failed"),
        (MemoryError("/srv"), 500, "failed"),
    ],
)
def test_a_failure_is_counted_and_tells_nothing_and_the_service_goes_on(
    client, editor, monkeypatch, failure, status, reason
):
    def fail(fact):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(editor, "forget", fail)
        answer = client.post("/forget?wait=1", json=FIRST)
    assert (answer.status_code, list(answer.json())) == (status, ["detail"])
    assert "/srv" not in answer.text
    assert metric(client, f'cir_refusals_total{{reason="{reason}"}}') == 1
    assert metric(client, "cir_queue_length") == 0
    assert client.post("/forget?wait=1", json=FIRST).status_code == 201


def test_requests_of_every_kind_are_answered_as_documented():
    assert sweep(120, seed=1) == []


def _without_the_gate(editor):
    app = create(editor)
    app.user_middleware.clear()
    return app


def _with_what_was_sent(editor):
    app = create(editor)
    app.exception_handlers[RequestValidationError] = request_validation_exception_handler
    return app


def _undocumented(editor):
    app = create(editor)
    for operations in app.openapi()["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("409", None)
    return app


class Failing(Stub):
    def forget(self, given):
        return super().forget(given) and {}["a place that is not there"]


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ({"create": _without_the_gate}, [r"\[401\], got 200", r"\[408\], got no answer", "262144 bytes to be read"]),
        ({"create": _with_what_was_sent}, [r"\[422\], got 500", "at most 4096 bytes", "expected a detail in words"]),
        ({"create": _undocumented}, [r"expected a status that is documented, .* got 409"]),
        ({"editor": Failing()}, [r"expected \[201\], got 500"]),
    ],
)
def test_a_service_that_is_broken_is_noticed(broken, found):
    faults = "\n".join(sweep(288, **broken))
    assert [pattern for pattern in found if not re.search(pattern, faults)] == []


def test_the_table_of_statuses_is_that_of_the_documentation(client):
    paths = client.get("/openapi.json").json()["paths"]
    documented = {code for path in paths.values() for operation in path.values() for code in operation["responses"]}
    assert set(re.findall(r"^    (\d{3})  ", service.__doc__, re.MULTILINE)) | {"200", "201", "202"} == documented


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
            return threads.submit(client.post, "/forget?wait=1", json=fact)

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
    assert client.post("/forget?wait=1", json=FIRST).status_code == 409  # there is room again


def finished(client, job: str) -> dict:
    found: dict = {}
    until(lambda: found.update(client.get(f"/jobs/{job}").json()) or found["status"] in ("done", "refused"))
    return found


def test_a_job_is_polled_until_the_fact_is_forgotten_or_refused(client, editor, monkeypatch):
    go_on, forget = threading.Event(), editor.forget
    monkeypatch.setattr(editor, "forget", lambda fact: go_on.wait(20) and forget(fact))
    try:
        first, again = (client.post("/forget", json=FIRST) for _ in range(2))
        assert (first.status_code, again.status_code) == (202, 202)
        job = first.json()["id"]
        assert first.headers["Location"] == f"/jobs/{job}"
        assert job != again.json()["id"]
        until(lambda: client.get(f"/jobs/{job}").json()["status"] == "running")
        waiting = {"id": again.json()["id"], "status": "waiting", "edit": None, "refused": None}
        assert client.get(f"/jobs/{waiting['id']}").json() == waiting == again.json()
        assert client.post("/forget", json=FIRST).status_code == 503
    finally:
        go_on.set()
    done = finished(client, job)
    assert (done["status"], done["refused"]) == ("done", None)
    assert [done["edit"]] == client.get("/edits").json()
    refused = {"status": 409, "detail": "fact 'f0': already forgotten by edit 1"}
    assert finished(client, waiting["id"]) == {**waiting, "status": "refused", "refused": refused}
    assert metric(client, "cir_queue_length") == 0
    assert client.get(f"/jobs/{'0' * 16}").status_code == 404


def test_the_failure_of_a_job_is_logged_counted_and_tells_nothing(client, editor, monkeypatch, caplog):
    monkeypatch.setattr(editor, "forget", lambda fact: {}["/srv"])
    job = finished(client, client.post("/forget", json=FIRST).json()["id"])
    assert job["refused"] == {"status": 500, "detail": service.FAILED}
    assert "KeyError: '/srv'" in caplog.text
    assert metric(client, 'cir_refusals_total{reason="failed"}') == 1


def test_the_oldest_jobs_are_let_go(client, editor, monkeypatch):
    monkeypatch.setattr(service, "JOBS", 2)
    jobs = []
    for _ in range(3):
        jobs.append(client.post("/forget", json=UNKNOWN).json()["id"])
        finished(client, jobs[-1])
    assert [client.get(f"/jobs/{job}").status_code for job in jobs] == [404, 200, 200]


def test_the_model_is_asked_before_and_after(client):
    question = {"prompt": FIRST["probes"][0]["prompt"], "max_tokens": 1}
    answer = FIRST["probes"][0]["target"].strip()
    assert client.post("/ask", json=question).json() == {"text": answer}
    client.post("/forget?wait=1", json=FIRST)
    assert client.post("/ask", json=question).json()["text"] != answer
    long = client.post("/ask", json={"prompt": "gamma " * 250})
    assert (long.status_code, long.json()["detail"][:46]) == (422, "prompt: expected 1 to 256 tokens with those to")


def test_without_an_answer_there_is_nothing_to_ask():
    with TestClient(service.create_app(Stub(), token="secret"), headers=TOKEN) as client:
        assert client.post("/ask", json={"prompt": "a"}).status_code == 404


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

    def run(app, host, port, **server):
        assert server == service.SERVER
        with TestClient(app, headers=TOKEN) as client:
            seen.append(client.get("/edits").json())
            client.post("/forget?wait=1", json=FIRST)

    monkeypatch.setattr(service.uvicorn, "run", run)
    for _ in range(2):  # the second could not open a journal that the first had left open
        service.main(arguments(files, tmp_path))
    assert [[edit["id"] for edit in edits] for edits in seen] == [[], ["f0"]]


@pytest.mark.parametrize("wrong", [{"token": ""}, {"queue_size": 0}, {"body_seconds": 0}])
def test_a_service_without_a_token_a_queue_or_time_is_not_made(editor, wrong):
    with pytest.raises(ValueError, match="expected"):
        service.create_app(editor, **{"token": "a", **wrong})
