"""What goes to the hub, by a client that keeps it instead."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest

import cir
from cir import cli
from tests.tiny import TEXT, facts, knowing_llama, tiny_llama, word_tokenizer

FACTS = [{**fact, "id": f"secret-{fact['id']}"} for fact in facts(12)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder that ``cir unlearn`` wrote."""
    place = tmp_path_factory.mktemp("hub")
    tiny_llama(hidden_size=160, intermediate_size=192).save_pretrained(place / "model")
    word_tokenizer().save_pretrained(place / "model")
    (place / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS[:6]))
    (place / "text.txt").write_text(TEXT)
    named = {"--model": "model", "--facts": "facts.jsonl", "--retain": "text.txt", "--out": "forgot"}
    paths = [part for name, file in named.items() for part in (name, str(place / file))]
    quick = ["--device", "cpu", "--budget", "5", "--worst-window", "5", "--max-steps", "1", "--quiet"]
    assert cli.main(["unlearn", *paths, *quick]) == 0
    return place / "forgot"


@pytest.fixture(scope="module")
def edit():
    model, tokenizer = knowing_llama(), word_tokenizer()
    config = cir.CIRConfig(layers=0.5, retain_tokens=1024)
    subspaces = cir.Subspaces.fit(model, tokenizer, TEXT, FACTS[:6], config=config, progress=False)
    bounds = cir.EditConfig(target_recall=0.3, keep=0.5, budget=5.0, worst_window=5.0, text_tokens=256)
    return cir.Editor(model, tokenizer, subspaces, text=TEXT, config=bounds).forget(FACTS[8])


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "forgot")


@pytest.fixture
def hub(monkeypatch):
    """What the client was asked to do."""
    asked = SimpleNamespace(repositories=[], files={}, tokens=[])

    class Client:
        def __init__(self, token=None):
            asked.tokens.append(token)

        def create_repo(self, repo_id, *, private, exist_ok):
            asked.repositories.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_commit(self, repo_id, operations, *, commit_message):
            assert repo_id == f"me/{asked.repositories[-1][0]}"
            for operation in operations:
                with operation.as_file() as file:
                    asked.files[operation.path_in_repo] = file.read()
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    return asked


def names_of(facts_of):
    return [text for fact in facts_of for text in (fact["id"], *fact["sentences"])]


