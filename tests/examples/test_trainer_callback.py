from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

import cir
from examples import trainer_callback
from tests.examples.common import FIRST, SECOND
from tests.tiny import TEXT


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
