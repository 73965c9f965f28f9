from __future__ import annotations

import hashlib
import json
import re
import subprocess
from dataclasses import asdict, replace

import pytest

import cir
from cir import CIRConfig, cli
from cir.data.facts import load_facts, split_facts
from cir.measures import NonFiniteError, evaluate
from cir.proof.attacks import attack
from cir.proof.certificate import NAME, SIGNATURE, Certificate, Evidence, Witness, weights_hash
from cir.proof.stated import fingerprint, signature, signer
from cir.proof.verdict import Thresholds, judge
from cir.proof.verification import ALWAYS, WITHOUT_ORIGINAL, verify
from tests.faults.certificates import certified as signed
from tests.faults.certificates import sweep
from tests.tiny import TEXT, facts, knowing_llama, word_tokenizer

FORGET, STAY = load_facts(facts(12))[:8], load_facts(facts(12))[8:]
CONFIG = CIRConfig(layers=0.5, budget=9.0, worst_window=9.0)
STRANGE = {"id": "strange", "sentences": ["x1 x2 x3 x4"], "probes": [{"prompt": "x1 x2", "target": " x3"}]}


def evidence(**changes) -> Evidence:
    return replace(Evidence(FORGET, STAY, TEXT, text_tokens=512, generate=3, relearning=False), **changes)


@pytest.fixture(scope="module")
def certified():
    """A tiny model that forgot, its tokenizer, what was measured and the certificate."""
    model, tokenizer = knowing_llama(), word_tokenizer()
    measured = evidence(facts=[*FORGET, *load_facts([STRANGE])], sources={"facts": "somewhere"})
    witness = Witness(model, tokenizer, measured, progress=False)
    before = weights_hash(model)
    report = cir.unlearn(model, tokenizer, FORGET, retain=TEXT, config=CONFIG, progress=False)
    assert report.after.mean_recall < 0.5 * report.before.mean_recall
    return model, tokenizer, measured, witness.certificate({"name": "CIR", "rate": 1.0}), before


def test_a_certificate_says_what_was_measured_before_and_after(certified):
    model, tokenizer, _, certificate, hash_before = certified
    content = json.loads(json.dumps(certificate.content))
    assert content["set_aside"] == ["strange"]
    assert set(content["after"]["recall"]) == {fact.id for fact in FORGET}
    now = evaluate(model, tokenizer, FORGET, neighbours=STAY, generate=3)
    for name in ("recall", "neighbour_recall", "generation_extraction"):
        assert content["after"]["measures"][name]["value"] == pytest.approx(now.measures[name].value, rel=1e-4)
    assert content["after"]["measures"]["kl"]["value"] > 10 * abs(content["before"]["measures"]["kl"]["value"])
    known, probed = split_facts(FORGET, 0.8, 0)
    attacked = attack(model, tokenizer, probed, related=known)
    assert content["after"]["attacks"]["few_shot"]["value"] == pytest.approx(attacked["few_shot"].value, rel=1e-4)
    assert "pruned" in content["after"]["attacks"]
    assert content["weights_sha256"] == {"before": hash_before, "after": weights_hash(model)}
    assert content["weights_sha256"]["after"] != hash_before
    assert content["sources"] == {"facts": "somewhere"}
    assert content["attacker"] == {"taught": len(known), "asked": [fact.id for fact in probed]}
    for when in ("before", "after"):
        kept, means = content[when]["kept"], content[when]["measures"]
        assert kept.keys() == {"neighbour_recall", "loss"}
        assert kept["neighbour_recall"].keys() == {fact.id for fact in STAY}
        for name, units in kept.items():
            assert means[name]["value"] == pytest.approx(sum(units.values()) / len(units), rel=1e-6)
    text = evaluate(model, tokenizer, FORGET, text=TEXT, max_tokens=512)
    assert content["after"]["measures"]["loss"]["value"] == pytest.approx(text.loss, rel=1e-4)
    assert content["thresholds"] == asdict(Thresholds())
    assert content["verdict"] == judge(content).stated()
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", content["date"])


