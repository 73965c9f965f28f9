"""Models that are sharded over two processes, on the CPU: the same comes of them as of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cir import cli
from tests.tiny import TEXT, word_tokenizer

pytest.importorskip("transformers.distributed", reason="transformers 5 loads sharded models")
from tests.distributed.scenes import KEPT, TOLD, biased_llama, forgotten, weights_of, words

ROOT = Path(__file__).resolve().parents[2]
CLOSE, ALIKE, LONGEST = 1e-5, 1e-4, 120  # of weights; of figures, which may move by several times as much
WAYS = ("fsdp", "tp")


def torchrun(*words: object) -> tuple[int, str]:
    """The exit status, and what was said, of a module in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    process = subprocess.Popen(
        [*command, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.terminate()  # and it ends those that it started
        said, _ = process.communicate()
        raise AssertionError(said) from None
    return process.returncode, said


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    biased_llama().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("facts", TOLD), ("stay", KEPT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def alone(setting) -> dict[str, Any]:
    """What comes of it in one process."""
    model = biased_llama()
    before = weights_of(model)
    return {**forgotten(model), "untouched": before, "weights": weights_of(model)}


@pytest.fixture(scope="module")
def found(setting) -> list[dict[str, Any]]:
    """What each of two processes found."""
    status, said = torchrun("tests.distributed.scenes", setting)
    assert status == 0, said
    return [torch.load(setting / f"{rank}.pt", weights_only=False) for rank in range(2)]


def largest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def close(ours: Any, theirs: Any) -> bool:
    """Whether figures, however nested, are the same but for rounding."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(close(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    return abs(ours - theirs) < ALIKE * max(1.0, abs(theirs)) if isinstance(ours, float) else ours == theirs


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_those_of_one_process(way, alone, found):
    assert largest(alone["weights"], alone["untouched"]) > 0.05
    assert largest(found[0][way]["weights"], alone["weights"]) < CLOSE


@pytest.mark.parametrize("way", WAYS)
def test_what_is_measured_is_that_of_one_process(way, alone, found):
    for own in found:
        assert close(own[way]["report"], alone["report"])
        assert close(own[way]["evaluation"], alone["evaluation"])
    assert alone["report"]["after"]["mean_recall"] < 0.9 * alone["report"]["before"]["mean_recall"]


@pytest.mark.parametrize("way", WAYS)
def test_subspaces_are_those_of_one_process(way, alone, found):
    assert found[0][way]["before"] == alone["before"]  # the fingerprint
    for own in found:
        assert largest(own[way]["fitted"], alone["fitted"]) < CLOSE


@pytest.mark.parametrize("way", WAYS)
def test_models_are_left_as_they_were(way, found):
    assert all(own[way]["as it was"] for own in found)


def test_processes_stop_together(found):
    for how, stopped in (("callback", "stopped by a callback"), ("signal", "interrupted")):
        assert found[0][how] == found[1][how]
        assert found[0][how][0] == stopped


def test_what_is_not_supported_is_refused(found):
    said = found[1]["refusals"]
    special = {
        "two dimensions": "in one dimension, got 1 meshes of 2",
        "no plan": "got one sharded along dimension 0 whose plan is none",
        "experts": "expected an nn.Linear in a model sharded over processes, got MixtralExperts",
    }
    assert said.keys() > special.keys()
    for name, message in said.items():
        assert special.get(name, "expected a whole model, got a model sharded over processes") in message, name
    assert len(said) == 11


def test_the_command_writes_what_one_process_writes(setting, found):
    assert cli.main(words(setting, "one")) == 0
    one, two = (load_file(setting / name / "model.safetensors") for name in ("one", "two"))
    assert largest(one, load_file(setting / "model" / "model.safetensors")) > 0.01
    assert largest(two, one) < CLOSE
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (setting / "one" / name).read_text() == (setting / "two" / name).read_text()


def test_the_first_process_alone_speaks_and_writes(setting, found):
    first, second = (own["typed"] for own in found)
    assert first["statuses"] == second["statuses"] == [0, 1]
    assert first["said"].count("text loss") == 1
    assert second["said"] == ""
    for own in (first, second):
        assert "expected neither --certify nor the paper's preset in several processes" in own["complained"]
    assert not (setting / "three").exists()


def test_several_processes_are_what_torchrun_starts(setting, capsys, monkeypatch):
    assert cli.main([*words(setting, "four"), "--shard=tp"]) == 1
    assert "--shard: expected several processes, as torchrun starts them, got one" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["doctor"]) == 1
    assert "expected one of unlearn, eval in several processes, got doctor" in capsys.readouterr().err
