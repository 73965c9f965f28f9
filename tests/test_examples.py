from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastapi.testclient import TestClient
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import cir
from examples import batch, service, trainer_callback
from tests.tiny import TEXT, facts, tiny_llama, word_tokenizer

CONFIG = {"rate": 0.4, "keep": 0.5, "budget": 5.0, "target_recall": 0.02, "text_tokens": 256}
RANKS = cir.CIRConfig(rank_background=6, rank_activation=6, rank_gradient=6, retain_tokens=1024)
TOKEN = {"Authorization": "Bearer secret"}
FIRST, SECOND = facts(2)
UNKNOWN = {
    "id": "unknown",
    "sentences": ["the gamma of beta9 is word1"],
    "probes": [{"prompt": "the gamma of beta9 is", "target": " word1"}],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small are slower on several, by far so where something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model that knows twelve facts, its tokenizer, its subspaces, a text and a file of facts."""
    folder = tmp_path_factory.mktemp("knows")
    model, tokenizer = tiny_llama(hidden_size=64, intermediate_size=128), word_tokenizer()
    rows = [torch.tensor(tokenizer(s)["input_ids"]) for fact in facts(12) for s in fact["sentences"]]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=ids != 0, labels=ids.masked_fill(ids == 0, -100)).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    subspaces = cir.Subspaces.fit(model, tokenizer, TEXT, facts(12)[6:], config=RANKS, progress=False)
    subspaces.save(folder / "subspaces.safetensors")
    (folder / "text.txt").write_text(TEXT)
    (folder / "facts.jsonl").write_text(f"{json.dumps(FIRST)}\n{json.dumps(SECOND)}\n")
    return folder


def load(files):
    return AutoModelForCausalLM.from_pretrained(files / "model").eval()


def arguments(files, tmp_path) -> list[str]:
    named = {
        "--model": files / "model",
        "--subspaces": files / "subspaces.safetensors",
        "--journal": tmp_path / "edits.cir",
        "--text": files / "text.txt",
        "--config": json.dumps(CONFIG),
    }
    return [str(part) for pair in named.items() for part in pair]


@pytest.fixture
def editor(files):
    config = cir.EditConfig(**CONFIG)
    subspaces = cir.Subspaces.load(files / "subspaces.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    return cir.Editor(load(files), tokenizer, subspaces, text=TEXT, config=config)


@pytest.fixture
def client(editor):
    with TestClient(service.create_app(editor, token="secret", queue_size=2)) as client:
        yield client


def metric(client, name: str) -> float:
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    return float(lines.get(name, 0))


# --- service ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer Secret"}, {"Authorization": "Basic secret"}])
def test_a_change_needs_the_token_and_reading_does_not(client, editor, headers):
    for path in ("/forget", "/edits/1/undo", "/edits/1/redo"):
        answer = client.post(path, json=FIRST, headers=headers)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert not editor.edits
    assert [client.get(path).status_code for path in ("/health", "/edits", "/metrics")] == [200, 200, 200]
    assert metric(client, 'cir_refusals_total{reason="unauthorised"}') == 3


def test_forget_undo_and_redo_change_the_model_the_list_and_the_metrics(client, editor):
    weight = editor._model.model.layers[0].mlp.up_proj.weight
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


# --- batch -----------------------------------------------------------------------------------------------------


def run_batch(files, tmp_path, capsys, *more: str) -> tuple[int, list[dict]]:
    out = ["--facts", str(files / "facts.jsonl"), "--out", str(tmp_path / "out"), *more]
    status = batch.main([*arguments(files, tmp_path), *out])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_batch_forgets_once_and_ships_what_the_journal_replays(files, tmp_path, capsys):
    status, lines = run_batch(files, tmp_path, capsys)
    assert status == 0
    assert [(line["id"], line["status"]) for line in lines] == [("f0", "forgotten"), ("f1", "forgotten")]
    assert all(line["recall_after"] < 0.05 * line["recall_before"] and line["seconds"] > 0 for line in lines)
    journal, out = (tmp_path / "edits.cir").read_bytes(), tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "0001-f0",
        "0001-f0.safetensors",
        "0002-f1",
        "0002-f1.safetensors",
    ]
    adapter = (out / "0001-f0" / "adapter_model.safetensors").stat()
    (out / "0001-f0.safetensors").unlink()  # as if it had been killed before it was written
    status, again = run_batch(files, tmp_path, capsys)
    assert status == 0
    assert again == [{**line, "status": "skipped"} for line in lines]
    assert (tmp_path / "edits.cir").read_bytes() == journal
    assert (out / "0001-f0" / "adapter_model.safetensors").stat() == adapter

    tokenizer, replayed, applied = word_tokenizer(), load(files), load(files)
    subspaces = cir.Subspaces.load(files / "subspaces.safetensors")
    cir.Editor(replayed, tokenizer, subspaces, text=TEXT, journal=tmp_path / "edits.cir").close()
    assert cir.evaluate(replayed, tokenizer, [SECOND]).mean_recall == pytest.approx(lines[1]["recall_after"])
    for name in ("0001-f0", "0002-f1"):
        cir.Edit.load(out / f"{name}.safetensors").apply_(applied)
    for a, b in zip(replayed.parameters(), applied.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_peft_loads_a_shipped_adapter_and_joins_two(editor, files, tmp_path):
    ids = torch.tensor([editor._tokenizer(FIRST["probes"][0]["prompt"])["input_ids"]])

    @torch.no_grad()
    def logits(model):
        return model(ids).logits

    expected = [logits(editor._model)]
    for fact in (FIRST, SECOND):
        batch.ship(editor.forget(fact), tmp_path, "base")
        expected.append(logits(editor._model))
    assert (expected[1] - expected[0]).abs().max() > 0.1
    assert (expected[2] - expected[1]).abs().max() > 0.01
    joined = PeftModel.from_pretrained(load(files), tmp_path / "0001-f0", adapter_name="edit-1")
    torch.testing.assert_close(logits(joined), expected[1], rtol=1e-4, atol=1e-4)
    joined.load_adapter(tmp_path / "0002-f1", adapter_name="edit-2")
    joined.add_weighted_adapter(["edit-1", "edit-2"], [1.0, 1.0], "edits", combination_type="cat")
    joined.save_pretrained(tmp_path, selected_adapters=["edits"])
    both = PeftModel.from_pretrained(load(files), tmp_path / "edits")
    torch.testing.assert_close(logits(both), expected[2], rtol=1e-4, atol=1e-4)


def test_a_batch_reports_what_it_refuses_and_leaves_it_untouched(files, tmp_path, capsys):
    (tmp_path / "some.jsonl").write_text(f"{json.dumps(FIRST)}\n{json.dumps(UNKNOWN)}\n")
    status, (first, unknown) = run_batch(files, tmp_path, capsys, "--facts", str(tmp_path / "some.jsonl"))
    assert status == 1
    assert (first["status"], unknown["status"]) == ("forgotten", "refused")
    assert "never known" in unknown["reason"]
    weak = json.dumps({**CONFIG, "max_steps": 2, "rate": 0.01})
    status, (first, second) = run_batch(files, tmp_path, capsys, "--config", weak)
    assert status == 1
    assert (first["status"], second["status"]) == ("skipped", "refused")
    assert second["recall_after"] > 0.9
    assert "undone" in second["reason"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001-f0", "0001-f0.safetensors"]
    status, lines = run_batch(files, tmp_path, capsys)
    assert status == 0
    assert lines[1]["status"] == "forgotten"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("facts.jsonl", "{}", "line 1: expected 'sentences'"), ("edits.cir", "other", "expected a journal")],
)
def test_a_batch_that_cannot_work_says_why(files, tmp_path, capsys, name, content, reason):
    (tmp_path / "facts.jsonl").write_text(json.dumps(FIRST))
    (tmp_path / name).write_text(f"{content}\n")
    more = ["--facts", str(tmp_path / "facts.jsonl"), "--out", str(tmp_path / "out")]
    assert batch.main([*arguments(files, tmp_path), *more]) == 2
    printed = capsys.readouterr()
    assert (printed.out, reason in printed.err) == ("", True)


@pytest.mark.parametrize(("id", "name"), [("../../x y", "0001-_x_y"), ("f0", "0001-f0")])
def test_an_id_stays_inside_the_folder(editor, tmp_path, id, name):
    batch.ship(editor.forget({**FIRST, "id": id}), tmp_path, "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.safetensors"]
    config = json.loads((tmp_path / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"


# --- trainer callback --------------------------------------------------------------------------------------------


def tune(editor, tmp_path, sentences: list[str], **settings) -> tuple[Trainer, trainer_callback.KeepForgotten]:
    rows = [editor._tokenizer(sentence)["input_ids"] for sentence in sentences]
    data = [{"input_ids": row, "labels": row} for row in rows]
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", **settings}
    trainer = Trainer(
        model=editor._model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "tuned"),
            max_steps=12,
            learning_rate=3e-3,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            **settings,
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=default_data_collator,
    )
    watch = trainer_callback.KeepForgotten(editor.edits, editor._tokenizer, log=trainer.log)
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


SAVES = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("settings", [{}, {"eval_strategy": "no", **SAVES}, SAVES])
def test_training_ends_when_a_fact_comes_back(editor, tmp_path, settings):
    edit = editor.forget(FIRST)
    for layer in editor._model.model.layers:
        layer.self_attn.attention_dropout = 0.2  # which recall must be measured without
    trainer, watch = tune(editor, tmp_path, FIRST["sentences"][1:], **settings)
    assert watch.returned == ["f0"]
    assert 2 <= trainer.state.global_step < 12
    logged = [entry for entry in trainer.state.log_history if "forgotten_recall" in entry]
    assert [entry["step"] for entry in logged] == list(range(2, trainer.state.global_step + 1, 2))
    now = cir.evaluate(editor._model.eval(), editor._tokenizer, [FIRST]).mean_recall
    assert logged[-1]["forgotten_recall"] == pytest.approx(now, rel=1e-4)
    assert now > 0.2 * edit.before.recall
    assert all(entry["forgotten_recall"] <= 0.2 * edit.before.recall for entry in logged[:-1])


def test_training_on_other_text_goes_on_to_its_end(editor, tmp_path):
    for sentence in FIRST["sentences"][1:] + SECOND["sentences"][1:]:
        editor.forget(sentence.removesuffix(" now"))  # both have the same id
    trainer, watch = tune(editor, tmp_path, [TEXT[:200]], eval_strategy="epoch")
    assert (trainer.state.global_step, watch.returned) == (12, [])
    assert len([entry for entry in trainer.state.log_history if "forgotten_recall" in entry]) == 12


@pytest.mark.parametrize("comes_back", [True, False])
def test_the_script_writes_a_model_only_if_nothing_came_back(editor, files, tmp_path, comes_back, capsys):
    edit = editor.forget(FIRST)
    edit.save(tmp_path / "edit.safetensors")
    (tmp_path / "mine.txt").write_text(f"{FIRST['sentences'][1]} " * 60 if comes_back else TEXT)
    named = {
        "--model": files / "model",
        "--edits": tmp_path / "edit.safetensors",
        "--text": tmp_path / "mine.txt",
        "--out": tmp_path / "tuned",
        "--steps": 12,
        "--every": 4,
        "--lr": 3e-3 if comes_back else 1e-5,
        "--length": 32,
    }
    status = trainer_callback.main([str(part) for pair in named.items() for part in pair])
    assert status == int(comes_back)
    assert (tmp_path / "tuned" / "model.safetensors").exists() is not comes_back
    if comes_back:
        assert "f0" in capsys.readouterr().err
        return
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert cir.evaluate(tuned, editor._tokenizer, [FIRST]).mean_recall < 0.2 * edit.before.recall


@pytest.mark.parametrize("wrong", [{"edits": []}, {"share": 0.0}])
def test_a_callback_that_could_never_stop_is_not_made(editor, wrong):
    given = {"edits": [editor.forget(FIRST)], "tokenizer": None, **wrong}
    with pytest.raises(ValueError, match="expected"):
        trainer_callback.KeepForgotten(**given)