def test_a_verdict_is_by_the_thresholds_that_were_given(certified, tmp_path):
    model, tokenizer, measured, certificate, _ = certified
    witness = Witness(knowing_llama(), tokenizer, evidence(), progress=False)
    strict = witness.certificate({"name": "nothing"}, Thresholds(units=1, kept_share=1.0))
    assert strict.content["verdict"]["heading"].startswith("Not forgotten; not shown: ")
    assert strict.content["verdict"]["claims"]["language"] == "kept"
    own = replace(certificate, content={**certificate.content, "thresholds": asdict(Thresholds(units=1))})
    own.content["verdict"] = judge(own.content).stated()
    own.write(tmp_path)
    found = verify(Certificate.read(tmp_path), model, tokenizer, measured, folder=tmp_path, progress=False)
    assert found.holds
    assert "whether its own bounds are fit to judge by: units" in found.unverified


def test_it_is_read_back_and_holds_until_a_weight_or_the_data_differs(certified, tmp_path):
    model, tokenizer, measured, certificate, _ = certified
    certificate.write(tmp_path)
    read = Certificate.read(tmp_path)
    assert read.content.items() >= json.loads(json.dumps(certificate.content)).items()
    found = verify(read, model, tokenizer, measured, folder=tmp_path, progress=False)
    assert found.holds
    assert found.unverified == [WITHOUT_ORIGINAL, ALWAYS]
    found = verify(read, model, tokenizer, measured, original=knowing_llama(), progress=False)
    assert found.holds
    assert found.unverified == [ALWAYS, "the other files of the checkpoint, and the page"]
    other = replace(measured, text=TEXT.replace("word1", "word2"))
    found = verify(read, model, tokenizer, other, progress=False)
    assert found.differences[0].startswith("data, text: expected")
    assert found.differences[-1] == "reference: expected the windows of the text, got others"
    original = knowing_llama()
    found = verify(read, original, tokenizer, measured, progress=False)
    assert found.differences[0].startswith("weights, after: expected")
    assert any(line.startswith("recall: expected") for line in found.differences)


def test_alterations_are_found_or_named_as_unverified():
    assert sweep(0.25) == (17, [])


def test_a_verification_that_compares_no_figures_is_found(monkeypatch):
    monkeypatch.setattr("cir.proof.verification._compared", lambda *_: [])
    assert sweep(0.25)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": []}, "neighbours: expected some with probes"),
        ({"neighbours": FORGET[:1]}, "no ids in common, got 1: f0"),
        ({"related": [replace(FORGET[0], id="other")]}, "no sentences in common"),
        ({"facts": load_facts(["gamma of x0"])}, "facts: expected some with probes"),
        (
            {"facts": load_facts([{"sentences": ["s"], "probes": [{"prompt": "is X0 the", "target": " x0"}]}])},
            "do not hold their answer, got some of fact-1",
        ),
    ],
)
def test_evidence_that_shows_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        evidence(**changes)


def test_a_model_that_knows_nothing_of_the_facts_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="expected some that the model knows, got none"):
        Witness(model, tokenizer, evidence(), progress=False)


def test_a_missing_certificate_and_one_of_another_format_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected certificate\.json in"):
        Certificate.read(tmp_path)
    (tmp_path / NAME).write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="expected format cir-certificate-3, got 'other'; make it anew"):
        Certificate.read(tmp_path)