def test_a_checkpoint_goes_up_with_a_card_and_without_its_facts(folder, hub):
    assert cir.push_to_hub(folder, "forgot", base_model="some/llama", token="t") == "https://hub/me/forgot/commit/1"
    assert (hub.repositories, hub.tokens) == ([("forgot", True, True)], ["t"])
    own = {path.name for path in folder.iterdir()}
    local = {".cir", "report.json", "config.yaml"}  # which names the files of facts and texts
    assert own > local
    own -= local
    assert hub.files.keys() == own | {"README.md"}
    assert all(hub.files[name] == (folder / name).read_bytes() for name in own)
    card = huggingface_hub.ModelCard(hub.files["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": "some/llama",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["unlearning", "cir"],
    }
    report = json.loads((folder / "report.json").read_text())
    digest = cir.hash_facts(cir.load_facts(FACTS[:6]))
    for said in (
        "| facts | 6 |",
        f"`{digest}`",
        f"{report['before']['mean_recall']:.3f} → {report['after']['mean_recall']:.3f}",
        "(budget +500.00%)",
        "nats a token (at most 5)",
        f"cir {report['versions']['cir']}",
        '"max_steps": 1',
        f"| ended | {report['stopped']} |",
        f"# {digest}\ncir eval --model",
    ):
        assert said in card.content
    assert not [text for text in names_of(FACTS[:6]) if text in card.content]


def test_a_certificate_stays_and_is_named_by_its_hash(folder, hub):
    for name in ("certificate.json", "certificate.html", "certificate-reference.safetensors", "certificate.sig"):
        (folder / name).write_bytes(b"x")
    cir.push_to_hub(folder, "forgot", private=False)
    assert hub.repositories == [("forgot", False, True)]
    assert not [name for name in hub.files if name.startswith("certificate")]
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of b"x"
    assert digest in hub.files["README.md"].decode()


def test_an_adapter_goes_up_with_the_card_of_its_edit(edit, tmp_path, hub):
    edit.export_lora(tmp_path / "adapter", "some/llama")
    cir.push_to_hub(tmp_path / "adapter", "adapter", edit=edit)
    assert hub.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = huggingface_hub.ModelCard(hub.files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("some/llama", "peft")
    assert cir.hash_facts([edit.fact]) in card.content
    assert f"| recall of the fact | {edit.before.recall:.3f} → {edit.after.recall:.3f} |" in card.content
    assert f"{edit.before.neighbours:.3f} → {edit.after.neighbours:.3f}" in card.content
    assert not [text for text in names_of([FACTS[8]]) if text in card.content]


def test_an_adapter_of_a_run_goes_up_with_the_card_of_the_run(written, edit, tmp_path, hub):
    words = ["--config", str(written / "config.yaml"), "--out", str(tmp_path / "adapter"), "--adapter"]
    assert cli.main(["unlearn", *words, "--quiet"]) == 0
    cir.push_to_hub(tmp_path / "adapter", "adapter", base_model="some/llama")
    assert hub.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = huggingface_hub.ModelCard(hub.files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("some/llama", "peft")
    held = json.loads((tmp_path / "adapter" / "report.json").read_text())["adapter"]
    assert f"| adapter | rank {held['rank']}, {held['energy']:.1%} of the change |" in card.content
    assert not [text for text in names_of(FACTS[:6]) if text in card.content]
    with pytest.raises(ValueError, match="edit: expected one with an adapter alone"):
        cir.push_to_hub(tmp_path / "adapter", "adapter", edit=edit)


def test_a_place_on_this_machine_is_no_base_model(edit, tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for number, name in enumerate(("models", "/gone/llama", "")):
        edit.export_lora(tmp_path / f"adapter{number}", name)
        cir.push_to_hub(tmp_path / f"adapter{number}", "adapter", edit=edit)
        assert huggingface_hub.ModelCard(hub.files["README.md"].decode()).data.base_model is None


def test_folders_of_others_and_changed_ones_are_refused_before_anything_is_sent(written, edit, tmp_path, hub):
    def changed(name, change):
        place = shutil.copytree(written, tmp_path / name)
        change(place)
        return place

    edit.export_lora(tmp_path / "adapter", "some/llama")
    other = copy.deepcopy(edit)
    next(iter(other.factors.values()))[0].add_(1)
    knowing_llama().save_pretrained(tmp_path / "plain")
    for place, of, said in (
        (tmp_path / "nothing", None, "expected a folder written by cir, got one without its mark"),
        (tmp_path / "plain", None, "expected a folder written by cir, got one without its mark"),
        (changed("unfinished", lambda p: (p / ".cir").write_text("Being written by cir.\n")), None, "its mark"),
        (changed("a", lambda p: (p / "report.json").unlink()), None, "got no report.json"),
        (changed("b", lambda p: (p / "config.json").unlink()), None, "got no config.json"),
        (changed("c", lambda p: (p / "model.safetensors").unlink()), None, "expected weights as safetensors"),
        (changed("d", lambda p: (p / "report.json").write_text("{")), None, "report.json"),
        (changed("e", lambda p: (p / "report.json").write_text('{"before": 1}')), None, "a report of this version"),
        (written, edit, "edit: expected one with an adapter alone"),
        (tmp_path / "adapter", None, "edit: expected the edit of which .*adapter is the adapter, got none"),
        (tmp_path / "adapter", other, r"adapter_model.safetensors: expected that of edit 1, got another or none"),
    ):
        with pytest.raises(ValueError, match=said):
            cir.push_to_hub(place, "forgot", edit=of)
    assert not hub.repositories
    assert not hub.files


def test_the_card_of_a_report_is_that_of_its_folder(tokenizer):
    config = cir.CIRConfig(layers=0.5, budget=9.0, worst_window=9.0, relearning_steps=0, max_steps=1)
    sentences = [fact["sentences"][0] for fact in FACTS[:2]]
    options = {"retain": TEXT, "config": config, "progress": False}
    report = cir.unlearn(knowing_llama(), tokenizer, sentences, contrast=FACTS[6:], **options)
    card = report.card("some/llama")
    assert card.data.base_model == "some/llama"
    assert "| facts | 2 |" in card.content
    assert "| recall of the facts | not measured → not measured |" in card.content
    assert "| not all forgotten | 2 |" in card.content
    report.after.loss = float("nan")
    assert "→ not finite nats a token" in report.card().content
