from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

import cir
from cir import CIRConfig, Subspaces, cli
from cir.data.facts import probed
from cir.measures import recall
from tests.tiny import TEXT, facts, knowing_llama, word_tokenizer

FACTS = facts(12)
# A model of 24 dimensions has little room: the bounds here are wider than those for real ones.
BOUNDS = ["--budget", "1", "--worst-window", "1", "--keep", "0.9", "--target-recall", "0.3"]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A folder with a model that knows the facts, some of them in files, text, and subspaces of its upper half."""
    folder = tmp_path_factory.mktemp("known")
    model, tokenizer = knowing_llama(), word_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    strange = {"id": "strange", "sentences": ["delta1 now of gamma word3"]}
    for name, some in (("stay", FACTS[:6]), ("eight", FACTS[8:9]), ("few", [FACTS[8], strange, FACTS[9]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in some))
    (folder / "text.txt").write_text(TEXT)
    config = CIRConfig(layers=0.5, retain_tokens=1024)
    Subspaces.fit(model, tokenizer, TEXT, FACTS[:6], config=config, progress=False).save(folder / "subspaces")
    return folder


@pytest.fixture
def call(known, tmp_path, capsys):
    """A function that runs a command on that model and a journal of this test: its status, output and errors."""

    def run(name, *words, journal="journal"):
        of_model = [] if name == "edits" else ["--model", str(known / "model"), "--device", "cpu"]
        of_journal = [] if name == "apply" else ["--journal", str(tmp_path / journal)]
        given = [word.replace("IN/", f"{known}/").replace("OUT/", f"{tmp_path}/") for word in words]
        status = cli.main([name, *of_model, *of_journal, *given])
        return status, *capsys.readouterr()

    return run


FORGET = ["--subspaces", "IN/subspaces", "--text", "IN/text.txt", *BOUNDS]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(first, second):
    return all(tensor.equal(second[name]) for name, tensor in first.items())


def recalled(folder, fact):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    (value,) = recall(model, word_tokenizer(), [probed(cir.load_facts([fact])[0])]).values()
    return value


def test_what_is_forgotten_is_in_the_journal_and_in_the_checkpoint_that_is_written(known, call, tmp_path):
    before = (known / "model" / "model.safetensors").read_bytes()
    status, out, _ = call("forget", *FORGET, "--facts", "IN/eight.jsonl", "--save-edit", "OUT/edit", "--out", "OUT/a")
    assert status == 0
    assert "edit 1     f8\nrecall     " in out
    assert "\nneighbours " in out
    assert "\nforgotten  " in out
    assert recalled(known / "model", FACTS[8]) > 0.9
    assert recalled(tmp_path / "a", FACTS[8]) < 0.3
    # The next call does it again first, and what is in the checkpoint is what `cir apply` makes of the saved edit.
    fact = FACTS[9]["sentences"][1]
    status, out, _ = call("forget", *FORGET, "--fact", fact, "--out", "OUT/b")
    assert status == 0
    assert f"edit 2     {fact}" in out
    assert recalled(tmp_path / "b", FACTS[8]) < 0.3
    assert recalled(tmp_path / "b", {"id": "nine", "sentences": [fact]}) < 0.3
    assert len(json.loads((tmp_path / "b" / "cir-edits.json").read_text())["edits"]) == 2
    assert call("apply", "--edit", "OUT/edit", "--out", "OUT/c")[0] == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    assert (known / "model" / "model.safetensors").read_bytes() == before


def test_an_edit_is_listed_and_taken_back_without_subspaces(known, call, tmp_path):
    assert call("forget", *FORGET, "--facts", "IN/eight.jsonl")[0] == 0
    status, out, _ = call("edits")
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()] == [["edit", "status"], ["1", "active"]]
    assert out.endswith(" f8\n")
    status, out, _ = call("undo", "--out", "OUT/back", "--json")
    assert status == 0
    assert json.loads(out)["recall"] > 0.9
    assert same(weights(known / "model"), weights(tmp_path / "back"))
    (row,) = json.loads(call("edits", "--json")[1])["edits"]
    assert [row[name] for name in ("number", "id", "status", "forgotten")] == [1, "f8", "undone", True]
    assert row["after"]["recall"] < 0.3 < 0.9 < row["before"]["recall"]
    status, _, error = call("undo", "--edit", "1")
    assert status == 1
    assert error == "cir: expected edit 1 ('f8') that is active, got {1: 'undone'}\n"


def test_a_fact_that_is_refused_keeps_no_other_from_going(call):
    status, out, error = call("forget", *FORGET, "--facts", "IN/few.jsonl", "--json")
    assert status == 1
    found = json.loads(out)
    assert [edit["id"] for edit in found["edits"]] == ["f8", "f9"]
    assert found["refused"].keys() == {"strange"}
    assert "cir: fact 'strange': expected one that the model knows" in error
    assert "recall     " in error  # all that is no JSON
    status, out, error = call("forget", *FORGET, "--facts", "IN/eight.jsonl", "--out", "OUT/out")
    assert status == 1
    assert error == "cir: fact 'f8': already forgotten by edit 1\n"
    assert "written    " in out  # with what the journal holds


def test_a_fact_that_is_partly_forgotten_is_told(call):
    status, out, _ = call(
        "forget", *FORGET, "--facts", "IN/eight.jsonl", "--max-steps", "1", "--target-recall", "0.001"
    )
    assert status == 3
    assert "\npartly     all steps taken; 1 steps, " in out
    assert "(partly: all steps taken)" in call("edits")[1]


def test_with_nothing_in_effect_no_checkpoint_is_written(call, tmp_path):
    strange = "delta1 now of gamma word3"
    status, _, error = call("forget", *FORGET, "--fact", strange, "--out", "OUT/out")
    assert status == 1
    assert error.endswith("cir: --out: not written, as no edit is in effect\n")
    assert not (tmp_path / "out").exists()


def test_what_is_fitted_here_is_of_the_layers_of_the_journal(call):
    fit = ["--contrast", "IN/stay.jsonl", "--text", "IN/text.txt", *BOUNDS]
    status, out, _ = call("forget", *fit, "--facts", "IN/eight.jsonl", journal="own")
    assert status == 0
    assert "`cir fit` them once, and --subspaces saves that time" in out
    assert call("forget", *FORGET, "--facts", "IN/eight.jsonl", "--max-steps", "2")[0] in (0, 3)
    status, _, error = call("forget", *fit, "--fact", FACTS[9]["sentences"][1])
    assert (status, error) == (0, "")
    assert [row["number"] for row in json.loads(call("edits", "--json")[1])["edits"]] == [1, 2]


def test_facts_that_stay_are_built_in_and_without_what_goes(call, monkeypatch):
    given, builtin = [], cir.cli.edits.builtin_contrast
    monkeypatch.setattr(cir.cli.edits, "builtin_contrast", lambda facts: given.append(facts) or builtin(facts))
    words = ["--text", "IN/text.txt", *BOUNDS, "--max-steps", "1"]
    assert call("forget", *words, "--fact", FACTS[8]["sentences"][1])[0] in (0, 3)
    assert call("forget", *words, "--fact", FACTS[9]["sentences"][1])[0] in (0, 3)
    assert [[fact.id for fact in some] for some in given] == [
        [FACTS[8]["sentences"][1]],
        [FACTS[9]["sentences"][1], FACTS[8]["sentences"][1]],
    ]


def test_a_damaged_journal_is_told(call, tmp_path):
    assert call("forget", *FORGET, "--facts", "IN/eight.jsonl")[0] == 0
    with (tmp_path / "journal").open("ab") as journal:
        journal.write(b"more")
    status, out, error = call("edits")
    assert status == 1
    assert " f8\n" in out
    assert error.endswith("does not check; see `cir journal check`\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["forget", *FORGET, "--fact", "Rome."], "fact 'Rome.': expected probes, or a sentence of two words or more"),
        (
            ["forget", *FORGET, "--facts", "IN/few.jsonl", "--save-edit", "OUT/e"],
            "--save-edit: expected one fact, got 3",
        ),
        (["forget", *FORGET, "--facts", "IN/stay.jsonl"], "contrast: expected facts that must stay, got 'f0'"),
        (["forget", *FORGET, "--fact", "a b", "--key-file", "IN/none"], "No such file"),
        (["forget", *FORGET, "--fact", "a b", "--out", "IN/model"], "which exists; --overwrite replaces it"),
        (["forget", "--contrast", "IN/none", "--fact", "a b"], "IN/none"),
        (["forget", "--subspaces", "IN/text.txt", "--fact", "a b"], "expected subspaces, got"),
        (["undo"], "--journal: expected a journal, got OUT/journal, which does not exist"),
        (["edits"], "--journal: expected a journal, got OUT/journal, which does not exist"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(known, call, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr(cir.cli.edits, "load_model", lambda *a, **k: pytest.fail("loaded"))
    status, out, error = call(*words)
    assert (status, out) == (1, "")
    assert said.replace("IN/", f"{known}/").replace("OUT/", f"{tmp_path}/") in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_number_of_no_edit_and_the_journal_of_another_model_are_refused(known, call, tmp_path, capsys):
    assert call("forget", *FORGET, "--facts", "IN/eight.jsonl")[0] == 0
    status, _, error = call("undo", "--edit", "5")
    assert (status, error) == (1, "cir: --edit: expected the number of one of 1 edits, got 5\n")
    assert call("forget", *FORGET, "--fact", FACTS[9]["sentences"][1], "--out", "OUT/other")[0] == 0
    other = ["--model", str(tmp_path / "other"), "--journal", str(tmp_path / "journal"), "--device", "cpu"]
    assert cli.main(["undo", *other]) == 1
    assert "expected the journal of this model, got that of" in capsys.readouterr().err


def test_a_journal_is_made_and_read_with_a_key(call, tmp_path):
    (tmp_path / "key").write_bytes(b"k" * 16)
    assert call("forget", *FORGET, "--facts", "IN/eight.jsonl", "--key-file", "OUT/key")[0] == 0
    for words in (["edits"], ["undo"], ["forget", *FORGET, "--fact", "a b"]):
        status, _, error = call(*words)
        assert status == 1
        assert "expected the key that this journal was made with, got none" in error
    assert call("undo", "--key-file", "OUT/key")[0] == 0
    assert "   1  undone " in call("edits", "--key-file", "OUT/key")[1]
