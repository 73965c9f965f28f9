from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

import cir
from examples import batch
from tests.examples.common import CONFIG, FIRST, SECOND, UNKNOWN, arguments, load
from tests.tiny import TEXT, word_tokenizer


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
    recalled = cir.evaluate(replayed, tokenizer, [SECOND]).mean_recall
    assert recalled == pytest.approx(lines[1]["recall_after"], rel=1e-4)  # other forwards round otherwise
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
    weak = json.dumps({**CONFIG, "max_steps": 2, "dose": 0.01})
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