def test_the_command_line_certifies_and_verifies(tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    knowing_llama(hidden_size=160, intermediate_size=192).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    for name, items in (("facts", facts(12)[:8]), ("stay", facts(12)[8:10]), ("same", facts(12)[10:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "text.txt").write_text(TEXT)

    def run(*arguments: str) -> int:
        return cli.main([*(a.replace("IN/", f"{folder}/") for a in arguments), "--quiet", "--device", "cpu"])

    unlearn = ["unlearn", "--model", "IN/model", "--facts", "IN/facts.jsonl", "--out", str(out), "--max-steps", "8"]
    unlearn += ["--retain", "IN/text.txt", "--certify", "--no-relearning", "--budget", "9"]
    assert run(*unlearn) == 1
    assert "--disruption or --data, got none" in capsys.readouterr().err
    unlearn += ["--disruption", "IN/text.txt"]
    assert run(*unlearn) == 1
    assert "neighbours: expected some with probes" in capsys.readouterr().err
    assert not out.exists()
    assert run(*unlearn, "--neighbours", "IN/stay.jsonl", "--same-subject", "IN/same.jsonl") == 0
    content = json.loads((out / "certificate.json").read_text())
    assert f"verdict    {content['verdict']['heading']}" in capsys.readouterr().out
    assert content["after"]["measures"]["same_subject_recall"]["count"] == 2
    assert "Same subjects&#x27; other facts (should stay)" in (out / "certificate.html").read_text()
    assert run("verify", str(out)) == 1
    foreign = "expected files in .*, got a certificate that names others; if they are yours: --facts .*/facts.jsonl"
    assert re.search(foreign, capsys.readouterr().err)
    monkeypatch.chdir(tmp_path)
    assert run("verify", str(out)) == 0
    told = capsys.readouterr().out
    assert f"unverified {WITHOUT_ORIGINAL}" in told
    assert "unverified who made it" in told
    assert "All that was verified is as stated." in told
    assert f"verdict    {content['verdict']['heading']}" in told
    for name, word in content["verdict"]["claims"].items():
        assert f"claim      {name}: {word}." in told
    assert run("verify", str(out), "--original", "IN/model") == 0
    assert WITHOUT_ORIGINAL not in capsys.readouterr().out

    (folder / "other.jsonl").write_text(json.dumps(facts(12)[10]) + "\n")
    assert run("verify", str(out), "--same-subject", "IN/other.jsonl") == 1
    assert "differs    data, same_subject" in capsys.readouterr().out
    (folder / "stay.jsonl").rename(folder / "moved.jsonl")
    assert run("verify", str(out)) == 1
    assert "stay.jsonl" in capsys.readouterr().err
    (out / "model.safetensors").write_bytes((folder / "model" / "model.safetensors").read_bytes())
    assert run("verify", str(out), "--neighbours", "IN/moved.jsonl") == 1
    assert "differs    weights, after" in capsys.readouterr().out


def test_a_signature_is_of_this_certificate_and_that_key(tmp_path):
    of = signed(tmp_path / "one")
    Certificate.read(of.folder, of.public)
    with pytest.raises(ValueError, match=r"certificate\.sig: expected the signature of this certificate by that key"):
        Certificate.read(of.folder, signed(tmp_path / "two").public)
    with pytest.raises(ValueError, match="expected a public Ed25519 key, PEM, got"):
        Certificate.read(of.folder, of.key)
    with pytest.raises(ValueError, match="expected a private Ed25519 key, PEM without a password, got"):
        signature(b"", of.public)
    assert Certificate.read(of.folder).content["signer"] == fingerprint(of.public) == signer(of.key)
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-outform", "DER"], input=of.public, capture_output=True, check=True
    )
    assert fingerprint(of.public) == hashlib.sha256(der.stdout).hexdigest()
    content = json.loads((of.folder / NAME).read_text())
    said = (json.dumps({**content, "signer": "0" * 64}, indent=2) + "\n").encode()
    (of.folder / NAME).write_bytes(said)
    (of.folder / SIGNATURE).write_bytes(signature(said, of.key))
    with pytest.raises(ValueError, match=r"certificate\.json: expected that key as its signer, got '000"):
        Certificate.read(of.folder, of.public)
    (of.folder / SIGNATURE).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected certificate\.sig in"):
        Certificate.read(of.folder, of.public)


def test_what_was_forgotten_is_kept_where_its_certificate_fails(tmp_path, capsys, monkeypatch):
    knowing_llama(hidden_size=160, intermediate_size=192).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    for name, items in (("facts", facts(12)[:8]), ("stay", facts(12)[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    options = "--model model --facts facts.jsonl --neighbours stay.jsonl --disruption text.txt --retain text.txt "
    options += "--certify --no-relearning --budget 9 --max-steps 2 --quiet --device cpu --out out --overwrite"
    for failure, status in ((KeyboardInterrupt(), 130), (NonFiniteError("nan"), 1)):

        def fails(*_, failure=failure):
            raise failure

        monkeypatch.setattr(Witness, "certificate", fails)
        assert cli.main(["unlearn", *options.split()]) == status
        told = capsys.readouterr()
        assert f"cir: written without a certificate: {type(failure).__name__}" in told.err
        assert "written " in told.out
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert not (tmp_path / "out" / NAME).exists()
