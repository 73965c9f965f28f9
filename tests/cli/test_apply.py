from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cir.forgetting.update import fingerprint
from cir.model.finding import find_stack
from tests.cli.conftest import run
from tests.editing.test_history import an_edit as made


def an_edit(model, tmp_path):
    """A file with a random edit of ``model``, and the model with it."""
    targets = find_stack(model).writers(0)  # as an editor makes them
    shapes = {target.name: target.weight.shape for target in targets}
    factors = {name: (torch.randn(2, rows), torch.randn(2, columns)) for name, (rows, columns) in shapes.items()}
    edit = made(1, factors=factors, fingerprint=fingerprint(targets))
    edit.save(tmp_path / "edit")
    edit.apply_(model)
    return str(tmp_path / "edit")


def test_apply_and_revert(files, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    edit = an_edit(model, tmp_path)
    change = ["--edit", edit, "--quiet", "--device", "cpu", "--out"]
    assert run(files, "apply", "--model", "IN/model", *change, str(tmp_path / "edited")) == 0
    assert "read back equal" in capsys.readouterr().out
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), edited.parameters(), strict=True))

    again = ["apply", "--model", str(tmp_path / "edited"), *change, str(tmp_path / "twice"), "--force"]
    assert run(files, *again) == 1
    assert "edit 'seven': expected one that is not in this model, got it again" in capsys.readouterr().err
    both = ["apply", "--model", "IN/model", "--edit", edit, edit, "--quiet", "--out", str(tmp_path / "both")]
    assert run(files, *both) == 1
    assert "expected one that is not in this model, got it again" in capsys.readouterr().err

    assert run(files, "revert", "--model", str(tmp_path / "edited"), *change, str(tmp_path / "reverted")) == 0
    original = AutoModelForCausalLM.from_pretrained(files / "model")
    assert "as before up to rounding" in capsys.readouterr().out
    reverted = AutoModelForCausalLM.from_pretrained(tmp_path / "reverted")
    for p, q in zip(original.parameters(), reverted.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)

    # Out of it, it is no longer to be taken out, and may be added again; of another's record it was never in.
    for source in ("IN/model", str(tmp_path / "reverted")):
        assert run(files, "revert", "--model", source, *change, str(tmp_path / "never")) == 1
        assert "got none by its record; --force takes it out all the same" in capsys.readouterr().err
    assert run(files, "apply", "--model", str(tmp_path / "reverted"), *change, str(tmp_path / "again")) == 1
    assert "--force applies it" in capsys.readouterr().err  # rounding made it another model
    assert run(files, "revert", "--model", "IN/model", *change, str(tmp_path / "never"), "--force") == 0
    (tmp_path / "edited" / "cir-edits.json").write_text("[]")
    assert run(files, *again) == 1
    assert "cir-edits.json: expected the record of edits" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_an_edit_of_another_model_is_applied_only_by_force(files, tmp_path, capsys):
    other = AutoModelForCausalLM.from_pretrained(files / "model")
    other.model.layers[0].mlp.down_proj.weight.data *= 2
    edit = an_edit(other, tmp_path)
    change = [
        "apply",
        "--model",
        "IN/model",
        "--edit",
        edit,
        "--quiet",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "a"),
    ]
    assert run(files, *change) == 1
    assert "expected one of the model" in capsys.readouterr().err
    assert run(files, *change, "--force") == 0


def test_a_checkpoint_that_reads_back_otherwise_is_not_kept(files, tmp_path, capsys, monkeypatch):
    edit = an_edit(AutoModelForCausalLM.from_pretrained(files / "model"), tmp_path)
    save = PreTrainedModel.save_pretrained

    def corrupt(self, folder, **options):
        self.model.layers[0].mlp.down_proj.weight.data[3, 3] += 1
        save(self, folder, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", corrupt)
    change = ["apply", "--model", "IN/model", "--edit", edit, "--quiet", "--device", "cpu"]
    assert run(files, *change, "--out", str(tmp_path / "out")) == 1
    assert "to read back as" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edit", "in"]
